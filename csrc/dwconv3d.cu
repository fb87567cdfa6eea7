// Depthwise 3-D convolution on a GPU, stride 1 and zero padding, and its gradients.
//
//   y[b,t,h,w,c]     = bias[c] + sum_{i,j,k} weight[c,i,j,k] x[b, t+i-K/2, h+j-K/2, w+k-K/2, c]
//   dweight[i,j,k,c] = sum_{b,t,h,w} dy[b,t,h,w,c] x[b, t+i-K/2, h+j-K/2, w+k-K/2, c]
//   dbias[c]         = sum_{b,t,h,w} dy[b,t,h,w,c]
//
// dx is the first with dy for x and the weight flipped along its three taps. K is 3 or 5, sums are
// fp32, tensors are channels-last.
//
// A block owns 64 bytes of channels and a tile of rows and columns, and walks along the frames. A
// frame's tile with its halo is a slab in shared memory, zeros where there is no x, copied there
// while the one before it is worked on; from then on there are no edges and strides. Each frame
// comes once for the whole walk. A thread has two channels and a run of 7 columns (56, 28, 14 and
// 7 are the widths of the network): K + 6 elements of x that it loads serve 7 K products a row of
// taps, and K rows of sums share them, so most instructions are multiply-adds.
//
// No atomics, and sums are added in one order: the result is the same every time.
//
// Plain CUDA C++ behind a C interface: it needs no header of PyTorch.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int PIXEL = 64;  // bytes of a pixel's channels in a slab: 32 channels, of fp32 16
constexpr int PART = 16;   // bytes of one copy
constexpr int RUN = 7;     // columns of a thread
constexpr int ROWS = 8;    // rows of a tile
constexpr int PAD = 2;     // floats after a tap's weights: writing them across taps meets 16 banks

// Blocks of a forward walk that keep a chip busy, 2 on each of 128 multiprocessors. With fewer
// tiles than that the frames are divided as well, each part reading K - 1 more of them.
constexpr int64_t BUSY = 256;

struct Shape {
  int b, t, h, w, c;
};

struct View {
  const char* data;
  int64_t b, t, h, w;  // strides in bytes; channels are adjacent
};

struct Job {
  View x;
  Shape shape;
  int tiles_c, tiles_w, tiles_h;
};

// --- Two channels of a thread ----------------------------------------------------------

template <typename T> struct PairOf;
template <> struct PairOf<float> { using type = float2; };
template <> struct PairOf<__half> { using type = __half2; };
template <> struct PairOf<__nv_bfloat16> { using type = __nv_bfloat162; };
template <typename T> using Pair = typename PairOf<T>::type;

__device__ inline float2 widen(float2 value) { return value; }
__device__ inline float2 widen(__half2 value) { return __half22float2(value); }
__device__ inline float2 widen(__nv_bfloat162 value) { return __bfloat1622float2(value); }

// The header's 3 instructions for bf16 stay where they are. These 2 the compiler repeats behind
// every branch that needs them: for code without branches.
template <typename P> __device__ inline float2 widen_straight(P value) { return widen(value); }
__device__ inline float2 widen_straight(__nv_bfloat162 value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}

__device__ inline void narrow(float2 value, float2* to) { *to = value; }
__device__ inline void narrow(float2 value, __half2* to) { *to = __float22half2_rn(value); }
__device__ inline void narrow(float2 value, __nv_bfloat162* to) {
  *to = __float22bfloat162_rn(value);
}

__device__ inline void multiply_add(float2 a, float2 b, float2& sum) {
  sum.x = fmaf(a.x, b.x, sum.x);
  sum.y = fmaf(a.y, b.y, sum.y);
}

// --- Tiles -----------------------------------------------------------------------------

// RUNS runs side by side make a tile, 2, or 1 where the image is no wider than that.
template <typename T, int K, int RUNS>
struct Tile {
  static constexpr int CHANNELS = PIXEL / sizeof(T), PAIRS = CHANNELS / 2;
  static constexpr int WIDTH = RUN * RUNS;
  static constexpr int X_HEIGHT = ROWS + K - 1, X_WIDTH = WIDTH + K - 1;
  static constexpr int X_BYTES = X_HEIGHT * X_WIDTH * PIXEL, DY_BYTES = ROWS * WIDTH * PIXEL;

