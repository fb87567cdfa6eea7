// What the CPU kernels on matrix products share: vectors and products of E, which is float or bf16
// (uint16_t), and the exponential.
//
// An instruction adds to each of 16 sums in fp32 as many products as 4 bytes have factors: GROUP,
// two of bf16 or one of fp32. One factor is read by rows, groups side by side along the axis of the
// sum; the other is packed so that a group lies side by side, sixteen of its columns to a vector.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "cpu.h"

#if defined(__AVX512F__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace {

// Whether there are products of elements of `bytes` bytes on the processor that this is built for.
inline bool has_products([[maybe_unused]] int64_t bytes) {
  bool has = false;
#if defined(__AVX512F__)
  has = bytes == 4;
#endif
#if defined(__AVX512BF16__)
  has = has || bytes == 2;
#endif
  return has;
}

// The first of `size` elements and more that lie at a multiple of a vector's size.
template <typename T>
T* aligned(std::vector<T>& memory, int64_t size) {
  if (memory.size() < size + 64 / sizeof(T)) memory.resize(size + 64 / sizeof(T));
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

#if defined(__AVX512F__)

constexpr int LANES = 16;
constexpr float LOG2E = 1.44269504f;
template <typename E>
constexpr int GROUP = 4 / sizeof(E);

// The lanes of a vector that there are, of `left`.
inline __mmask16 lanes(int64_t left) {
  return left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
}

// --- fp32 ------------------------------------------------------------------------------

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }

inline void store(float* a, __m512 x) { _mm512_storeu_ps(a, x); }

inline void store(float* a, float* b, __m512 x, __m512 y) { store(a, x), store(b, y); }

// One after the other.
inline void store_row(float* to, __m512 x, __m512 y) { store(to, to + LANES, x, y); }

// Element l of x next to element l of y.
inline void side_by_side(float* out, __m512 x, __m512 y) {
  const __m512i lane = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  store(out, _mm512_permutex2var_ps(x, lane, y));
  store(out + LANES, _mm512_permutex2var_ps(x, _mm512_add_epi32(lane, _mm512_set1_epi32(8)), y));
}

// Vectors of two rows to where a packed factor has them, its rows `next` apart.
inline void store_packed(float* out, int64_t next, __m512 x, __m512 y) {
  store(out, out + next, x, y);
}

inline __m512 broadcast(const float* group) { return _mm512_set1_ps(*group); }

inline __m512 add_products(__m512 sum, __m512 left, __m512 right) {
  return _mm512_fmadd_ps(left, right, sum);
}

// --- bf16 ------------------------------------------------------------------------------

inline __m512 load(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

#if defined(__AVX512BF16__)

inline void store(uint16_t* a, __m512 x) {
  _mm256_storeu_si256((__m256i*)a, (__m256i)_mm512_cvtneps_pbh(x));
}

inline void store(uint16_t* a, uint16_t* b, __m512 x, __m512 y) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
  _mm256_storeu_si256((__m256i*)a, _mm512_castsi512_si256(both));
  _mm256_storeu_si256((__m256i*)b, _mm512_extracti64x4_epi64(both, 1));
}

inline void store_row(uint16_t* to, __m512 x, __m512 y) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(y, x));
}

inline void side_by_side(uint16_t* out, __m512 x, __m512 y) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i pair = _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16));
  _mm512_storeu_si512(
      out, _mm512_permutexvar_epi16(_mm512_add_epi32(pair, _mm512_set1_epi32(LANES << 16)),
                                    (__m512i)_mm512_cvtne2ps_pbh(y, x)));
}

inline void store_packed(uint16_t* out, int64_t, __m512 x, __m512 y) { side_by_side(out, x, y); }

inline __m512bh broadcast(const uint16_t* group) {
  int32_t pair;
  std::memcpy(&pair, group, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512 add_products(__m512 sum, __m512bh left, __m512bh right) {
  return _mm512_dpbf16_ps(sum, left, right);
}

#endif

// --- Both ------------------------------------------------------------------------------

// sums[r][v] += row r of a (`stride` elements apart) times b (V vectors a group).
template <int R, int V, typename E>
inline __attribute__((always_inline)) void products(
    const E* a, int64_t stride, const E* b, int64_t groups, __m512 (&sums)[R][V]) {
  using Factor = decltype(broadcast(a));
  for (int64_t p = 0; p < groups; ++p) {
    Factor right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      right[v] = (Factor)_mm512_loadu_si512(b + (p * V + v) * GROUP<E> * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Factor left = broadcast(a + r * stride + GROUP<E> * p);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = add_products(sums[r][v], left, right[v]);
    }
  }
}

// e^x for x <= 0, to 2e-7; NaN stays.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), _mm512_mul_ps(x, _mm512_set1_ps(LOG2E)));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(1.32647273e-3f);  // of its degree the one that errs least
  for (float c : {9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// Calls `function` with the number of vectors, at most MOST, as a constant.
template <int MOST = 4, typename Function>
inline void with_vectors(int64_t vectors, const Function& function) {
  if constexpr (MOST > 1)
    if (vectors < MOST) return with_vectors<MOST - 1>(vectors, function);
  function(std::integral_constant<int, MOST>());
}

#endif

}  // namespace
