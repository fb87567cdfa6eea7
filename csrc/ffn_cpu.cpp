// The FFN on the CPU, with the norm before it, drop path and residual behind.
//
//   y = x + scale * (GELU(norm(x) W1^T + b1) W2^T + b2)
//
// The hidden layer of a chunk of tokens stays in the cache. The exact GELU is made of sums that are
// still in registers, by polynomials, where PyTorch's takes a pass of its own and an exponential.
// Backward the library makes the products; GELU and its gradient are here, in one pass.

#include "tokens_cpu.h"

namespace {

#if defined(__AVX512F__)

struct Job : FFN {
  float eps;
  void *tiles, *hidden;  // of all tokens, where there are few
  bool full;             // memory
};

// Phi(a) - 1/2 of the normal distribution for a >= 0, in pieces WIDTH wide: around each multiple of
// it a polynomial, and in the last piece, where it is within 3e-8 of that, 1/2. A vector holds a
// coefficient of all pieces, so that one instruction looks up those of 16 numbers.
constexpr float WIDTH = 0.375f;

struct HalfNormal {
  alignas(64) float coefficients[5][LANES] = {};  // of t^k, t from -1/2 to 1/2

  HalfNormal() {
    for (int piece = 0; piece < LANES - 1; ++piece) {
      const double c = piece * double(WIDTH), density = std::exp(-c * c / 2) / std::sqrt(2 * M_PI);
      const double derivatives[] = {
          std::erf(c / std::sqrt(2)) / 2, density, -c * density, (c * c - 1) * density,
          (3 * c - c * c * c) * density, (3 - 6 * c * c + c * c * c * c) * density,
          (10 * c * c * c - std::pow(c, 5) - 15 * c) * density};
      double x[7], half = 1;  // Taylor's, of x = 2 t
      for (int k = 0; k < 7; half *= WIDTH / 2 / ++k) x[k] = derivatives[k] * half;
      // The last two as Chebyshev has them: x^5 and x^6 within 1/16 and 1/32 by lower powers.
      x[1] -= x[5] * 5 / 16, x[3] += x[5] * 20 / 16;
      x[0] += x[6] / 32, x[2] -= x[6] * 18 / 32, x[4] += x[6] * 48 / 32;
      for (int k = 0; k < 5; ++k) coefficients[k][piece] = x[k] * (1 << k);
    }
    coefficients[0][LANES - 1] = 0.5f;
  }

  // To 1.6e-7; NaN stays.
  __m512 operator()(__m512 a) const {
    const __m512 pieces = _mm512_set1_ps(1 / WIDTH), to_whole = _mm512_set1_ps(0x1.8p23f);
    const __m512 near = _mm512_min_ps(_mm512_set1_ps((LANES - 1) * WIDTH), a);
    const __m512 sum = _mm512_fmadd_ps(near, pieces, to_whole);  // its last bits are the piece
    const __m512 t = _mm512_fmsub_ps(near, pieces, _mm512_sub_ps(sum, to_whole));
    const auto of = [&](int k) {
      return _mm512_permutexvar_ps(_mm512_castps_si512(sum), _mm512_load_ps(coefficients[k]));
    };
    __m512 p = of(4);
    for (int k : {3, 2, 1, 0}) p = _mm512_fmadd_ps(p, t, of(k));
    return p;
  }
};

const HalfNormal half_normal;

// To 4e-7 where |h| < 9; PyTorch's to 1.2e-6.
inline __m512 gelu(__m512 h) {
  const __m512 a = _mm512_abs_ps(h);
  return _mm512_fmadd_ps(a, half_normal(a), _mm512_mul_ps(h, _mm512_set1_ps(0.5f)));
}

// What `multiply` is to do with sums that are the hidden layer's: tiles for the next product.
template <typename E>
struct IntoHidden {
  E* hidden;
  int64_t width;