  // Threads of a warp are pairs of channels at 2 places (4 in fp32). The place's lowest bit is the
  // thread's: the weights of both are then one access. Places 7 columns or one row of x apart,
  // odd numbers of 64 bytes, meet all banks.
  __device__ static int pair(int thread) { return thread / 2 % PAIRS; }
  __device__ static int place(int thread) { return thread / (2 * PAIRS) * 2 + thread % 2; }
  __host__ __device__ static int thread_of(int pair, int place) {
    return place / 2 * 2 * PAIRS + pair * 2 + place % 2;
  }
};

// Copies boxes of HEIGHT rows and WIDTH columns at one place of every frame to slabs in shared
// memory. What lies outside of the image is the same for all, and cleared once. Where a thread's
// parts come from stays in shared memory as well: registers are for sums.
template <int HEIGHT, int WIDTH, int THREADS>
struct Copier {
  static constexpr int PARTS = HEIGHT * WIDTH * (PIXEL / PART);
  static constexpr int COPIES = (PARTS + THREADS - 1) / THREADS;
  static constexpr int TABLE_BYTES = COPIES * THREADS * int(sizeof(int));
  int* table;  // in parts from the start of a frame; -1 where there is nothing to copy

  // At the box from (h, w) and channel c on, for `count` slabs.
  __device__ void aim(const View& view, const Shape& shape, int h, int w, int c, int size,
                      char* slabs, int count) const {
#pragma unroll 1
    for (int part = threadIdx.x; part < COPIES * THREADS; part += THREADS) {
      const int pixel = part / (PIXEL / PART);
      const int row = h + pixel / WIDTH, column = w + pixel % WIDTH;
      const int64_t byte = int64_t(c) * size + part % (PIXEL / PART) * PART;
      const bool inside = part < PARTS && row >= 0 && row < shape.h && column >= 0 &&
                          column < shape.w && byte < int64_t(shape.c) * size;
      table[part] = inside ? int((row * view.h + column * view.w + byte) / PART) : -1;
      if (part < PARTS && !inside)
        for (int slab = 0; slab < count; ++slab)
          reinterpret_cast<uint4*>(slabs)[slab * PARTS + part] = {};
    }
  }

  __device__ void start(char* slab, const char* frame) const {
#pragma unroll
    for (int n = 0; n < COPIES; ++n) {
      const int part = threadIdx.x + n * THREADS, from = table[part];
      if (from >= 0)
        __pipeline_memcpy_async(slab + part * PART, frame + int64_t(from) * PART, PART);
    }
  }
};

// --- y ---------------------------------------------------------------------------------

struct Forward : Job {
  const void *weight, *bias;
  void* y;
  bool wide_weight, mirror, residual;  // wide: fp32 whatever x is
  int parts, frames;                   // parts of the frames, and how many in each but the last
};

template <typename T, int K, int RUNS>
struct ForwardPlan : Tile<T, K, RUNS> {
  using Base = Tile<T, K, RUNS>;
  static constexpr int THREADS = ROWS * RUNS * Base::PAIRS;
  static constexpr int BLOCKS = (K == 3 ? 768 : 512) / THREADS;  // of a multiprocessor
  using XCopier = Copier<Base::X_HEIGHT, Base::X_WIDTH, THREADS>;
  static constexpr int TAP = Base::CHANNELS + PAD;
  static constexpr int WEIGHT_BYTES = ((K * K * K + 1) * TAP * 4 + PART - 1) / PART * PART;
  static constexpr int SHARED = WEIGHT_BYTES + 2 * Base::X_BYTES + XCopier::TABLE_BYTES;
};

template <typename T>
__device__ inline float parameter(const void* from, int64_t index, bool wide) {
  return wide ? static_cast<const float*>(from)[index]
              : float(static_cast<const T*>(from)[index]);
}

