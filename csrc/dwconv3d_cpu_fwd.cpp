// Depthwise 3-D convolution on the CPU, and with mirrored taps its gradient with respect to x.
//
//   y[b,t,h,w,c] = bias[c] + sum_{i,j,k} weight[c,i,j,k] x[b, t+i-kt/2, h+j-kh/2, w+k-kw/2, c]
//
// and, with a residual, plus x itself. Vectors run over channels. N outputs of a row stay in
// registers; the N + kw - 1 elements that they need of a row of x serve N * kw products. Rows are
// runs of N, so that which elements lie outside is known when this is compiled: neither padding nor
// a copy of x is needed.
//
// In bf16, where the processor has products of pairs, two taps along w are one instruction. Vectors
// are then of 32 channels, whose pairs of neighbours come out in two halves.

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

#include "dwconv3d_cpu.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PAIRS_OF_BF16
#endif

namespace {

constexpr int64_t ROWS = 8;  // of outputs that one thread does in one go

// Outputs of a run, at most: there are 32 registers, or 16. Pairs take two for each.
#if defined(__AVX512F__)
constexpr int64_t LONGEST = 14;
#else
constexpr int64_t LONGEST = 8;
#endif
template <int N>
constexpr bool IN_LONG_ROWS = N == 5 || N > 6;  // or as a whole row alone

struct Job {
  Tensor x;
  const void *weight, *bias;
  void* y;
  Shape shape;
  int64_t kt, kh, kw;
  int dtype, weight_dtype, run;
  bool mirror, residual, pairs;
  float* packed;  // see pack_weight, pack_pairs
};

// The taps of channel c, mirrored where they are to be, and its bias.
template <typename scalar>
struct Channel {
  const scalar *first, *bias;
  int64_t step;

  Channel(const Job& job, int64_t c) {
    const int64_t taps = job.kt * job.kh * job.kw;
    first = static_cast<const scalar*>(job.weight) + c * taps + (job.mirror ? taps - 1 : 0);
    bias = job.bias ? static_cast<const scalar*>(job.bias) + c : nullptr;
    step = job.mirror ? -1 : 1;
  }
  float operator[](int64_t tap) const { return float(first[tap * step]); }
  float shift() const { return bias ? float(*bias) : 0.0f; }
};

// To (C / LANES, taps + 1, LANES), the bias last.
template <typename scalar>
void pack_weight(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  const int64_t taps = job.kt * job.kh * job.kw;
  for (int64_t c = begin * LANES; c < end * LANES; ++c) {
    const Channel<scalar> channel(job, c);
    float* out = job.packed + c / LANES * (taps + 1) * LANES + c % LANES;
    for (int64_t tap = 0; tap < taps; ++tap) out[tap * LANES] = channel[tap];
    out[taps * LANES] = channel.shift();
  }
}

// Whether taps are taken in pairs.
bool in_pairs([[maybe_unused]] int dtype, [[maybe_unused]] int64_t channels) {
#if defined(PAIRS_OF_BF16)
  return dtype == 2 && channels % 32 == 0;
#else
  return false;
#endif
}

// One row of taps on a run of outputs. There is no x to the left of a LEFT run, nor to the right of
// a RIGHT one.
template <typename scalar, int KW, int N, bool LEFT, bool RIGHT>
inline __attribute__((always_inline)) void row(
    const scalar* x, int64_t step, const float* weight, vec (&sum)[N]) {
  vec taps[KW];
#pragma GCC unroll 16
  for (int k = 0; k < KW; ++k) taps[k] = load(weight + k * LANES);
#pragma GCC unroll 32
  for (int m = LEFT ? KW / 2 : 0; m < N + KW - 1 - (RIGHT ? KW / 2 : 0); ++m) {
    const vec value = load(x + (m - KW / 2) * step);
#pragma GCC unroll 16
    for (int k = 0; k < KW; ++k)
      if (m - k >= 0 && m - k < N) sum[m - k] += taps[k] * value;
  }
}

// A run of outputs from x and y on. i and j: which taps along t and h meet a frame, a row.
template <typename scalar, int KW, int N, bool LEFT, bool RIGHT>
void outputs(
    const Job& job, const scalar* x, const float* weight, const int64_t (&i)[2],
    const int64_t (&j)[2], scalar* y) {
  const int64_t *stride = job.x.stride, slice = job.kh * KW * LANES;
  const float* bias = weight + job.kt * slice;
  vec sum[N];
  for (int n = 0; n < N; ++n) sum[n] = load(bias);
  for (int64_t t = i[0]; t < i[1]; ++t) {
    const scalar* frame = x + (t - job.kt / 2) * stride[1];
    for (int64_t h = j[0]; h < j[1]; ++h)
      row<scalar, KW, N, LEFT, RIGHT>(
          frame + (h - job.kh / 2) * stride[2], stride[3], weight + t * slice + h * KW * LANES, sum);
  }
  if (job.residual)
    for (int n = 0; n < N; ++n) sum[n] += load(x + n * stride[3]);
  for (int n = 0; n < N; ++n) store(y + n * job.shape.c, sum[n]);
}

// --- Pairs of bf16 ---------------------------------------------------------------------

#if defined(PAIRS_OF_BF16)

constexpr int64_t WIDE = 2 * LANES;  // channels

// Where the halves of a vector of WIDE channels have channel c: in half c / 4 % 2, and there
int64_t lane_of(int64_t c) { return c / 8 * 4 + c % 4; }

int64_t pairs_of(int64_t kw) { return (kw + 1) / 2; }

// To (C / WIDE, kt * kh * pairs + 1, 2, LANES) pairs of taps along w, the odd one with a zero; last
// the bias in fp32.
template <typename scalar>
void pack_pairs(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  const int64_t pairs = pairs_of(job.kw), rows = job.kt * job.kh;
  for (int64_t c = begin * WIDE; c < end * WIDE; ++c) {
    const Channel<scalar> channel(job, c);
    const int64_t at = c % WIDE;
    float* out = job.packed + c / WIDE * (rows * pairs + 1) * WIDE;
    out += at / 4 % 2 * LANES + lane_of(at);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < job.kw; k += 2, out += WIDE) {
        const float even = channel[row * job.kw + k];
        const float odd = k + 1 < job.kw ? channel[row * job.kw + k + 1] : 0.0f;
        const __m128bh both = _mm_cvtneps_pbh(_mm_setr_ps(even, odd, 0.0f, 0.0f));
        std::memcpy(out, &both, sizeof(float));
      }
    *out = channel.shift();
  }
}

