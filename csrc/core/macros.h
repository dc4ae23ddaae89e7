// Markers that let one source serve g++ and nvcc.
#pragma once

#ifdef __CUDACC__
#define TQ_HOST_DEVICE __host__ __device__
#else
#define TQ_HOST_DEVICE
#endif