// The channels from c on, (C, taps) in memory, to (taps, channels), and the bias behind the taps.
// The residual is one more at the centre.
template <typename T, int K, int RUNS>
__device__ void stage_weight(const Forward& job, int c, float* to) {
  using Plan = ForwardPlan<T, K, RUNS>;
  constexpr int TAPS = K * K * K;
  const int count = min(Plan::CHANNELS, job.shape.c - c) * TAPS;
  for (int n = threadIdx.x; n < Plan::CHANNELS * TAPS; n += Plan::THREADS) {
    const int tap = n % TAPS;
    float value = 0;
    if (n < count) value = parameter<T>(job.weight, int64_t(c) * TAPS + n, job.wide_weight);
    if (job.residual && tap == TAPS / 2) value += 1;
    to[(job.mirror ? TAPS - 1 - tap : tap) * Plan::TAP + n / TAPS] = value;
  }
  for (int n = threadIdx.x; n < Plan::CHANNELS; n += Plan::THREADS) {
    const bool some = job.bias && c + n < job.shape.c;
    to[TAPS * Plan::TAP + n] = some ? parameter<T>(job.bias, c + n, job.wide_weight) : 0;
  }
}

// sum[s] belongs to frame t - K/2 + s of y while frame t of x is in shared memory, so that tap
// K - 1 - s leads from one to the other. After it sum[0] is complete and the others move up.
template <typename T, int K, int RUNS>
__global__ void __launch_bounds__(ForwardPlan<T, K, RUNS>::THREADS, ForwardPlan<T, K, RUNS>::BLOCKS)
forward(const Forward job) {
  using Plan = ForwardPlan<T, K, RUNS>;
  extern __shared__ __align__(16) char shared[];
  float* weight = reinterpret_cast<float*>(shared);
  char* slabs = shared + Plan::WEIGHT_BYTES;

  const Shape& shape = job.shape;
  unsigned rest = blockIdx.x;
  const int tile_c = rest % job.tiles_c * Plan::CHANNELS; rest /= job.tiles_c;
  const int tile_w = rest % job.tiles_w * Plan::WIDTH; rest /= job.tiles_w;
  const int tile_h = rest % job.tiles_h * ROWS; rest /= job.tiles_h;
  const int begin = rest % job.parts * job.frames; rest /= job.parts;
  const int b = rest, end = min(begin + job.frames, shape.t);

  const typename Plan::XCopier copier = {reinterpret_cast<int*>(slabs + 2 * Plan::X_BYTES)};
  copier.aim(job.x, shape, tile_h - K / 2, tile_w - K / 2, tile_c, sizeof(T), slabs, 2);
  const char* image = job.x.data + b * job.x.b;
  const int first = max(begin - K / 2, 0);
  copier.start(slabs, image + first * job.x.t);
  __pipeline_commit();
  stage_weight<T, K, RUNS>(job, tile_c, weight);

  const int pair = Plan::pair(threadIdx.x), place = Plan::place(threadIdx.x);
  const int row = place / RUNS, column = place % RUNS * RUN;
  const int h = tile_h + row, w = tile_w + column, c = tile_c + 2 * pair;
  const bool busy = h < shape.h && w < shape.w && c < shape.c;
  const int64_t y_frame = int64_t(shape.h) * shape.w * shape.c;
  T* y = static_cast<T*>(job.y) + y_frame * shape.t * b + (int64_t(h) * shape.w + w) * shape.c + c;

  __syncthreads();
  const float2* bias = reinterpret_cast<const float2*>(weight + K * K * K * Plan::TAP) + pair;
  float2 sum[K][RUN];
#pragma unroll
  for (int s = 0; s < K; ++s)
#pragma unroll
    for (int r = 0; r < RUN; ++r) sum[s][r] = *bias;

  const int last = min(end + K / 2, shape.t);
  for (int t = first; t < end + K / 2; ++t) {
    if (t < last) {
      __pipeline_wait_prior(0);
      __syncthreads();
      if (t + 1 < last)
        copier.start(slabs + (t + 1 - first) % 2 * Plan::X_BYTES, image + (t + 1) * job.x.t);
      __pipeline_commit();
      if (busy) {
        const char* x_row = slabs + (t - first) % 2 * Plan::X_BYTES +
                            (row * Plan::X_WIDTH + column) * PIXEL + pair * sizeof(Pair<T>);
        const float* taps = weight + 2 * pair;
#pragma unroll(K == 3 ? K : 1)
        for (int j = 0; j < K; ++j, x_row += Plan::X_WIDTH * PIXEL, taps += K * Plan::TAP) {
          float2 x[RUN + K - 1];
#pragma unroll
          for (int m = 0; m < RUN + K - 1; ++m)
            x[m] = widen(*reinterpret_cast<const Pair<T>*>(x_row + m * PIXEL));
#pragma unroll
          for (int s = 0; s < K; ++s) {
            if (t - K / 2 + s < begin || t - K / 2 + s >= end) continue;
#pragma unroll
            for (int k = 0; k < K; ++k) {
              const float2 tap =
                  *reinterpret_cast<const float2*>(taps + ((K - 1 - s) * K * K + k) * Plan::TAP);
#pragma unroll
              for (int r = 0; r < RUN; ++r) multiply_add(x[r + k], tap, sum[s][r]);
            }
          }
        }
      }
    }
    if (busy && t - K / 2 >= begin) {
      T* to = y + (t - K / 2) * y_frame;
#pragma unroll
      for (int r = 0; r < RUN; ++r, to += shape.c)
        if (r < shape.w - w) narrow(sum[0][r], reinterpret_cast<Pair<T>*>(to));
    }
#pragma unroll
    for (int s = 0; s < K; ++s)
#pragma unroll
      for (int r = 0; r < RUN; ++r) sum[s][r] = s + 1 < K ? sum[s + 1 < K ? s + 1 : s][r] : *bias;
  }
}

