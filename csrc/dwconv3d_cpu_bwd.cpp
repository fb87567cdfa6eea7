// Gradients of a depthwise 3-D convolution with respect to its weight and bias, on the CPU.
//
//   dweight[i,j,k,c] = sum_{b,t,h,w} dy[b,t,h,w,c] x[b, t+i-kt/2, h+j-kh/2, w+k-kw/2, c]
//   dbias[c]         = sum_{b,t,h,w} dy[b,t,h,w,c]
//
// Vectors run over channels. A tile walks along t: each frame of x, with its halo, and each of dy
// is packed to (block of channels, h, w, LANES) in fp32, zeros where there is no x; the last kt
// frames of x are kept. From then on there are no edges, types and strides. Rows of dy slide along
// rows of x: kh x kw sums stay in registers, and WIDE elements of dy meet each element of x.
//
// Tiles do not depend on the number of threads, each sums on its own, and their sums are added in
// one order: the result is the same every time.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

#include "dwconv3d_cpu.h"

namespace {

#if defined(__AVX512F__)
constexpr int SUMS = 25;  // of 32 registers: with 4 of dy and 1 of x that leaves 2
#else
constexpr int SUMS = 10;  // of 16 registers
#endif
constexpr int64_t SHORT = 64;  // products before a sum goes to the tile's: short sums round less
constexpr int WIDE = 4;  // elements of dy a step; 4 of dy and 8 of x serve 20 products a row

// Blocks of channels, frames, rows and columns of a tile. Packing took longer than the sums when
// one block was packed at a time: it touched all lines of memory for a quarter of each.
constexpr int64_t BLOCKS = 4, TILE_T = 16, TILE_H = 14, TILE_W = 64;

inline void add(float* to, vec value) { store(to, value + load(to)); }

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
  const int64_t rows = std::max<int64_t>(SHORT / width, 1);
  for (int64_t h = 0; h < height;) {
    vec sum[ROWS][KW] = {};
    for (const int64_t end = std::min(h + rows, height); h < end; ++h) {
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
  Shape tiles;    // how many along each axis; of c, groups of BLOCKS blocks
  int64_t blocks;  // of LANES channels, in all
  float* sums;    // (tiles.b, .t, .h, .w, blocks, taps + 1, LANES): weights, and last the bias
  std::atomic<bool> failed;
};

template <typename scalar>
void tile(Job& job, int64_t index, std::vector<float>& scratch) {
  const Shape &n = job.tiles, &shape = job.shape;
  const int64_t group = index % n.c, place = index / n.c;
  int64_t rest = place;
  Shape at;
  at.w = rest % n.w * TILE_W, rest /= n.w;
  at.h = rest % n.h * TILE_H, rest /= n.h;
  at.t = rest % n.t * TILE_T, rest /= n.t;
  at.b = rest;
  at.c = group * BLOCKS * LANES;
  const int64_t blocks = std::min(BLOCKS, job.blocks - group * BLOCKS);
  const int64_t end = std::min(at.t + TILE_T, shape.t);

  const Shape size = {1, 1, std::min(TILE_H, shape.h - at.h), std::min(TILE_W, shape.w - at.w), 0};
  const Shape with_halo = {1, 1, size.h + job.kh - 1, size.w + job.kw - 1, 0};
  const int64_t x_row = with_halo.w * LANES, x_plane = with_halo.h * x_row;
  const int64_t x_frame = blocks * x_plane, dy_plane = size.h * size.w * LANES;
  const size_t needed = job.kt * x_frame + blocks * dy_plane;
  if (scratch.size() < needed) scratch.resize(needed);
  float *x = scratch.data(), *dy = x + job.kt * x_frame;

  const int64_t slice = job.kh * job.kw * LANES, slab = job.kt * slice + LANES;
  float* out = job.sums + (place * job.blocks + group * BLOCKS) * slab;
  int64_t packed = std::max<int64_t>(at.t - job.kt / 2, 0);
  for (int64_t t = at.t; t < end; ++t) {
    const int64_t first = t - job.kt / 2, last = std::min(first + job.kt, shape.t);
    for (; packed < last; ++packed) {
      const Shape corner = {at.b, packed, at.h - job.kh / 2, at.w - job.kw / 2, at.c};
      pack<scalar>(job.x, shape, corner, with_halo, blocks, x + packed % job.kt * x_frame);
    }
    pack<scalar>(job.dy, shape, {at.b, t, at.h, at.w, at.c}, size, blocks, dy);
    for (int64_t block = 0; block < blocks; ++block) {
      const float* ds = dy + block * dy_plane;
      for (int64_t frame = std::max<int64_t>(first, 0); frame < last; ++frame) {
        const float* xs = x + frame % job.kt * x_frame + block * x_plane;
        float* to = out + block * slab + (frame - first) * slice;
        switch (job.kw) {
          case 1: planes<1>(job.kh, xs, x_row, ds, size.h, size.w, to); break;
          case 3: planes<3>(job.kh, xs, x_row, ds, size.h, size.w, to); break;
          case 5: planes<5>(job.kh, xs, x_row, ds, size.h, size.w, to); break;
          case 7: planes<7>(job.kh, xs, x_row, ds, size.h, size.w, to); break;
          case 9: planes<9>(job.kh, xs, x_row, ds, size.h, size.w, to); break;
        }
      }
      for (int64_t h = 0; h < size.h; ++h) {
        vec sum = {};
        for (int64_t w = 0; w < size.w; ++w) sum += load(ds + (h * size.w + w) * LANES);
        add(out + (block + 1) * slab - LANES, sum);
      }
    }
  }
}

void run(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  // Kept from call to call: fresh pages cost as much as packing. At most a few MB a thread.
  static thread_local std::vector<float> scratch;
  try {
    for (int64_t i = begin; i < end; ++i) switch (job.dtype) {
        case 0: tile<float>(job, i, scratch); break;
        case 1: tile<_Float16>(job, i, scratch); break;
        case 2: tile<bfloat16>(job, i, scratch); break;
      }
  } catch (const std::bad_alloc&) {
    job.failed = true;
  }
}

}  // namespace

// x, dy: (B, T, H, W, C) of any strides, dtype 0 fp32, 1 fp16, 2 bf16. shape {B, T, H, W, C}, kernel
// {kt, kh, kw}, each odd and kw at most 9. grads, fp32, (kt * kh * kw + 1, C), last the bias, is
// written. Returns 0, 1 where memory ran out, 2 for arguments that are none of these.
extern "C" int32_t uniformer_dwconv3d_bwd_weight(
    const void* x, const int64_t* stride_x, const void* dy, const int64_t* stride_dy,
    const int64_t* shape, const int64_t* kernel, int32_t dtype, float* grads,
    ParallelFor parallel_for) {
  const int64_t kt = kernel[0], kh = kernel[1], kw = kernel[2], taps = kt * kh * kw;
  if (dtype < 0 || dtype > 2 || kw % 2 == 0 || kw > MAX_KERNEL) return 2;
  const Shape size = {shape[0], shape[1], shape[2], shape[3], shape[4]};
  const int64_t blocks = tiles_of(size.c, LANES), slab = (taps + 1) * LANES;
  const Shape tiles = {size.b, tiles_of(size.t, TILE_T), tiles_of(size.h, TILE_H),
                       tiles_of(size.w, TILE_W), tiles_of(blocks, BLOCKS)};
  const int64_t places = tiles.b * tiles.t * tiles.h * tiles.w;
  try {
    std::vector<float> sums(places * blocks * slab, 0.0f);
    Job job = {{x, stride_x}, {dy, stride_dy}, size, kt, kh, kw, dtype, tiles, blocks,
               sums.data(), {false}};
    if (parallel_for(0, places * tiles.c, 1, run, &job) != 0 || job.failed) return 1;
    for (int64_t c = 0; c < size.c; ++c)
      for (int64_t tap = 0; tap <= taps; ++tap) {
        double sum = 0;
        for (int64_t place = 0; place < places; ++place)
          sum += sums[(place * blocks + c / LANES) * slab + tap * LANES + c % LANES];
        grads[tap * size.c + c] = float(sum);
      }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
