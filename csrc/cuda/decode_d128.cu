// Decode kernels of head_dim 128.
#include "cuda/decode.cuh"

namespace tq::cuda {

void launch_decode_d128(const DecodeParams& p, const DecodePlan& plan, Stream stream) {
  launch_decode<128>(p, plan, stream);
}

int resident_decode_d128(const DecodePlan& plan) { return resident_decode<128>(plan); }

}  // namespace tq::cuda
