// Decode kernels of head_dim 64.
#include "cuda/decode.cuh"

namespace tq::cuda {

void launch_decode_d64(const DecodeParams& p, const DecodePlan& plan, Stream stream) {
  launch_decode<64>(p, plan, stream);
}

int resident_decode_d64(const DecodePlan& plan) { return resident_decode<64>(plan); }

}  // namespace tq::cuda
