// Gradients of a depthwise 3-D convolution with respect to its weight and bias, on the CPU.
//
//   dweight[i,j,k,c] = sum_{b,t,h,w} dy[b,t,h,w,c] x[b, t+i-kt/2, h+j-kh/2, w+k-kw/2, c]
//   dbias[c]         = sum_{b,t,h,w} dy[b,t,h,w,c]
//
// Vectors run over channels. A tile of x with its halo, and of dy, is packed to (t, h, w, LANES)
// in fp32, zeros where there is no x; from then on there are no edges, types and strides. Rows of
// dy then slide along rows of x: kh x kw sums stay in registers, and WIDE elements of dy meet each
// element of x that is loaded.
//
// Tiles do not depend on the number of threads, each sums on its own, and their sums are added in
// one order: the result is the same every time.
//
// Plain C++ behind a C interface: it needs no header of PyTorch, whose threads come as a pointer.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int SUMS = 25;  // of 32 registers: with 4 of dy and 1 of x that leaves 2
#else
constexpr int LANES = 8;
constexpr int SUMS = 10;  // of 16 registers
#endif
constexpr int64_t FLUSH = 2;  // rows between additions to the tile's sums: short sums round less
constexpr int WIDE = 4;  // elements of dy a step; 4 of dy and 8 of x serve 20 products a row

// Frames, rows and columns of a tile. Packing costs as much as about 3 taps, half of it for the
// halo; larger tiles leave the second-level cache.
constexpr int64_t TILE_T = 8, TILE_H = 28, TILE_W = 64;

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

struct bfloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

struct Shape {
  int64_t b, t, h, w, c;
};

struct Tensor {
  const void* data;
  const int64_t* stride;  // of b, t, h, w, c, in elements
};

typedef void (*Body)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// --- Packing ---------------------------------------------------------------------------

// Box of `source` from (t, h, w) on, `size` large, channels c to c + LANES -> `out`; zeros outside.
template <typename scalar>
void pack(const Tensor& source, const Shape& shape, Shape at, Shape size, float* out) {
  const scalar* data = static_cast<const scalar*>(source.data);
  const int64_t* stride = source.stride;
  const int64_t lanes = std::min<int64_t>(LANES, shape.c - at.c);
  for (int64_t t = at.t; t < at.t + size.t; ++t)
    for (int64_t h = at.h; h < at.h + size.h; ++h) {
      const bool inside = t >= 0 && t < shape.t && h >= 0 && h < shape.h;
      const int64_t first = inside ? std::clamp<int64_t>(-at.w, 0, size.w) : size.w;
      const int64_t last = inside ? std::clamp<int64_t>(shape.w - at.w, first, size.w) : size.w;
      std::fill(out, out + first * LANES, 0.0f);
      const scalar* row = inside ? data + at.b * stride[0] + t * stride[1] + h * stride[2] +
                                       (at.w + first) * stride[3] + at.c * stride[4]
                                 : data;
      for (int64_t w = first; w < last; ++w, row += stride[3]) {
        float* pixel = out + w * LANES;
        if (lanes == LANES && stride[4] == 1) {
          for (int l = 0; l < LANES; ++l) pixel[l] = float(row[l]);
        } else {
          for (int64_t l = 0; l < LANES; ++l)
            pixel[l] = l < lanes ? float(row[l * stride[4]]) : 0.0f;
        }
      }
      std::fill(out + last * LANES, out + size.w * LANES, 0.0f);
      out += size.w * LANES;
    }
}

// --- Sums ------------------------------------------------------------------------------

inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void add(float* to, vec value) {
  value += load(to);
  std::memcpy(to, &value, sizeof value);
}