// --- dweight and dbias -----------------------------------------------------------------

struct Gradient : Job {
  View dy;
  float* partial;
  unsigned tiles, splits;  // tiles of one block of channels, in all images
};

// One slice of K x K taps a group of SLICE threads, each at some of the tile's places: 2 rows of a
// run, so that a row of x serves two rows of taps. K frames of dy are in use while a frame of x is,
// and one more is on its way.
template <typename T, int K, int RUNS>
struct GradientPlan : Tile<T, K, RUNS> {
  using Base = Tile<T, K, RUNS>;
  static constexpr int PLACES = ROWS / 2 * RUNS, RING = K + 1;
  static constexpr int SLICE = std::min(K == 3 ? 128 : 64, PLACES * Base::PAIRS);
  static constexpr int AT_ONCE = SLICE / Base::PAIRS;  // places
  static constexpr int THREADS = K * SLICE;
  using XCopier = Copier<Base::X_HEIGHT, Base::X_WIDTH, THREADS>;
  using DyCopier = Copier<ROWS, Base::WIDTH, THREADS>;
  static constexpr int SLABS = 2 * Base::X_BYTES + RING * Base::DY_BYTES +
                               XCopier::TABLE_BYTES + DyCopier::TABLE_BYTES;
  static constexpr int SUMS = (K * K + 1) * THREADS * int(sizeof(float2));
  static constexpr int SHARED = std::max(SLABS, SUMS);
};

