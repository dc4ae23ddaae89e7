// Decode kernels of head_dim 64.
#include "cuda/decode.cuh"

namespace tq::cuda {

void launch_decode_d64(const DecodeParams& p, const DecodePlan& plan, bool overlaps,
                       Stream stream) {
  launch_decode<64>(p, plan, overlaps, stream);
}

Residency residency_d64(const DecodePlan& plan) { return residency<64>(plan); }

}  // namespace tq::cuda