template <int N>
struct Halves {
  __m512 low[N], high[N];

  // Those of output n and the neighbours a and b, times a pair of taps.
  inline __attribute__((always_inline)) void add(
      int n, __m512i low_pair, __m512i high_pair, const float* taps) {
    low[n] = _mm512_dpbf16_ps(low[n], (__m512bh)low_pair, (__m512bh)_mm512_loadu_ps(taps));
    high[n] = _mm512_dpbf16_ps(
        high[n], (__m512bh)high_pair, (__m512bh)_mm512_loadu_ps(taps + LANES));
  }
};

// As `row`.
template <int KW, int N, bool LEFT, bool RIGHT>
inline __attribute__((always_inline)) void row_of_pairs(
    const bfloat16* x, int64_t step, const float* weight, Halves<N>& sum) {
  constexpr int FIRST = LEFT ? KW / 2 : 0, END = N + KW - 1 - (RIGHT ? KW / 2 : 0);
  const __m512i zero = _mm512_setzero_si512();
  const auto at = [&](int m) __attribute__((always_inline)) {
    return m < FIRST || m >= END ? zero : _mm512_loadu_si512(x + (m - KW / 2) * step);
  };
  __m512i here = at(0);
#pragma GCC unroll 16
  for (int m = 0; m < N + KW - 1; ++m) {
    const __m512i next = at(m + 1);
    if (m + 1 >= FIRST && m < END && m < N + KW - 3) {
      const __m512i low = _mm512_unpacklo_epi16(here, next);
      const __m512i high = _mm512_unpackhi_epi16(here, next);
#pragma GCC unroll 8
      for (int k = 0; k + 1 < KW; k += 2)
        if (m - k >= 0 && m - k < N) sum.add(m - k, low, high, weight + k / 2 * WIDE);
    }
    const int n = m - (KW - 1);  // the output that this is the last for
    if (n >= 0 && m >= FIRST && m < END)
      sum.add(n, _mm512_unpacklo_epi16(here, zero), _mm512_unpackhi_epi16(here, zero),
              weight + KW / 2 * WIDE);
    here = next;
  }
}

