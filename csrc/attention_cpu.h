// What the two CPU kernels of attention share: vectors and products of bf16, and the exponential.
//
// An instruction adds two products of bf16 to each of 16 sums in fp32. One factor is read by rows,
// pairs side by side along the axis of the sum; the other is packed so that a pair lies side by
// side, sixteen of its columns to a vector.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "cpu.h"

#if defined(__AVX512BF16__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace {

constexpr int64_t WIDEST = 64;          // channels of a head
constexpr uint16_t ZEROS[WIDEST] = {};  // a row where there is none

// Whether heads of `d` channels are served on the processor that this is built for.
inline bool serves(int64_t d) {
#if defined(__AVX512BF16__)
  return d > 0 && d <= WIDEST && d % 16 == 0;
#else
  return d < 0;
#endif
}

#if defined(__AVX512BF16__)

constexpr int LANES = 16;
constexpr int ROWS = 6;          // 6 x 4 vectors of sums, 4 of the packed factor, of 32 registers
constexpr int STEP = 4 * LANES;  // columns that share a pass over the pairs
constexpr float LOG2E = 1.44269504f;

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// The lanes of a vector that there are, of `left`.
inline __mmask16 lanes(int64_t left) {
  return left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
}

// LANES elements in fp32.
inline __m512 load(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Two vectors in bf16, one after the other.
inline __m512i both(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

inline void store(uint16_t* a, uint16_t* b, __m512i both) {
  _mm256_storeu_si256((__m256i*)a, _mm512_castsi512_si256(both));
  _mm256_storeu_si256((__m256i*)b, _mm512_extracti64x4_epi64(both, 1));
}

// Element l of the one next to element l of the other.
inline __m512i side_by_side(__m512i both) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i pair = _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16));
  return _mm512_permutexvar_epi16(_mm512_add_epi32(pair, _mm512_set1_epi32(LANES << 16)), both);
}

// Two rows of d channels to columns `at` and `at` + 1 of (d / 2, step, 2).
inline void pack_columns(
    const uint16_t* const (&rows)[2], int64_t d, int64_t step, int64_t at, uint16_t* out) {
  for (int64_t c = 0; c < d; c += 2) {
    uint32_t pairs[2];
    std::memcpy(&pairs[0], rows[0] + c, 4);
    std::memcpy(&pairs[1], rows[1] + c, 4);
    std::memcpy(out + c * step + 2 * at, pairs, 8);
  }
}

// Two rows of d channels to (d, 2).
inline void pack_pairs(const uint16_t* const (&rows)[2], int64_t d, uint16_t* out) {
  for (int64_t c = 0; c < d; ++c) {
    const uint32_t pair = rows[0][c] | uint32_t(rows[1][c]) << 16;
    std::memcpy(out + 2 * c, &pair, sizeof pair);
  }
}

// sums[r][v] += pairs of row r of a (`stride` elements apart) times those of b (V vectors a pair).
template <int R, int V>
inline __attribute__((always_inline)) void products(
    const uint16_t* a, int64_t stride, const uint16_t* b, int64_t pairs, __m512 (&sums)[R][V]) {
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      right[v] = (__m512bh)_mm512_loadu_si512(b + (p * V + v) * 2 * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * stride + 2 * p, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
    }
  }
}

// The same, onto `out` (R, V * LANES) in fp32, or over it.
template <int R, int V>
inline void accumulate(
    const uint16_t* a, int64_t stride, const uint16_t* b, int64_t pairs, bool onto, float* out) {
  __m512 sums[R][V] = {};
  if (onto)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] = _mm512_loadu_ps(out + (r * V + v) * LANES);
  products<R, V>(a, stride, b, pairs, sums);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(out + (r * V + v) * LANES, sums[r][v]);
}

// e^x for x <= 0, to 3e-6; NaN stays.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), _mm512_mul_ps(x, _mm512_set1_ps(LOG2E)));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(1.3333558e-3f);  // ln(2)^k / k!, from k = 5 down
  for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

#endif

}  // namespace
