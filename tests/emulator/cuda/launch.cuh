// Takes the place of csrc/cuda/launch.cuh.
#pragma once

namespace tq::cuda {

#define TQ_CUDA_CHECK(call) call
#define TQ_DYNAMIC_SHARED(bytes) uint8_t* bytes = emulator::shared_memory()

template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int, cudaStream_t, const Params& params,
            bool overlaps = false) {
  emulator::launch(grid, threads, [=] { kernel(params); }, overlaps);
}

template <typename Params>
bool can_overlap(void (*)(Params)) {
  return true;
}

// Few, so that there is more than one wave.
template <typename Params>
int resident_ctas(void (*)(Params), int, int) {
  return 12;
}

class OncePerDevice {
 public:
  template <typename Ask>
  int get(const Ask& ask) {
    return ask();
  }
};

}  // namespace tq::cuda