template <typename T, int K, int RUNS>
__global__ void __launch_bounds__(GradientPlan<T, K, RUNS>::THREADS, 2)
weight_gradient(const Gradient job) {
  using Plan = GradientPlan<T, K, RUNS>;
  extern __shared__ __align__(16) char shared[];
  char *x_slabs = shared, *dy_slabs = shared + 2 * Plan::X_BYTES;
  char* tables = dy_slabs + Plan::RING * Plan::DY_BYTES;
  const typename Plan::XCopier copy_x = {reinterpret_cast<int*>(tables)};
  const typename Plan::DyCopier copy_dy = {
      reinterpret_cast<int*>(tables + Plan::XCopier::TABLE_BYTES)};

  const Shape& shape = job.shape;
  const int tile_c = blockIdx.x % job.tiles_c * Plan::CHANNELS, split = blockIdx.x / job.tiles_c;
  const int slice = threadIdx.x / Plan::SLICE, thread = threadIdx.x % Plan::SLICE;
  const int pair = Plan::pair(thread);

  float2 sum[K][K] = {}, sum_dy = {};
  for (unsigned tile = split; tile < job.tiles; tile += job.splits) {
    const int tile_w = tile % job.tiles_w * Plan::WIDTH;
    const int tile_h = tile / job.tiles_w % job.tiles_h * ROWS;
    const int b = tile / job.tiles_w / job.tiles_h;
    const int places = (min(ROWS, shape.h - tile_h) + 1) / 2 * RUNS;
    copy_x.aim(job.x, shape, tile_h - K / 2, tile_w - K / 2, tile_c, sizeof(T), x_slabs, 2);
    copy_dy.aim(job.dy, shape, tile_h, tile_w, tile_c, sizeof(T), dy_slabs, Plan::RING);

    const char *x_image = job.x.data + b * job.x.b, *dy_image = job.dy.data + b * job.dy.b;
    copy_x.start(x_slabs, x_image);
    for (int t = 0; t < min(K / 2 + 1, shape.t); ++t)
      copy_dy.start(dy_slabs + t * Plan::DY_BYTES, dy_image + t * job.dy.t);
    __pipeline_commit();
    for (int t = 0; t < shape.t; ++t) {
      __pipeline_wait_prior(0);
      __syncthreads();
      const int next = t + K / 2 + 1;
      if (t + 1 < shape.t)
        copy_x.start(x_slabs + (t + 1) % 2 * Plan::X_BYTES, x_image + (t + 1) * job.x.t);
      if (next < shape.t)
        copy_dy.start(dy_slabs + next % Plan::RING * Plan::DY_BYTES, dy_image + next * job.dy.t);
      __pipeline_commit();

      const int frame = t + K / 2 - slice;  // of dy
      if (frame < 0 || frame >= shape.t) continue;
      const char* x_slab = x_slabs + t % 2 * Plan::X_BYTES + pair * sizeof(Pair<T>);
      const char* dy_slab =
          dy_slabs + frame % Plan::RING * Plan::DY_BYTES + pair * sizeof(Pair<T>);
#pragma unroll 1
      for (int place = Plan::place(thread); place < places; place += Plan::AT_ONCE) {
        const int row = place / RUNS * 2, column = place % RUNS * RUN;
        const char* x_run = x_slab + (row * Plan::X_WIDTH + column) * PIXEL;
        const char* dy_run = dy_slab + (row * Plan::WIDTH + column) * PIXEL;
        float2 dy[2][RUN];
#pragma unroll
        for (int n = 0; n < 2 * RUN; ++n)
          dy[n / RUN][n % RUN] = widen_straight(*reinterpret_cast<const Pair<T>*>(
              dy_run + (n / RUN * Plan::WIDTH + n % RUN) * PIXEL));
        if (slice == K / 2) {
#pragma unroll
          for (int n = 0; n < 2 * RUN; ++n) {
            sum_dy.x += dy[n / RUN][n % RUN].x;
            sum_dy.y += dy[n / RUN][n % RUN].y;
          }
        }
#pragma unroll
        for (int r = 0; r <= K; ++r)
#pragma unroll
          for (int m = 0; m < RUN + K - 1; ++m) {
            const float2 x = widen_straight(*reinterpret_cast<const Pair<T>*>(
                x_run + (r * Plan::X_WIDTH + m) * PIXEL));
#pragma unroll
            for (int k = 0; k < K; ++k) {
              if (m - k < 0 || m - k >= RUN) continue;
              if (r < K) multiply_add(dy[0][m - k], x, sum[r][k]);
              if (r > 0) multiply_add(dy[1][m - k], x, sum[r - 1][k]);
            }
          }
      }
    }
    __syncthreads();  // before the next tile's slabs, or the sums
  }

  float2* sums = reinterpret_cast<float2*>(shared);
#pragma unroll
  for (int n = 0; n < K * K; ++n) sums[n * Plan::THREADS + threadIdx.x] = sum[n / K][n % K];
  sums[K * K * Plan::THREADS + threadIdx.x] = sum_dy;
  __syncthreads();
  constexpr int TAPS = K * K * K;
  for (int n = threadIdx.x; n < (TAPS + 1) * Plan::CHANNELS; n += Plan::THREADS) {
    const int tap = n / Plan::CHANNELS, channel = n % Plan::CHANNELS;
    if (tile_c + channel >= shape.c) continue;
    const int from = tap < TAPS ? tap / (K * K) : K / 2, which = tap < TAPS ? tap % (K * K) : K * K;
    float total = 0;
    for (int place = 0; place < Plan::AT_ONCE; ++place) {
      const float2 value = sums[which * Plan::THREADS + from * Plan::SLICE +
                                Plan::thread_of(channel / 2, place)];
      total += channel % 2 ? value.y : value.x;
    }
    job.partial[(int64_t(split) * (TAPS + 1) + tap) * shape.c + tile_c + channel] = total;
  }
}

