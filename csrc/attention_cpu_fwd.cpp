// Softmax attention on the CPU in bf16 and fp32, forward, from a packed qkv.
//
//   o[n] = sum_m softmax_m(scale q[n].k[m]) v[m]        for every clip and head
//
// K and V are packed once a head, sixteen keys (channels) to a vector. ROWS queries go through all
// keys in blocks, with the softmax's maximum and sum brought along; a block's scores stay in the
// first-level cache. PyTorch's own kernel takes twice as long in bf16, and 1.2 times in fp32, where
// this one runs at nine tenths of the rate of matrix products (benchmarks/bench_attention.py).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "attention_cpu.h"

namespace {

#if defined(__AVX512F__)

constexpr int64_t BLOCK = 8 * STEP;   // keys between two corrections by the maximum
// Keys whose products are added one after another: those of 512 err up to twice as much in fp32.
template <typename E>
constexpr int64_t CHAIN = 2 * STEP * GROUP<E>;
constexpr int64_t TILE = 8 * ROWS;    // queries of a job
constexpr float INF = std::numeric_limits<float>::infinity();

template <typename E>
struct Job {
  const E* qkv;
  int64_t stride_b, stride_n;  // in elements; q, k, v, heads and channels lie side by side
  E* out;                      // (B, N, h, d)
  float* lse;                  // (B, N, h), or null
  int64_t B, N, h, d;
  float scale;
  int64_t padded;              // N, rounded up to LANES
  E *keys, *values;            // see pack_columns, by steps, and pack_rows; by heads

  const E* row(int64_t b, int64_t n, int64_t which, int64_t head) const {
    return qkv + b * stride_b + n * stride_n + (which * h + head) * d;
  }
};

template <typename E>
void pack(int64_t begin, int64_t end, void* context) {
  const Job<E>& job = *static_cast<Job<E>*>(context);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / job.h, head = index % job.h;
    E* keys = job.keys + index * job.padded * job.d;
    E* values = job.values + index * job.padded * job.d;
    for (int64_t n = 0; n < job.padded; n += 2) {
      const int64_t first = n / STEP * STEP, step = std::min<int64_t>(STEP, job.padded - first);
      const E *k[2], *v[2];
      for (int64_t i = 0; i < 2; ++i) {
        k[i] = n + i < job.N ? job.row(b, n + i, 1, head) : ZEROS<E>;
        v[i] = n + i < job.N ? job.row(b, n + i, 2, head) : ZEROS<E>;
      }
      pack_columns(k, job.d, step, n - first, keys + first * job.d);
      pack_rows(v, job.d, values + n * job.d);
    }
  }
}

// R queries from n on, through all keys.
template <int R, int V, typename E>
void queries(const Job<E>& job, int64_t b, int64_t head, int64_t n) {
  const int64_t d = V * LANES, index = b * job.h + head;
  const E* q = job.row(b, n, 0, head);
  const E* keys = job.keys + index * job.padded * d;
  const E* values = job.values + index * job.padded * d;
  alignas(64) float scores[R][BLOCK];  // and then weights in E, from the start of a row
  alignas(64) float out[R][V * LANES];  // written by the first block
  alignas(64) float tops[R][LANES];     // the highest scores of a block
  float most[R], sum[R] = {};
  std::fill(most, most + R, -INF);

  for (int64_t first = 0; first < job.padded; first += BLOCK) {
    const int64_t count = std::min(BLOCK, job.padded - first);
    for (int r = 0; r < R; ++r) store(tops[r], _mm512_set1_ps(most[r]));
    for (int64_t m = 0; m < count; m += STEP)
      with_vectors(std::min<int64_t>(STEP, count - m) / LANES, [&](auto W) {
        __m512 sums[R][W] = {};
        products<R, W>(q, job.stride_n, keys + (first + m) * d, d / GROUP<E>, sums);
        const int64_t last = job.N - first - m - (W - 1) * LANES;  // keys of the last vector
        for (int r = 0; r < R; ++r) {
          __m512 top = load(tops[r]);
          for (int v = 0; v < W; ++v) {
            __m512 score = _mm512_mul_ps(sums[r][v], _mm512_set1_ps(job.scale));
            if (v == W - 1 && last < LANES)
              score = _mm512_mask_blend_ps(lanes(last), _mm512_set1_ps(-INF), score);
            top = _mm512_max_ps(score, top);
            store(scores[r] + m + v * LANES, score);
          }
          store(tops[r], top);
        }
      });
    for (int r = 0; r < R; ++r) {
      const float now = _mm512_reduce_max_ps(load(tops[r])), from = now == -INF ? 0.0f : now;
      const float factor = std::exp2((most[r] - from) * LOG2E);
      const __m512 shift = _mm512_set1_ps(from);
      __m512 total = _mm512_setzero_ps();
      const auto weights = [&](int64_t m) {
        const __m512 some = exp(_mm512_sub_ps(load(scores[r] + m), shift));
        total = _mm512_add_ps(total, some);
        return some;
      };
      E* to = reinterpret_cast<E*>(scores[r]);
      int64_t m = 0;
      for (; m + 2 * LANES <= count; m += 2 * LANES) {
        const __m512 left = weights(m);
        store_row(to + m, left, weights(m + LANES));
      }
      if (m < count) store(to + m, weights(m));
      sum[r] = sum[r] * factor + _mm512_reduce_add_ps(total);
      most[r] = now;
      if (first > 0 && factor != 1.0f)
        for (int v = 0; v < V; ++v) {
          float* at = out[r] + v * LANES;
          _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(factor)));
        }
    }
    for (int64_t m = 0; m < count; m += CHAIN<E>)
      accumulate<R, V>(reinterpret_cast<E*>(scores[0]) + m, BLOCK * GROUP<E>,
                       values + (first + m) * d, std::min(CHAIN<E>, count - m) / GROUP<E>,
                       first + m > 0, out[0]);
  }

  for (int r = 0; r < R; ++r) {
    const int64_t at = (b * job.N + n + r) * job.h + head;
    for (int v = 0; v < V; ++v) {
      const __m512 o = _mm512_div_ps(_mm512_load_ps(out[r] + v * LANES), _mm512_set1_ps(sum[r]));
      store(job.out + at * d + v * LANES, o);
    }
    if (job.lse) job.lse[at] = most[r] + std::log(sum[r]);
  }
}