// N elements of dy from `dy` on against ROWS rows of x.
template <int ROWS, int KW, int N>
inline __attribute__((always_inline)) void step(
    const float* x, int64_t x_row, const float* dy, vec (&sum)[ROWS][KW]) {
  vec d[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) d[n] = load(dy + n * LANES);
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 16
    for (int m = 0; m < N + KW - 1; ++m) {
      const vec value = load(x + j * x_row + m * LANES);
#pragma GCC unroll 16
      for (int k = 0; k < KW; ++k)
        if (m - k >= 0 && m - k < N) sum[j][k] += d[m - k] * value;
    }
}

// A plane of dy (height, width) against the plane of x below it, ROWS rows of taps at a time.
template <int ROWS, int KW>
void plane(
    const float* x, int64_t x_row, const float* dy, int64_t height, int64_t width, float* dw) {
  for (int64_t h = 0; h < height;) {
    vec sum[ROWS][KW] = {};
    for (const int64_t end = std::min(h + FLUSH, height); h < end; ++h) {
      const float *xs = x + h * x_row, *ds = dy + h * width * LANES;
      int64_t w = 0;
      for (; w + WIDE <= width; w += WIDE)
        step<ROWS, KW, WIDE>(xs + w * LANES, x_row, ds + w * LANES, sum);
      for (; w < width; ++w) step<ROWS, KW, 1>(xs + w * LANES, x_row, ds + w * LANES, sum);
    }
    for (int j = 0; j < ROWS; ++j)
      for (int k = 0; k < KW; ++k) add(dw + (j * KW + k) * LANES, sum[j][k]);
  }
}

template <int KW>
void planes(
    int64_t kh, const float* x, int64_t x_row, const float* dy, int64_t height, int64_t width,
    float* dw) {
  for (int64_t j = 0; j < kh;) {
    const float* xs = x + j * x_row;
    float* out = dw + j * KW * LANES;
    if (5 * KW <= SUMS && kh - j >= 5) {
      plane<5 * KW <= SUMS ? 5 : 1, KW>(xs, x_row, dy, height, width, out);
      j += 5;
    } else if (3 * KW <= SUMS && kh - j >= 3) {
      plane<3 * KW <= SUMS ? 3 : 1, KW>(xs, x_row, dy, height, width, out);
      j += 3;
    } else if (2 * KW <= SUMS && kh - j >= 2) {
      plane<2 * KW <= SUMS ? 2 : 1, KW>(xs, x_row, dy, height, width, out);
      j += 2;
    } else {
      plane<1, KW>(xs, x_row, dy, height, width, out);
      j += 1;
    }
  }
}

// --- Tiles -----------------------------------------------------------------------------

struct Job {
  Tensor x, dy;
  Shape shape;
  int64_t kt, kh, kw;
  int dtype;
  Shape tiles;    // how many along each axis; of c, blocks of LANES channels
  float* sums;    // (tiles, taps + 1, LANES): of the weight, and last of the bias
  bool failed;
};

