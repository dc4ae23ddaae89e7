// Decode kernels of head_dim 128.
#include "cuda/decode.cuh"

namespace tq::cuda {

void launch_decode_d128(const DecodeParams& p, const DecodePlan& plan, bool overlaps,
                        Stream stream) {
  launch_decode<128>(p, plan, overlaps, stream);
}

Residency residency_d128(const DecodePlan& plan) { return residency<128>(plan); }

}  // namespace tq::cuda