template <int V, typename E>
void tile(const Job<E>& job, int64_t b, int64_t head, int64_t n) {
  const int64_t end = std::min(n + TILE, job.N);
  for (; n + ROWS <= end; n += ROWS) queries<ROWS, V>(job, b, head, n);
  for (; n < end; ++n) queries<1, V>(job, b, head, n);
}

template <typename E>
void run(int64_t begin, int64_t end, void* context) {
  const Job<E>& job = *static_cast<Job<E>*>(context);
  const int64_t tiles = tiles_of(job.N, TILE);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index % tiles * TILE, head = index / tiles % job.h, b = index / tiles / job.h;
    with_vectors(job.d / LANES, [&](auto V) { tile<V>(job, b, head, n); });
  }
}

template <typename E>
int32_t forward(
    const void* qkv, int64_t stride_b, int64_t stride_n, void* out, float* lse,
    const int64_t* shape, float scale, ParallelFor parallel_for) {
  static thread_local std::vector<E> memory;
  const int64_t heads = shape[0] * shape[2], padded = tiles_of(shape[1], LANES) * LANES;
  const int64_t size = heads * padded * shape[3];
  E* packed;
  try {
    packed = aligned(memory, 2 * size);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  Job<E> job = {static_cast<const E*>(qkv), stride_b, stride_n, static_cast<E*>(out),
                lse, shape[0], shape[1], shape[2], shape[3], scale, padded,
                packed, packed + size};
  const int64_t tiles = tiles_of(shape[1], TILE);
  return parallel_for(0, heads, 1, pack<E>, &job) ||
         parallel_for(0, heads * tiles, 1, run<E>, &job);
}

#endif

}  // namespace

// Whether `uniformer_attention_fwd` and `_bwd` serve heads of `d` channels of `bytes` bytes, 2 for
// bf16 and 4 for fp32, on the processor that they are built for.
extern "C" int32_t uniformer_attention_fwd_serves(int64_t d, int32_t bytes) {
  return serves(d, bytes);
}

// qkv: (B, N, 3, h, d) of elements of `bytes`, all but the first two axes contiguous, strides in
// elements; out (B, N, h, d) and lse (B, N, h) in fp32, the logarithm of each softmax's sum, or
// null, are written; shape {B, N, h, d}. Returns 0, 1 where memory ran out, 2 for what it does not
// serve.
extern "C" int32_t uniformer_attention_fwd(
    [[maybe_unused]] const void* qkv, [[maybe_unused]] int64_t stride_b,
    [[maybe_unused]] int64_t stride_n, [[maybe_unused]] void* out, [[maybe_unused]] float* lse,
    const int64_t* shape, [[maybe_unused]] float scale, int32_t bytes,
    [[maybe_unused]] ParallelFor parallel_for) {
  if (!serves(shape[3], bytes)) return 2;
#if defined(__AVX512BF16__)
  if (bytes == 2)
    return forward<uint16_t>(qkv, stride_b, stride_n, out, lse, shape, scale, parallel_for);
#endif
#if defined(__AVX512F__)
  return forward<float>(qkv, stride_b, stride_n, out, lse, shape, scale, parallel_for);
#endif
  return 2;
}
