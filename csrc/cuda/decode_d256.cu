// Decode kernels of head_dim 256.
#include "cuda/decode.cuh"

namespace tq::cuda {

void launch_decode_d256(const DecodeParams& p, const DecodePlan& plan, Stream stream) {
  launch_decode<256>(p, plan, stream);
}

int resident_decode_d256(const DecodePlan& plan) { return resident_decode<256>(plan); }

}  // namespace tq::cuda
