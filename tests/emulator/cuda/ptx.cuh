// Takes the place of csrc/cuda/ptx.cuh.
#pragma once

namespace tq::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

inline uint32_t shared_address(const void* pointer) {
  return static_cast<const uint8_t*>(pointer) - emulator::shared_memory();
}
inline void cp_async_16(uint32_t shared, const void* global) {
  std::memcpy(emulator::shared_memory() + shared, global, 16);
}
inline void cp_async_commit() {}
template <int kPending>
inline void cp_async_wait() {}
inline void prefetch_l2(const void*) {}

inline float exp2_approx(float x) { return std::exp2(x); }

inline uint32_t prmt(uint32_t table, uint32_t selectors) {
  return __byte_perm(table, 0, selectors);
}
inline uint32_t shift_right_16(uint32_t x) { return x >> 16; }

inline void mma_int8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                     uint32_t b0, uint32_t b1) {
  const emulator::WarpWords& of = emulator::exchange({a0, a1, a2, a3, b0, b1});
  const auto byte = [](uint32_t word, int k) { return static_cast<int8_t>(word >> 8 * (k % 4)); };
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g, column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k) {
      const int from = k % 16 / 4;
      c[i] += byte(of[4 * row + from][i / 2 + 2 * (k / 16)], k) *
              byte(of[4 * column + from][4 + k / 16], k);
    }
  }
}

inline void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  const emulator::WarpWords& of = emulator::exchange({a0, a1, a2, a3, b0, b1});
  const auto half = [](uint32_t word, int k) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * (k % 2))));
  };
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;
      c[i] += half(of[4 * row + from][i / 2 + 2 * (k / 8)], k) *
              half(of[4 * column + from][4 + k / 8], k);
    }
  }
}

inline uint32_t pack_half2(float low, float high) {
  return emulator::bits_of<uint32_t>(__floats2half2_rn(low, high));
}

inline uint32_t add_acq_rel(uint32_t* counter, uint32_t count) {
  return std::exchange(*counter, *counter + count);
}
inline float load_relaxed(const float* at) { return *at; }
template <int kCount>
void load_relaxed(const float* at, float (&x)[kCount]) {
  std::copy(at, at + kCount, x);
}

}  // namespace tq::cuda
