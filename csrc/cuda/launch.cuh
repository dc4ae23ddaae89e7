// The one place that launches kernels and checks CUDA calls.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tq::cuda {

inline void check(cudaError_t error, const char* what, const char* file, int line) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("turboquant: ") + what +
                           " failed: " + cudaGetErrorString(error) + " (" + file + ":" +
                           std::to_string(line) + ")");
}

// Declares the dynamic shared memory of a kernel.
#define TQ_DYNAMIC_SHARED(bytes) extern __shared__ __align__(128) uint8_t bytes[]

#define TQ_CUDA_CHECK(call) ::tq::cuda::check(call, #call, __FILE__, __LINE__)

template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const Params& params) {
  if (shared_bytes > 48 * 1024) {
    TQ_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  TQ_CUDA_CHECK(cudaGetLastError());
}

// CTAs of `kernel` that the current device runs at once; 0 if it cannot run one.
template <typename Params>
int resident_ctas(void (*kernel)(Params), int threads, int shared_bytes) {
  int device = 0, num_sms = 0, most_shared_bytes = 0, ctas_per_sm = 0;
  TQ_CUDA_CHECK(cudaGetDevice(&device));
  TQ_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  TQ_CUDA_CHECK(
      cudaDeviceGetAttribute(&most_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (shared_bytes > most_shared_bytes) return 0;
  TQ_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  TQ_CUDA_CHECK(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas_per_sm, kernel, threads, shared_bytes));
  return num_sms * ctas_per_sm;
}

}  // namespace tq::cuda