// As `outputs`.
template <int KW, int N, bool LEFT, bool RIGHT>
void outputs_of_pairs(
    const Job& job, const bfloat16* x, const float* weight, const int64_t (&i)[2],
    const int64_t (&j)[2], bfloat16* y) {
  const int64_t *stride = job.x.stride, slice = (KW + 1) / 2 * WIDE;
  const float* bias = weight + job.kt * job.kh * slice;
  Halves<N> sum;
  for (int n = 0; n < N; ++n) {
    sum.low[n] = _mm512_loadu_ps(bias);
    sum.high[n] = _mm512_loadu_ps(bias + LANES);
  }
  for (int64_t t = i[0]; t < i[1]; ++t) {
    const bfloat16* frame = x + (t - job.kt / 2) * stride[1];
    for (int64_t h = j[0]; h < j[1]; ++h)
      row_of_pairs<KW, N, LEFT, RIGHT>(
          frame + (h - job.kh / 2) * stride[2], stride[3], weight + (t * job.kh + h) * slice, sum);
  }
  const __m512i zero = _mm512_setzero_si512();
  const __m512i order = _mm512_inserti64x4(  // from both halves to the channels' own
      _mm512_castsi256_si512(_mm256_setr_epi16(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23)),
      _mm256_setr_epi16(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31), 1);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    __m512 low = sum.low[n], high = sum.high[n];
    if (job.residual) {
      const __m512i value = _mm512_loadu_si512(x + n * stride[3]);
      low = _mm512_add_ps(low, (__m512)_mm512_unpacklo_epi16(zero, value));
      high = _mm512_add_ps(high, (__m512)_mm512_unpackhi_epi16(zero, value));
    }
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(y + n * job.shape.c, _mm512_permutexvar_epi16(order, both));
  }
}

#endif

// --- Both ------------------------------------------------------------------------------

// How a run of outputs is made: WIDTH channels at a time.
template <typename scalar, int KW, int N>
struct Singles {
  static constexpr int64_t WIDTH = LANES;
  static int64_t slab(const Job& job) { return (job.kt * job.kh * KW + 1) * LANES; }

  template <bool LEFT, bool RIGHT, typename... Arguments>
  static void make(const Arguments&... arguments) {
    outputs<scalar, KW, N, LEFT, RIGHT>(arguments...);
  }
};

#if defined(PAIRS_OF_BF16)

template <int KW, int N>
struct Pairs {
  static constexpr int64_t WIDTH = WIDE;
  static int64_t slab(const Job& job) { return (job.kt * job.kh * ((KW + 1) / 2) + 1) * WIDE; }

  template <bool LEFT, bool RIGHT, typename... Arguments>
  static void make(const Arguments&... arguments) {
    outputs_of_pairs<KW, N, LEFT, RIGHT>(arguments...);
  }
};

#endif

template <typename How, typename scalar, int KW, int N>
void rows(const Job& job, int64_t index) {
  const Shape& shape = job.shape;
  const int64_t groups = tiles_of(shape.h, ROWS), *stride = job.x.stride;
  const int64_t h0 = index % groups * ROWS, h1 = std::min(h0 + ROWS, shape.h);
  const int64_t t = index / groups % shape.t, b = index / groups / shape.t;
  const int64_t i[2] = {std::max<int64_t>(job.kt / 2 - t, 0),
                        std::min(job.kt, shape.t + job.kt / 2 - t)};
  const scalar* frame = static_cast<const scalar*>(job.x.data) + b * stride[0] + t * stride[1];
  for (int64_t c = 0; c < shape.c; c += How::WIDTH) {
    const float* weight = job.packed + c / How::WIDTH * How::slab(job);
    for (int64_t h = h0; h < h1; ++h) {
      const int64_t j[2] = {std::max<int64_t>(job.kh / 2 - h, 0),
                            std::min(job.kh, shape.h + job.kh / 2 - h)};
      const scalar* x = frame + h * stride[2] + c;
      scalar* y = static_cast<scalar*>(job.y) + c +
                  ((b * shape.t + t) * shape.h + h) * shape.w * shape.c;
      const auto at = [&](int64_t w) { return x + w * stride[3]; };
      if (shape.w == N) {
        How::template make<true, true>(job, x, weight, i, j, y);
        continue;
      }
      if constexpr (IN_LONG_ROWS<N>) {
        const int64_t last = shape.w - N, inner = last - KW / 2;  // runs may overlap at the end
        How::template make<true, false>(job, x, weight, i, j, y);
        for (int64_t w = N; w < last; w += N) {
          const int64_t from = std::min(w, inner);
          How::template make<false, false>(job, at(from), weight, i, j, y + from * shape.c);
        }
        How::template make<false, true>(job, at(last), weight, i, j, y + last * shape.c);
      }
    }
  }
}

template <typename scalar, int KW, int N>
void rows_of(const Job& job, int64_t index) {
#if defined(PAIRS_OF_BF16)
  if constexpr (N <= 8 && std::is_same_v<scalar, bfloat16>)
    if (job.pairs) return rows<Pairs<KW, N>, scalar, KW, N>(job, index);
#endif
  rows<Singles<scalar, KW, N>, scalar, KW, N>(job, index);
}

