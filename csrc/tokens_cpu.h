// What the CPU kernels of pointwise and ffn share: tokens on their way through products.
//
//   y = residual + scale * (norm(x) W^T + bias)
//
// Vectors run over tokens, so that weights are read as they are, a number to all lanes. Tokens go
// in chunks that stay in the second-level cache, and lie there in tiles: groups of channels by
// vectors of tokens (see product_cpu.h). What one product leaves is what the next one reads, and
// only the last is turned round to rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "product_cpu.h"

// The arguments of a call. Every field has 8 bytes, so that Python writes them into an array.

// Rows of channels side by side, in fp32 or, `half`, in bf16.
struct Rows {
  const void* data;
  int64_t stride;  // in elements
  int64_t half;
};

// Parameters, side by side, likewise, or null; in fp32 once `Parameters` has seen them.
struct Numbers {
  const void* data;
  int64_t half;

  const float* floats() const { return static_cast<const float*>(data); }
};

// (x - mean) / sqrt(variance + eps) * factor + shift, of channels; `of_rows`, mean and variance are
// those of the row itself. `Parameters` makes the root a part of the factor, but not of rows.
struct Norm {
  int64_t is_one, of_rows;
  Numbers mean, variance, factor, shift;
};

// A product's weight (rows, columns), contiguous, in fp32 or, `half`, in bf16; and its
// bias (rows) or null. `cast` makes it of the dtype of the products.
struct Weight {
  const void* data;
  int64_t rows, columns, half;
  Numbers bias;
};

struct Result {
  void* data;  // contiguous
  int64_t half;
  Rows residual;  // or null
  Numbers scale;  // of each clip, or null
  int64_t clip;   // tokens
};

// The arguments of a product; x has `tokens` rows.
struct Pointwise {
  Rows x;
  Norm norm;
  Weight weight;
  Result y;
  int64_t tokens;
};

// Those of an FFN, likewise.
struct FFN {
  Rows x;
  Norm norm;
  Weight first, second;
  Result y;
  int64_t tokens;
};

namespace {

// Memory for the parameters of a call that do not lie there in fp32.
class Parameters {
 public:
  void widen(Numbers& given, int64_t size) {
    if (!given.data || !given.half) return;
    float* made = add(size);
    const bfloat16* from = static_cast<const bfloat16*>(given.data);
    std::copy(from, from + size, made);
    given = {made, 0};
  }

  void widen(Norm& norm, int64_t channels, float eps) {
    if (!norm.is_one) return;
    for (Numbers* given : {&norm.mean, &norm.variance, &norm.factor, &norm.shift})
      widen(*given, channels);
    float *factor = add(channels), *shift = add(channels);
    for (int64_t c = 0; c < channels; ++c) {
      factor[c] = norm.factor.data ? norm.factor.floats()[c] : 1.0f;
      shift[c] = norm.shift.data ? norm.shift.floats()[c] : 0.0f;
      if (!norm.of_rows) factor[c] /= std::sqrt(norm.variance.floats()[c] + eps);
    }
    norm.factor = {factor, 0}, norm.shift = {shift, 0};
  }

  void widen(Result& y, int64_t tokens) { widen(y.scale, tokens / std::max<int64_t>(y.clip, 1)); }

 private:
  float* add(int64_t size) {
    kept.emplace_back(new float[size]);
    return kept.back().get();
  }

