// Decode kernels of head_dim 256.
#include "cuda/decode.cuh"

namespace tq::cuda {

void launch_decode_d256(const DecodeParams& p, const DecodePlan& plan, bool overlaps,
                        Stream stream) {
  launch_decode<256>(p, plan, overlaps, stream);
}

Residency residency_d256(const DecodePlan& plan) { return residency<256>(plan); }

}  // namespace tq::cuda