template <typename scalar, int KW>
void rows_of(const Job& job, int64_t index) {
  switch (job.run) {
#if defined(__AVX512F__)
    case 14: return rows_of<scalar, KW, 14>(job, index);
#endif
    case 8: return rows_of<scalar, KW, 8>(job, index);
    case 7: return rows_of<scalar, KW, 7>(job, index);
    case 6: return rows_of<scalar, KW, 6>(job, index);
    case 5: return rows_of<scalar, KW, 5>(job, index);
    case 4: return rows_of<scalar, KW, 4>(job, index);
    case 3: return rows_of<scalar, KW, 3>(job, index);
    case 2: return rows_of<scalar, KW, 2>(job, index);
    case 1: return rows_of<scalar, KW, 1>(job, index);
  }
}

template <typename scalar>
void rows_of(const Job& job, int64_t index) {
  job.kw == 3 ? rows_of<scalar, 3>(job, index) : rows_of<scalar, 5>(job, index);
}

void run(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  for (int64_t index = begin; index < end; ++index) switch (job.dtype) {
      case 0: rows_of<float>(job, index); break;
      case 1: rows_of<_Float16>(job, index); break;
      case 2: rows_of<bfloat16>(job, index); break;
    }
}

// Outputs of a run in rows of `width`: those with which the fewest are made, of these the longest.
int run_of(int64_t width, int64_t kw, bool pairs) {
  if (width <= 8) return int(width);
  int64_t best = 0, least = 0;
  for (int64_t run : {14, 8, 7, 5}) {
    const bool fits = width == run || width >= run + kw / 2;
    if (run > (pairs ? 8 : LONGEST) || !fits) continue;
    const int64_t made = tiles_of(width, run) * run;
    if (best == 0 || made < least) best = run, least = made;
  }
  return int(best);
}

}  // namespace

// Whether `uniformer_dwconv3d_fwd` serves rows of `w` elements of `c` channels, `kw` taps wide, of
// `dtype`. In fp32 it takes AVX-512: without, PyTorch's own is 3 to 5 times as fast as this one.
extern "C" int32_t uniformer_dwconv3d_fwd_serves(
    int64_t w, int64_t c, int64_t kw, int32_t dtype) {
  if (dtype < 0 || dtype > 2 || (dtype == 0 && LANES < 16)) return false;
  return w > 0 && c % LANES == 0 && (kw == 3 || kw == 5);
}

// x: (B, T, H, W, C), channels side by side; weight (C, kt, kh, kw) and bias (C), or null, both
// contiguous and of one dtype: 0 fp32, 1 fp16, 2 bf16. y, contiguous, of x's dtype, is written.
// shape {B, T, H, W, C}, kernel {kt, kh, kw}, each odd. Returns 0, 1 where memory ran out, 2 for
// arguments that it does not serve.
extern "C" int32_t uniformer_dwconv3d_fwd(
    const void* x, const int64_t* stride_x, const void* weight, const void* bias, void* y,
    const int64_t* shape, const int64_t* kernel, int32_t dtype, int32_t weight_dtype,
    int32_t mirror, int32_t residual, ParallelFor parallel_for) {
  const Shape size = {shape[0], shape[1], shape[2], shape[3], shape[4]};
  if (!uniformer_dwconv3d_fwd_serves(size.w, size.c, kernel[2], dtype) || stride_x[4] != 1) return 2;
  if (weight_dtype < 0 || weight_dtype > 2) return 2;
  static thread_local std::vector<float> packed;
  const int64_t taps = kernel[0] * kernel[1] * kernel[2];
  try {
    packed.resize(size.c * (taps + 1));  // for pairs, more than enough
  } catch (const std::bad_alloc&) {
    return 1;
  }
  const bool pairs = in_pairs(dtype, size.c);
  Job job = {{x, stride_x}, weight, bias, y, size, kernel[0], kernel[1], kernel[2], dtype,
             weight_dtype, run_of(size.w, kernel[2], pairs), mirror != 0, residual != 0, pairs,
             packed.data()};
  const int64_t items = size.b * size.t * tiles_of(size.h, ROWS);
  const Body singles[] = {pack_weight<float>, pack_weight<_Float16>, pack_weight<bfloat16>};
  Body pack = singles[weight_dtype];
#if defined(PAIRS_OF_BF16)
  const Body in_pairs[] = {pack_pairs<float>, pack_pairs<_Float16>, pack_pairs<bfloat16>};
  pack = pairs ? in_pairs[weight_dtype] : pack;
#endif
  return parallel_for(0, size.c / (pairs ? 2 * LANES : LANES), pairs ? 4 : 8, pack, &job) ||
         parallel_for(0, items, 1, run, &job);
}