  std::vector<std::unique_ptr<float[]>> kept;
};

// Whether there are products with it, in bf16 where `half`; one in bf16 is not made to be of fp32.
inline bool serves(const Weight& weight, int32_t half) {
#if defined(__AMX_BF16__)
  if (half) return false;  // the library uses the matrix units, these products do not
#endif
  const bool in_eights = weight.rows % 8 == 0 && weight.columns % 8 == 0;
  return has_products(half ? 2 : 4) && weight.half <= half && in_eights;
}

#if defined(__AVX512F__)

// A product's tile: 8 channels by 3 vectors of tokens are 24 sums, with 3 of the 32 registers for the
// vectors. Such a loop runs at the processor's peak, with tokens from either cache.
constexpr int N = 8;
constexpr int VECTORS = 3;
constexpr int TILE = VECTORS * LANES;  // tokens
constexpr int64_t CHAIN = 128;         // products added one after another; errs as the library does
constexpr int64_t CACHE = 640 << 10;   // bytes of a chunk, of 1 MB at the second level
constexpr int64_t CHUNK = 4 * TILE;    // tokens, at most: more make weights no cheaper
constexpr int64_t FEW = TILE;          // tokens whose products are shared out by channels

// A weight in fp32 for products in bf16, in `memory`; in pairs of vectors, which is what there is of it.
struct Narrowed {
  const float* from;
  uint16_t* to;
};

inline void narrow(
    [[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end, [[maybe_unused]] void* context) {
#if defined(__AVX512BF16__)
  const Narrowed& job = *static_cast<Narrowed*>(context);
  for (int64_t i = begin * 2 * LANES; i < end * 2 * LANES; i += 2 * LANES)
    store_row(job.to + i, load(job.from + i), load(job.from + i + LANES));
#endif
}

// Makes a weight be of the dtype of the products, bf16 where `half`.
inline int32_t cast(
    Weight& weight, int32_t half, std::vector<uint16_t>& memory, ParallelFor parallel_for) {
  if (weight.half == half) return 0;
  const int64_t size = weight.rows * weight.columns;  // a multiple of 64
  Narrowed job = {static_cast<const float*>(weight.data), aligned(memory, size)};
  weight.data = job.to, weight.half = 1;
  return parallel_for(0, size / (2 * LANES), 1024, narrow, &job);
}

// How many of `tokens` make a chunk: chunks alike, and few, since each reads all weights.
inline int64_t chunk_of(int64_t tokens, int64_t bytes_of_token) {
  const int64_t most = std::clamp<int64_t>(CACHE / bytes_of_token / TILE * TILE, TILE, CHUNK);
  const int64_t chunks = std::max<int64_t>((tokens + most / 4) / most, 1);
  return tiles_of(tiles_of(tokens, chunks), LANES) * LANES;
}

// 16 channels of a row in fp32, as many as `left` says.
inline __m512 load(const Rows& rows, int64_t row, int64_t c, int64_t left) {
  const int64_t at = row * rows.stride + c;
  const __mmask16 real = lanes(left);
  if (!rows.half) return _mm512_maskz_loadu_ps(real, static_cast<const float*>(rows.data) + at);
  const uint16_t* from = static_cast<const uint16_t*>(rows.data) + at;
  if (left >= LANES) return load(from);
  alignas(32) uint16_t some[LANES] = {};
  std::memcpy(some, from, left > 0 ? 2 * left : 0);
  return load(some);
}

// --- Into the cache --------------------------------------------------------------------

// Rows as they are read: normalised.
struct Reader {
  const Rows& x;
  const Norm& norm;
  float eps;
  int64_t channels;

  // Mean and inverse deviation of a row.
  void statistics(int64_t row, float& mean, float& rstd) const {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < channels; c += LANES)
      sum = _mm512_add_ps(sum, load(x, row, c, channels - c));
    mean = _mm512_reduce_add_ps(sum) / channels;
    __m512 squares = sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < channels; c += LANES) {
      const int64_t left = channels - c;
      const __m512 value = load(x, row, c, left);
      const __m512 d = _mm512_maskz_sub_ps(lanes(left), value, _mm512_set1_ps(mean));
      sum = _mm512_add_ps(sum, d);
      squares = _mm512_fmadd_ps(d, d, squares);
    }
    // What the mean was rounded by: in a row of equal channels all that there is.
    const float rest = _mm512_reduce_add_ps(sum) / channels;
    const float variance = _mm512_reduce_add_ps(squares) / channels - rest * rest;
    mean += rest;
    rstd = 1.0f / std::sqrt(std::max(variance, 0.0f) + eps);
  }

  // 16 channels of a row whose statistics these are, if it has any.
  __m512 operator()(int64_t row, int64_t c, float mean, float rstd) const {
    const int64_t left = channels - c;
    __m512 value = load(x, row, c, left);
    if (!norm.is_one) return value;
    const auto of = [&](const Numbers& channel) {
      return _mm512_maskz_loadu_ps(lanes(left), channel.floats() + c);
    };
    if (norm.of_rows)
      value = _mm512_mul_ps(_mm512_sub_ps(value, _mm512_set1_ps(mean)), _mm512_set1_ps(rstd));
    else
      value = _mm512_sub_ps(value, of(norm.mean));
    return _mm512_fmadd_ps(value, of(norm.factor), of(norm.shift));
  }
};

// Row i becomes column i.
inline __attribute__((always_inline)) void transpose(__m512 (&x)[16]) {
  __m512 y[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 in every quarter
    const __m512 a = _mm512_unpacklo_ps(x[i], x[i + 1]), b = _mm512_unpackhi_ps(x[i], x[i + 1]);
    const __m512 c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]);
    const __m512 d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = _mm512_shuffle_ps(a, c, 0x44), y[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    y[i + 2] = _mm512_shuffle_ps(b, d, 0x44), y[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // and the quarters
    const __m512 a = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xdd);
    x[i] = _mm512_shuffle_f32x4(a, c, 0x88), x[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd), x[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// `count` normalised rows of K channels from `first` on -> tiles, each (K / GROUP, vectors, 16,
// GROUP); where there is no row, zeros.
template <typename E>
void read(
    const Rows& x, const Norm& norm, float eps, int64_t first, int64_t count, int64_t K,
    E* tiles) {
  const Reader reader = {x, norm, eps, K};
  float mean[LANES] = {}, rstd[LANES] = {};
  for (int64_t n = 0; n < count; n += LANES) {
    const int64_t before = n / TILE * TILE, real = std::min<int64_t>(LANES, count - n);
    const int64_t step = std::min<int64_t>(tiles_of(count - before, LANES), VECTORS) * LANES;
    E* tile = tiles + before * K + (n - before) * GROUP<E>;
    if (norm.is_one && norm.of_rows)
      for (int64_t l = 0; l < real; ++l) reader.statistics(first + n + l, mean[l], rstd[l]);
    for (int64_t c = 0; c < K; c += LANES * GROUP<E>) {
      __m512 block[LANES];
      for (int64_t l = 0; l < LANES; ++l) {
        block[l] = _mm512_setzero_ps();
        if (l >= real) continue;
        const __m512 low = reader(first + n + l, c, mean[l], rstd[l]);
        block[l] = low;
#if defined(__AVX512BF16__)
        if constexpr (GROUP<E> == 2) {
          const __m512 high = reader(first + n + l, c + LANES, mean[l], rstd[l]);
          block[l] = (__m512)_mm512_cvtne2ps_pbh(high, low);
        }
#endif
      }
      transpose(block);
      const int64_t some = std::min<int64_t>(LANES, (K - c) / GROUP<E>);
      for (int64_t i = 0; i < some; ++i)
        _mm512_storeu_ps(tile + (c / GROUP<E> + i) * step * GROUP<E>, block[i]);
    }
  }
}

// --- Products --------------------------------------------------------------------------

// N rows of a weight from n on, `stride` apart: where they lie, or copied to `memory` where they
// would oust each other from the cache.
template <typename E>
const E* rows_of(const Weight& weight, int64_t n, std::vector<E>& memory, int64_t& stride) {
  const int64_t K = weight.columns;
  const E* rows = static_cast<const E*>(weight.data) + n * K;
  stride = K;
  if (K * sizeof(E) % 4096 != 0) return rows;
  stride = K + 2 * LANES;
  E* copied = aligned(memory, N * stride);
  for (int64_t r = 0; r < N; ++r) std::copy(rows + r * K, rows + (r + 1) * K, copied + r * stride);
  return copied;
}

// Sums of V vectors of tokens for N rows of a weight, and last the bias, whose size would cost the
// smaller ones digits.
template <int V, typename E>
inline __attribute__((always_inline)) void sums_of(
    const E* rows, int64_t stride, const float* bias, const E* tile, int64_t K,
    __m512 (&sums)[N][V]) {
  const auto start = [&](int r) { return _mm512_set1_ps(bias ? bias[r] : 0.0f); };
  if (K <= CHAIN) {
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_ps();
    products<N, V>(rows, stride, tile, K / GROUP<E>, sums);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = _mm512_add_ps(sums[r][v], start(r));
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = start(r);
  for (int64_t k = 0; k < K; k += CHAIN) {
    __m512 part[N][V] = {};
    products<N, V>(
        rows + k, stride, tile + k * V * LANES, std::min(CHAIN, K - k) / GROUP<E>, part);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = _mm512_add_ps(sums[r][v], part[r][v]);
  }
}

// Calls finish(n, first, sums) with the sums of N rows of the weight from n on, of those from
// `begin` to `end`, for the vectors of each tile of tokens, that from `first` on.
template <typename E, typename Finish>
void multiply(
    const Weight& weight, int64_t begin, int64_t end, const E* tiles, int64_t count,
    const Finish& finish) {
  static thread_local std::vector<E> memory;
  const int64_t K = weight.columns;
  for (int64_t n = begin; n < end; n += N) {
    int64_t stride;
    const E* rows = rows_of(weight, n, memory, stride);
    const float* bias = weight.bias.data ? weight.bias.floats() + n : nullptr;
    for (int64_t first = 0; first < count; first += TILE)
      with_vectors<VECTORS>(tiles_of(count - first, LANES), [&](auto V) {
        __m512 sums[N][V];
        sums_of<V>(rows, stride, bias, tiles + first * K, K, sums);
        finish(n, first, sums);
      });
  }
}

// --- Out of it -------------------------------------------------------------------------

inline void write8(void* data, int32_t half, int64_t at, __m256 value) {
  if (!half) return _mm256_storeu_ps(static_cast<float*>(data) + at, value);
  uint16_t* to = static_cast<uint16_t*>(data) + at;
#if defined(__AVX512BF16__)
  _mm_storeu_si128((__m128i*)to, (__m128i)_mm256_cvtneps_pbh(value));
#else  // to the nearest, ties to even
  uint32_t bits[8];
  std::memcpy(bits, &value, sizeof bits);
  for (int i = 0; i < 8; ++i) {
    const bool number = (bits[i] & 0x7fffffff) <= 0x7f800000;
    to[i] = number ? (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16 : 0x7fc0;
  }
#endif
}

inline __m256 upper_half(__m512 x) {  // AVX512F has it of doubles alone
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
}

inline __m256 read8(const Rows& rows, int64_t row, int64_t c) {
  const int64_t at = row * rows.stride + c;
  if (!rows.half) return _mm256_loadu_ps(static_cast<const float*>(rows.data) + at);
  const uint16_t* from = static_cast<const uint16_t*>(rows.data) + at;
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// 8 channels from c on of up to 16 tokens from `token` on, turned round to rows of `width`.
inline __attribute__((always_inline)) void write(
    const Result& y, int64_t width, int64_t token, int64_t count, int64_t c, const __m512 (&x)[N]) {
  __m512 quads[2][4];  // 4 channels of tokens j, 4 + j, 8 + j, 12 + j
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = _mm512_unpacklo_ps(x[4 * i], x[4 * i + 1]);
    const __m512 b = _mm512_unpackhi_ps(x[4 * i], x[4 * i + 1]);
    const __m512 c = _mm512_unpacklo_ps(x[4 * i + 2], x[4 * i + 3]);
    const __m512 d = _mm512_unpackhi_ps(x[4 * i + 2], x[4 * i + 3]);
    quads[i][0] = _mm512_shuffle_ps(a, c, 0x44), quads[i][1] = _mm512_shuffle_ps(a, c, 0xee);
    quads[i][2] = _mm512_shuffle_ps(b, d, 0x44), quads[i][3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  const auto put = [&](int64_t l, __m256 value) {
    if (l >= count) return;
    if (y.scale.data)
      value = _mm256_mul_ps(value, _mm256_set1_ps(y.scale.floats()[(token + l) / y.clip]));
    if (y.residual.data) value = _mm256_add_ps(read8(y.residual, token + l, c), value);
    write8(y.data, y.half, (token + l) * width + c, value);
  };
  const __m512i near = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i far = _mm512_add_epi32(near, _mm512_set1_epi32(8));
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_permutex2var_ps(quads[0][j], near, quads[1][j]);
    const __m512 high = _mm512_permutex2var_ps(quads[0][j], far, quads[1][j]);
    put(j, _mm512_castps512_ps256(low));
    put(4 + j, upper_half(low));
    put(8 + j, _mm512_castps512_ps256(high));
    put(12 + j, upper_half(high));
  }
}

// What `multiply` is to do with sums that are y's.
struct IntoRows {
  const Result& y;
  int64_t width, token, count;

  template <int V>
  void operator()(int64_t n, int64_t first, const __m512 (&sums)[N][V]) const {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      __m512 column[N];
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) column[r] = sums[r][v];
      const int64_t at = first + v * LANES;
      write(y, width, token + at, count - at, n, column);
    }
  }
};

#endif

}  // namespace