  template <int V>
  void operator()(int64_t n, int64_t first, const __m512 (&sums)[N][V]) const {
    E* out = hidden + first * width + n * V * LANES;
#pragma GCC unroll 4
    for (int r = 0; r < N; r += 2)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        store_packed(out + (r * V + GROUP<E> * v) * LANES, V * LANES, gelu(sums[r][v]),
                     gelu(sums[r + 1][v]));
  }
};

template <typename E>
void by_tokens(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  static thread_local std::vector<E> memory;
  const int64_t C = job.first.columns, F = job.first.rows;
  const int64_t chunk = chunk_of(end - begin, (C + F) * sizeof(E));
  try {
    E *tiles = aligned(memory, chunk * (C + F)), *hidden = tiles + chunk * C;
    for (int64_t token = begin; token < end; token += chunk) {
      const int64_t count = std::min(chunk, end - token);
      read(job.x, job.norm, job.eps, token, count, C, tiles);
      multiply(job.first, 0, F, tiles, count, IntoHidden<E>{hidden, F});
      multiply(job.second, 0, C, hidden, count, IntoRows{job.y, C, token, count});
    }
  } catch (const std::bad_alloc&) {
    job.full = true;
  }
}

template <typename E>
void first_by_channels(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  try {
    multiply(job.first, begin * N, end * N, static_cast<E*>(job.tiles), job.tokens,
             IntoHidden<E>{static_cast<E*>(job.hidden), job.first.rows});
  } catch (const std::bad_alloc&) {
    job.full = true;
  }
}

template <typename E>
void second_by_channels(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  try {
    multiply(job.second, begin * N, end * N, static_cast<E*>(job.hidden), job.tokens,
             IntoRows{job.y, job.second.rows, 0, job.tokens});
  } catch (const std::bad_alloc&) {
    job.full = true;
  }
}

template <typename E>
int32_t forward(Job& job, ParallelFor parallel_for) {
  if (job.tokens > FEW)
    return parallel_for(0, job.tokens, LANES, by_tokens<E>, &job) || job.full;
  static thread_local std::vector<E> memory;
  const int64_t C = job.first.columns, F = job.first.rows;
  try {
    E* tiles = aligned(memory, FEW * (C + F));
    job.tiles = tiles, job.hidden = tiles + FEW * C;
  } catch (const std::bad_alloc&) {
    return 1;
  }
  read(job.x, job.norm, job.eps, 0, job.tokens, C, static_cast<E*>(job.tiles));
  return parallel_for(0, F / N, 4, first_by_channels<E>, &job) ||
         parallel_for(0, C / N, 4, second_by_channels<E>, &job) || job.full;
}

// --- Backward --------------------------------------------------------------------------

struct Slope {
  void *h, *dh;
};

inline __m512 copysign(__m512 size, __m512 sign) {
  const __m512i bit = _mm512_and_epi32(_mm512_castps_si512(sign), _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(_mm512_or_epi32(_mm512_castps_si512(size), bit));
}

template <typename E>
void slope(int64_t begin, int64_t end, void* context) {
  const Slope& job = *static_cast<Slope*>(context);
  E *h = static_cast<E*>(job.h), *dh = static_cast<E*>(job.dh);
  const __m512 half = _mm512_set1_ps(0.5f), minus_half = _mm512_set1_ps(-0.5f);
  const __m512 peak = _mm512_set1_ps(0.398942280f);
  const auto step = [&](E* at, E* gradient) {
    const __m512 x = load(at), above_half = half_normal(_mm512_abs_ps(x));
    const __m512 phi = _mm512_add_ps(half, copysign(above_half, x));
    const __m512 density = exp(_mm512_mul_ps(_mm512_mul_ps(x, x), minus_half));
    const __m512 rate = _mm512_fmadd_ps(_mm512_mul_ps(x, peak), density, phi);
    store(gradient, _mm512_mul_ps(load(gradient), rate));
    store(at, _mm512_mul_ps(x, phi));
  };
  for (; begin + LANES <= end; begin += LANES) step(h + begin, dh + begin);
  if (begin == end) return;
  E rest[2][LANES] = {};  // fewer than a vector
  std::copy(h + begin, h + end, rest[0]), std::copy(dh + begin, dh + end, rest[1]);
  step(rest[0], rest[1]);
  std::copy(rest[0], rest[0] + (end - begin), h + begin);
  std::copy(rest[1], rest[1] + (end - begin), dh + begin);
}

#endif

}  // namespace

// Whether `uniformer_ffn_fwd` serves a hidden layer of `hidden` channels between two of `channels`:
// in bf16 where `half`, else in fp32.
extern "C" int32_t uniformer_ffn_fwd_serves(int64_t channels, int64_t hidden, int32_t half) {
  return serves({nullptr, hidden, channels, 0, {nullptr, 0}}, half);
}

// Weights (hidden, channels) and (channels, hidden); products in bf16 where `half`, else in fp32;
// `eps` is the norm's. Returns 0, 1 where memory ran out, 2 for what it does not serve.
extern "C" int32_t uniformer_ffn_fwd(
    const FFN* call, [[maybe_unused]] float eps, int32_t half,
    [[maybe_unused]] ParallelFor parallel_for) {
  const Weight &first = call->first, &second = call->second;
  if (!serves(first, half) || !serves(second, half)) return 2;
  if (second.rows != first.columns || second.columns != first.rows) return 2;
#if defined(__AVX512F__)
  try {
    Job job = {*call, eps, nullptr, nullptr, false};
    Parameters parameters;
    parameters.widen(job.norm, first.columns, eps);
    parameters.widen(job.first.bias, first.rows);
    parameters.widen(job.second.bias, second.rows);
    parameters.widen(job.y, job.tokens);
    static thread_local std::vector<uint16_t> memory[2];
    if (cast(job.first, half, memory[0], parallel_for)) return 1;
    if (cast(job.second, half, memory[1], parallel_for)) return 1;
#if defined(__AVX512BF16__)
    if (half) return forward<uint16_t>(job, parallel_for);
#endif
    return forward<float>(job, parallel_for);
  } catch (const std::bad_alloc&) {
    return 1;
  }
#endif
  return 2;
}

// The hidden layer's `size` sums h become GELU(h), and the gradients dh of the latter those of h.
// Both contiguous, in bf16 where `half`, else in fp32. Returns as above.
extern "C" int32_t uniformer_gelu_bwd(
    [[maybe_unused]] void* h, [[maybe_unused]] void* dh, [[maybe_unused]] int64_t size,
    int32_t half, [[maybe_unused]] ParallelFor parallel_for) {
  if (!has_products(half ? 2 : 4)) return 2;
#if defined(__AVX512F__)
  Slope job = {h, dh};
#if defined(__AVX512BF16__)
  if (half) return parallel_for(0, size, 4096, slope<uint16_t>, &job);
#endif
  return parallel_for(0, size, 4096, slope<float>, &job);
#endif
  return 2;
}