template <typename scalar>
void tile(const Job& job, int64_t index, std::vector<float>& scratch) {
  const Shape& n = job.tiles;
  Shape at;
  int64_t rest = index;
  at.c = rest % n.c * LANES, rest /= n.c;
  at.w = rest % n.w * TILE_W, rest /= n.w;
  at.h = rest % n.h * TILE_H, rest /= n.h;
  at.t = rest % n.t * TILE_T, rest /= n.t;
  at.b = rest;

  Shape size = {1, std::min(TILE_T, job.shape.t - at.t), std::min(TILE_H, job.shape.h - at.h),
                std::min(TILE_W, job.shape.w - at.w), LANES};
  Shape with_halo = {1, size.t + job.kt - 1, size.h + job.kh - 1, size.w + job.kw - 1, LANES};
  Shape corner = {at.b, at.t - job.kt / 2, at.h - job.kh / 2, at.w - job.kw / 2, at.c};
  const int64_t pixels = size.t * size.h * size.w;
  const int64_t x_row = with_halo.w * LANES, x_plane = with_halo.h * x_row;
  scratch.resize(with_halo.t * x_plane + pixels * LANES);
  float *x = scratch.data(), *dy = x + with_halo.t * x_plane;
  pack<scalar>(job.x, job.shape, corner, with_halo, x);
  pack<scalar>(job.dy, job.shape, at, size, dy);

  const int64_t slice = job.kh * job.kw * LANES;
  float* out = job.sums + index * (job.kt * slice + LANES);
  for (int64_t t = 0; t < size.t; ++t)
    for (int64_t i = 0; i < job.kt; ++i) {
      const int64_t frame = corner.t + t + i;
      if (frame < 0 || frame >= job.shape.t) continue;
      const float *xs = x + (t + i) * x_plane, *ds = dy + t * size.h * size.w * LANES;
      float* to = out + i * slice;
      switch (job.kw) {
        case 1: planes<1>(job.kh, xs, x_row, ds, size.h, size.w, to); break;
        case 3: planes<3>(job.kh, xs, x_row, ds, size.h, size.w, to); break;
        case 5: planes<5>(job.kh, xs, x_row, ds, size.h, size.w, to); break;
        case 7: planes<7>(job.kh, xs, x_row, ds, size.h, size.w, to); break;
        case 9: planes<9>(job.kh, xs, x_row, ds, size.h, size.w, to); break;
      }
    }
  for (int64_t row = 0; row < size.t * size.h; ++row) {
    vec sum = {};
    for (int64_t w = 0; w < size.w; ++w) sum += load(dy + (row * size.w + w) * LANES);
    add(out + job.kt * slice, sum);
  }
}

void run(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  try {
    std::vector<float> scratch;
    for (int64_t i = begin; i < end; ++i) switch (job.dtype) {
        case 0: tile<float>(job, i, scratch); break;
        case 1: tile<_Float16>(job, i, scratch); break;
        case 2: tile<bfloat16>(job, i, scratch); break;
      }
  } catch (const std::bad_alloc&) {
    job.failed = true;
  }
}

int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

}  // namespace

// x, dy: (B, T, H, W, C) of any strides, dtype 0 fp32, 1 fp16, 2 bf16. shape {B, T, H, W, C}, kernel
// {kt, kh, kw}, each odd and kw at most 9. grads, fp32, (kt * kh * kw + 1, C), last the bias, is
// written. Returns 0, 1 where memory ran out, 2 for arguments that are none of these.
extern "C" int32_t uniformer_dwconv3d_bwd_weight(
    const void* x, const int64_t* stride_x, const void* dy, const int64_t* stride_dy,
    const int64_t* shape, const int64_t* kernel, int32_t dtype, float* grads,
    ParallelFor parallel_for) {
  const int64_t kt = kernel[0], kh = kernel[1], kw = kernel[2], taps = kt * kh * kw;
  if (dtype < 0 || dtype > 2 || kw % 2 == 0 || kw > 9) return 2;
  const Shape size = {shape[0], shape[1], shape[2], shape[3], shape[4]};
  const Shape tiles = {size.b, tiles_of(size.t, TILE_T), tiles_of(size.h, TILE_H),
                       tiles_of(size.w, TILE_W), tiles_of(size.c, LANES)};
  const int64_t count = tiles.b * tiles.t * tiles.h * tiles.w * tiles.c;
  const int64_t slab = (taps + 1) * LANES;
  try {
    std::vector<float> sums(count * slab, 0.0f);
    Job job = {{x, stride_x}, {dy, stride_dy}, size, kt, kh, kw, dtype, tiles, sums.data(), false};
    if (parallel_for(0, count, 1, run, &job) != 0 || job.failed) return 1;
    for (int64_t c = 0; c < size.c; ++c)
      for (int64_t tap = 0; tap <= taps; ++tap) {
        double sum = 0;
        for (int64_t i = c / LANES; i < count; i += tiles.c)
          sum += sums[i * slab + tap * LANES + c % LANES];
        grads[tap * size.c + c] = float(sum);
      }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
