// What the two CPU kernels of attention share: heads that they serve, and rows packed for products.

#pragma once

#include <cstdint>
#include <cstring>

#include "product_cpu.h"

namespace {

constexpr int64_t WIDEST = 64;  // channels of a head

// Whether heads of `d` channels, of `bytes` bytes each, are served on the processor that this is
// built for.
inline bool serves(int64_t d, int64_t bytes) {
  return has_products(bytes) && d > 0 && d <= WIDEST && d % 16 == 0;
}

#if defined(__AVX512F__)

constexpr int ROWS = 6;          // 6 x 4 vectors of sums, 4 of the packed factor, of 32 registers
constexpr int STEP = 4 * LANES;  // columns that share a pass over the groups
template <typename E>
constexpr E ZEROS[WIDEST] = {};  // a row where there is none

// Two rows of d channels to columns `at` and `at` + 1 of (d, step).
inline void pack_columns(
    const float* const (&rows)[2], int64_t d, int64_t step, int64_t at, float* out) {
  for (int64_t c = 0; c < d; c += LANES) {
    alignas(64) float two[2 * LANES];
    side_by_side(two, load(rows[0] + c), load(rows[1] + c));
    for (int64_t i = 0; i < LANES; ++i) std::memcpy(out + (c + i) * step + at, two + 2 * i, 8);
  }
}

// To (d / 2, step, 2).
inline void pack_columns(
    const uint16_t* const (&rows)[2], int64_t d, int64_t step, int64_t at, uint16_t* out) {
  for (int64_t c = 0; c < d; c += 2) {
    uint32_t pairs[2];
    std::memcpy(&pairs[0], rows[0] + c, 4);
    std::memcpy(&pairs[1], rows[1] + c, 4);
    std::memcpy(out + c * step + 2 * at, pairs, 8);
  }
}

// Two rows of d channels to (2, d).
inline void pack_rows(const float* const (&rows)[2], int64_t d, float* out) {
  for (int64_t i = 0; i < 2; ++i) std::memcpy(out + i * d, rows[i], d * sizeof(float));
}

// To (d, 2).
inline void pack_rows(const uint16_t* const (&rows)[2], int64_t d, uint16_t* out) {
  for (int64_t c = 0; c < d; ++c) {
    const uint32_t pair = rows[0][c] | uint32_t(rows[1][c]) << 16;
    std::memcpy(out + 2 * c, &pair, sizeof pair);
  }
}

// sums[r][v] of `products`, onto `out` (R, V * LANES) in fp32, or over it.
template <int R, int V, typename E>
inline void accumulate(
    const E* a, int64_t stride, const E* b, int64_t groups, bool onto, float* out) {
  __m512 sums[R][V] = {};
  products<R, V>(a, stride, b, groups, sums);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* at = out + (r * V + v) * LANES;
      store(at, onto ? _mm512_add_ps(load(at), sums[r][v]) : sums[r][v]);
    }
}

#endif

}  // namespace
