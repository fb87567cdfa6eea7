// Depthwise 3-D convolution on the CPU, and with mirrored taps its gradient with respect to x.
//
//   y[b,t,h,w,c] = bias[c] + sum_{i,j,k} weight[c,i,j,k] x[b, t+i-kt/2, h+j-kh/2, w+k-kw/2, c]
//
// and, with a residual, plus x itself. Vectors run over channels. N outputs of a row stay in
// registers; the N + kw - 1 elements that they need of a row of x serve N * kw products. Rows are
// whole runs of N, so that which elements lie outside is known when this is compiled: neither
// padding nor a copy of x is needed, and no product with a zero is made.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "dwconv3d_cpu.h"

namespace {

constexpr int64_t ROWS = 8;  // of outputs that one thread does in one go

struct Job {
  Tensor x;
  const void *weight, *bias;
  void* y;
  Shape shape;
  int64_t kt, kh, kw;
  int dtype, weight_dtype, run;
  bool mirror, residual;
  float* packed;  // (C / LANES, taps + 1, LANES): the weight, and last the bias
};

float element(const void* data, int dtype, int64_t i) {
  switch (dtype) {
    case 0: return static_cast<const float*>(data)[i];
    case 1: return float(static_cast<const _Float16*>(data)[i]);
    default: return float(static_cast<const bfloat16*>(data)[i]);
  }
}

void pack_weight(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  const int64_t taps = job.kt * job.kh * job.kw;
  for (int64_t c = begin * LANES; c < end * LANES; ++c) {
    float* out = job.packed + c / LANES * (taps + 1) * LANES + c % LANES;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t from = c * taps + (job.mirror ? taps - 1 - tap : tap);
      out[tap * LANES] = element(job.weight, job.weight_dtype, from);
    }
    out[taps * LANES] = job.bias ? element(job.bias, job.weight_dtype, c) : 0.0f;
  }
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

template <typename scalar, int KW, int N>
void rows(const Job& job, int64_t index) {
  const Shape& shape = job.shape;
  const int64_t groups = tiles_of(shape.h, ROWS), *stride = job.x.stride;
  const int64_t h0 = index % groups * ROWS, h1 = std::min(h0 + ROWS, shape.h);
  const int64_t t = index / groups % shape.t, b = index / groups / shape.t;
  const int64_t slab = (job.kt * job.kh * KW + 1) * LANES;
  const int64_t i[2] = {std::max<int64_t>(job.kt / 2 - t, 0),
                        std::min(job.kt, shape.t + job.kt / 2 - t)};
  const scalar* frame = static_cast<const scalar*>(job.x.data) + b * stride[0] + t * stride[1];
  for (int64_t c = 0; c < shape.c; c += LANES) {
    const float* weight = job.packed + c / LANES * slab;
    for (int64_t h = h0; h < h1; ++h) {
      const int64_t j[2] = {std::max<int64_t>(job.kh / 2 - h, 0),
                            std::min(job.kh, shape.h + job.kh / 2 - h)};
      const scalar* x = frame + h * stride[2] + c;
      scalar* y = static_cast<scalar*>(job.y) + c +
                  ((b * shape.t + t) * shape.h + h) * shape.w * shape.c;
      if (shape.w == N) {
        outputs<scalar, KW, N, true, true>(job, x, weight, i, j, y);
        continue;
      }
      outputs<scalar, KW, N, true, false>(job, x, weight, i, j, y);
      int64_t w = N;
      for (; w < shape.w - N; w += N)
        outputs<scalar, KW, N, false, false>(
            job, x + w * stride[3], weight, i, j, y + w * shape.c);
      outputs<scalar, KW, N, false, true>(job, x + w * stride[3], weight, i, j, y + w * shape.c);
    }
  }
}

template <typename scalar, int KW>
void rows_of(const Job& job, int64_t index) {
  switch (job.run) {
#if defined(__AVX512F__)
    case 14: return rows<scalar, KW, 14>(job, index);
    case 10: return rows<scalar, KW, 10>(job, index);
#endif
    case 8: return rows<scalar, KW, 8>(job, index);
    case 7: return rows<scalar, KW, 7>(job, index);
    case 5: return rows<scalar, KW, 5>(job, index);
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

// The longest run of outputs that fills rows of `width`, or 0. Longer ones need 32 registers.
int run_of(int64_t width) {
#if defined(__AVX512F__)
  for (int run : {14, 10, 8, 7, 5})
#else
  for (int run : {8, 7, 5})
#endif
    if (width % run == 0) return run;
  return 0;
}

}  // namespace

// Whether `uniformer_dwconv3d_fwd` serves rows of `w` elements of `c` channels, `kw` taps wide.
extern "C" int32_t uniformer_dwconv3d_fwd_serves(int64_t w, int64_t c, int64_t kw) {
  return c % LANES == 0 && (kw == 3 || kw == 5) && run_of(w) != 0;
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
  if (!uniformer_dwconv3d_fwd_serves(size.w, size.c, kernel[2]) || stride_x[4] != 1) return 2;
  if (dtype < 0 || dtype > 2 || weight_dtype < 0 || weight_dtype > 2) return 2;
  static thread_local std::vector<float> packed;
  const int64_t taps = kernel[0] * kernel[1] * kernel[2];
  try {
    packed.resize(size.c * (taps + 1));
  } catch (const std::bad_alloc&) {
    return 1;
  }
  Job job = {{x, stride_x}, weight, bias, y, size, kernel[0], kernel[1], kernel[2], dtype,
             weight_dtype, run_of(size.w), mirror != 0, residual != 0, packed.data()};
  const int64_t items = size.b * size.t * tiles_of(size.h, ROWS);
  return parallel_for(0, size.c / LANES, 8, pack_weight, &job) ||
         parallel_for(0, items, 1, run, &job);
}
