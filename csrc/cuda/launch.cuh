// The one place that launches kernels and checks CUDA calls.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
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

// Launch a kernel. It may overlap the one launched just before it on the stream if that one calls
// begin_next() and this one can_overlap() (programmatic dependent launch).
template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const Params& params, bool overlaps = false) {
  if (shared_bytes > 48 * 1024) {
    TQ_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  TQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

// Whether a kernel that calls await_previous() was compiled for GPUs that know what it means.
template <typename Params>
bool can_overlap(void (*kernel)(Params)) {
  cudaFuncAttributes attributes{};
  TQ_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
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

// A number that depends on the device, asked for once.
class OncePerDevice {
 public:
  template <typename Ask>
  int get(const Ask& ask) {
    int device = 0;
    TQ_CUDA_CHECK(cudaGetDevice(&device));
    std::atomic<int>& known = known_[device % kDevices];
    if (known.load(std::memory_order_relaxed) == 0) {
      known.store(1 + ask(), std::memory_order_relaxed);
    }
    return known.load(std::memory_order_relaxed) - 1;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> known_[kDevices] = {};  // plus one; 0: not asked yet
};

}  // namespace tq::cuda