// --- Launches --------------------------------------------------------------------------

constexpr int32_t FAILED = 1, NOT_SERVED = 2;

int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

template <typename T>
int32_t launch(void (*kernel)(T), int64_t blocks, int threads, int shared, void* stream, T job) {
  if (blocks > INT32_MAX) return NOT_SERVED;
  if (shared > 48 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  void* arguments[] = {&job};
  cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(threads), arguments, shared,
                   static_cast<cudaStream_t>(stream));
  return cudaGetLastError() == cudaSuccess ? 0 : FAILED;
}

// Tiles of one block of channels, in all images.
template <typename Plan>
int64_t lay_out(Job& job) {
  job.tiles_c = int(tiles_of(job.shape.c, Plan::CHANNELS));
  job.tiles_w = int(tiles_of(job.shape.w, Plan::WIDTH));
  job.tiles_h = int(tiles_of(job.shape.h, ROWS));
  return int64_t(job.shape.b) * job.tiles_h * job.tiles_w;
}

template <typename T, int K, int RUNS>
int32_t run(Forward job, void* stream) {
  using Plan = ForwardPlan<T, K, RUNS>;
  const int64_t blocks = lay_out<Plan>(job) * job.tiles_c;
  job.frames = int(tiles_of(job.shape.t, std::max<int64_t>(BUSY / blocks, 1)));
  job.parts = int(tiles_of(job.shape.t, job.frames));
  return launch(forward<T, K, RUNS>, blocks * job.parts, Plan::THREADS, Plan::SHARED, stream, job);
}

template <typename T, int K, int RUNS>
int32_t run(Gradient job, void* stream) {
  using Plan = GradientPlan<T, K, RUNS>;
  const int64_t tiles = lay_out<Plan>(job);
  if (tiles > INT32_MAX) return NOT_SERVED;
  job.tiles = unsigned(tiles);
  return launch(weight_gradient<T, K, RUNS>, int64_t(job.tiles_c) * job.splits, Plan::THREADS,
                Plan::SHARED, stream, job);
}

template <typename T, typename Any>
int32_t run(const Any& job, int32_t k, void* stream) {
  const bool one = job.shape.w <= RUN;
  if (k == 3) return one ? run<T, 3, 1>(job, stream) : run<T, 3, 2>(job, stream);
  return one ? run<T, 5, 1>(job, stream) : run<T, 5, 2>(job, stream);
}

template <typename Any>
int32_t run(const Any& job, int32_t k, int32_t dtype, void* stream) {
  if (dtype == 0) return run<float>(job, k, stream);
  if (dtype == 1) return run<__half>(job, k, stream);
  return run<__nv_bfloat16>(job, k, stream);
}

