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
inline void begin_next() {}
inline void await_previous() { emulator::await_previous(); }
inline void prefetch_l2(const void*) {}

inline int read_thread() { return threadIdx.x; }

inline float exp2_approx(float x) { return std::exp2(x); }

inline uint32_t prmt(uint32_t table, uint32_t selectors) {
  return __byte_perm(table, 0, selectors);
}
inline uint32_t shift_right_16(uint32_t x) { return x >> 16; }

// c[16 x 8] += a b, of which every lane has four words and two, with kPerWord consecutive k each.
template <int kPerWord, typename T, typename Element>
void multiply(T (&c)[4], const emulator::Words& own, const Element& element) {
  constexpr int kDepth = 8 * kPerWord;
  const emulator::WarpWords& of = emulator::exchange(own);
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int k = 0; k < kDepth; ++k) {
      const int from = k % (kDepth / 2) / kPerWord, half = k / (kDepth / 2);
      c[i] += element(of[4 * g + from][i / 2 + 2 * half], k % kPerWord) *
              element(of[4 * column + from][4 + half], k % kPerWord);
    }
  }
}

inline void mma_int8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                     uint32_t b0, uint32_t b1) {
  multiply<4>(c, {a0, a1, a2, a3, b0, b1},
              [](uint32_t word, int i) { return static_cast<int8_t>(word >> 8 * i); });
}

inline void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  multiply<2>(c, {a0, a1, a2, a3, b0, b1}, [](uint32_t word, int i) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * i)));
  });
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