bool served(const int64_t* shape, int32_t k, int32_t dtype, Shape* out) {
  int64_t room = int64_t(1) << 42;  // elements, more than any memory has: no product overflows
  for (int axis = 0; axis < 5; ++axis) {
    if (shape[axis] < 1 || shape[axis] > INT32_MAX / 4 || shape[axis] > room) return false;
    room /= shape[axis];
  }
  *out = {int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3]), int(shape[4])};
  return (k == 3 || k == 5) && dtype >= 0 && dtype <= 2 && shape[4] % 8 == 0;
}

// False where 16 bytes at a time cannot be read, or a frame is spread over more than 2^31 of them.
bool view(const void* data, const int64_t* stride, const Shape& n, int32_t dtype, View* out) {
  const int64_t size = dtype == 0 ? 4 : 2;
  *out = {static_cast<const char*>(data), stride[0] * size, stride[1] * size, stride[2] * size,
          stride[3] * size};
  const auto fits = [](int64_t count, int64_t step) { return count == 1 || step % PART == 0; };
  const int64_t end = (n.h - 1) * out->h + (n.w - 1) * out->w + n.c * size;
  return reinterpret_cast<uintptr_t>(data) % PART == 0 && stride[4] == 1 && fits(n.b, out->b) &&
         fits(n.t, out->t) && fits(n.h, out->h) && fits(n.w, out->w) && out->h >= 0 &&
         out->w >= 0 && end / PART <= INT32_MAX;
}

}  // namespace

// y (B, T, H, W, C), contiguous, of x with the strides of b, t, h, w, c in elements, the last 1 and
// the others multiples of 16 bytes; dtype of both 0 fp32, 1 fp16, 2 bf16. weight (C, k, k, k),
// contiguous, and bias (C), or null, are of weight_dtype: fp32 or that of x. mirror flips the
// weight along its three taps; residual adds x. shape {B, T, H, W, C}, k 3 or 5, C in eights.
// Returns 0, 1 where the launch failed, 2 for arguments that are none of these.
extern "C" int32_t uniformer_dwconv3d_fwd_cuda(
    const void* x, const int64_t* stride_x, const void* weight, const void* bias, void* y,
    const int64_t* shape, int32_t k, int32_t dtype, int32_t weight_dtype, int32_t mirror,
    int32_t residual, void* stream) {
  Forward job = {};
  if (!served(shape, k, dtype, &job.shape) || (weight_dtype != 0 && weight_dtype != dtype) ||
      !view(x, stride_x, job.shape, dtype, &job.x))
    return NOT_SERVED;
  job.weight = weight, job.bias = bias, job.y = y;
  job.wide_weight = weight_dtype == 0, job.mirror = mirror != 0, job.residual = residual != 0;
  return run(job, k, dtype, stream);
}

// x and dy as x above; partial (splits, k^3 + 1, C) in fp32, whose sum over splits is the gradient
// of the weight, (taps, C), and in its last row of the bias.
extern "C" int32_t uniformer_dwconv3d_bwd_weight_cuda(
    const void* x, const int64_t* stride_x, const void* dy, const int64_t* stride_dy,
    float* partial, const int64_t* shape, int32_t k, int32_t dtype, int32_t splits, void* stream) {
  Gradient job = {};
  if (!served(shape, k, dtype, &job.shape) || splits < 1 ||
      !view(x, stride_x, job.shape, dtype, &job.x) ||
      !view(dy, stride_dy, job.shape, dtype, &job.dy))
    return NOT_SERVED;
  job.partial = partial, job.splits = splits;
  return run(job, k, dtype, stream);
}

// Splits that fill `sms` multiprocessors with 2 blocks each, with as many tiles in each of them.
extern "C" int32_t uniformer_dwconv3d_bwd_weight_splits_cuda(
    const int64_t* shape, int32_t /*k*/, int32_t sms) {
  const int64_t width = shape[3] <= RUN ? RUN : 2 * RUN;
  const int64_t tiles = shape[0] * tiles_of(shape[2], ROWS) * tiles_of(shape[3], width);
  const int64_t room = std::max<int64_t>(2 * sms / tiles_of(shape[4], PIXEL / 2), 1);
  return int32_t(tiles_of(tiles, tiles_of(tiles, room)));
}
