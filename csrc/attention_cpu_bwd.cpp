// Softmax attention on the CPU in bf16, backward, to the gradient of a packed qkv.
//
//   P = exp(scale q k^T - lse)    delta[n] = dout[n].out[n]    dS = scale P (dout v^T - delta)
//   dV = P^T dout                 dK = dS^T q                  dQ = dS k
//
// Keys are rows and queries are columns. As the products leave them, P^T and dS^T are the rows that
// dV and dK are made from, and two rows of dS^T side by side the packed factor of dQ^T = k^T dS^T:
// no score is transposed. A job is a group of keys of one head. It takes a block of keys at a time
// through all queries, so that dK and dV are its own; dQ is summed by group, in fp32.
//
// Groups are there for balance: 5 heads on 2 threads take as long as 6. Two passes, dQ by queries
// and then dK and dV by keys, need no groups, but 7 products instead of 5; sums of 4 groups take
// 1 % of the time. Their number does not depend on that of threads, and they are added in one
// order: the result is the same every time. PyTorch's kernel takes twice as long, with dqkv put
// together (benchmarks/bench_attention.py).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "attention_cpu.h"

#if defined(__AVX512BF16__)

namespace {

constexpr int64_t KEYS = 11 * ROWS;    // of a block: 36 to 132 are as fast, and so are
constexpr int64_t QUERIES = 2 * STEP;  // 1 to 8 steps between two additions to dK and dV
constexpr int64_t JOBS = 16;           // at least, by groups; 3 % slower with 32 for 5 heads
constexpr int64_t HEADS = 64;          // at a time, at most: memory does not grow with the batch
constexpr int64_t AHEAD = 8;           // rows to prefetch by: 2 % faster, they lie far apart

struct Rows {
  const uint16_t* data;
  int64_t stride_b, stride_n;  // in elements; heads and channels lie side by side
};

struct Job {
  Rows qkv, dout, out;
  const float* lse;       // (B, N, h)
  uint16_t* dqkv;         // (B, N, 3, h, d)
  int64_t N, h, d;
  float scale;
  int64_t padded;         // N, rounded up to LANES
  int64_t groups, group;  // of keys, and how many each has
  uint16_t* packed;       // (heads, 4, padded * d): see Head
  float* statistics;      // (heads, 2, padded): see Head
  float* dq;              // (heads, groups, padded * d): transposed, by steps (d, step)
  int64_t first;          // of the heads at work, of all clips
};

struct Head {
  const Job& job;
  int64_t b, h;
  uint16_t *q, *dout;              // by steps of queries (d / 2, step, 2)
  uint16_t *q_pairs, *dout_pairs;  // by pairs of queries (d, 2)
  float *lse, *minus_delta;

  Head(const Job& of, int64_t index)
      : job(of), b((job.first + index) / job.h), h((job.first + index) % job.h) {
    const int64_t size = job.padded * job.d;
    q = job.packed + index * 4 * size;
    dout = q + size, q_pairs = dout + size, dout_pairs = q_pairs + size;
    lse = job.statistics + index * 2 * job.padded, minus_delta = lse + job.padded;
  }

  const uint16_t* row(const Rows& rows, int64_t n, int64_t which = 0) const {
    return rows.data + b * rows.stride_b + n * rows.stride_n + (which * job.h + h) * job.d;
  }
  uint16_t* gradient(int64_t n, int64_t which) const {
    return job.dqkv + (((b * job.N + n) * 3 + which) * job.h + h) * job.d;
  }
};

// A block of keys; its scores with QUERIES queries; its gradients. 0.1 MB, on the stack.
struct Block {
  int64_t keys, rows;                                       // rows: keys, rounded up to ROWS
  alignas(64) uint16_t k[KEYS * WIDEST], v[KEYS * WIDEST];  // (rows, d)
  alignas(64) uint16_t k_pairs[WIDEST * KEYS];              // (d, rows): pairs of keys
  alignas(64) uint16_t p[KEYS][QUERIES], ds[KEYS][QUERIES];
  alignas(64) uint16_t ds_pairs[KEYS * QUERIES];            // by steps (rows / 2, step, 2)
  alignas(64) float dk[KEYS * WIDEST], dv[KEYS * WIDEST];   // (rows, d)
};

// --- Packing ---------------------------------------------------------------------------

float minus_delta(const uint16_t* dout, const uint16_t* out, int64_t d) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < d; c += LANES) sum = _mm512_fnmadd_ps(load(dout + c), load(out + c), sum);
  return _mm512_reduce_add_ps(sum);
}

void pack_queries(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  const int64_t steps = tiles_of(job.padded, STEP), d = job.d;
  for (int64_t index = begin; index < end; ++index) {
    const Head head(job, index / steps);
    const int64_t first = index % steps * STEP, step = std::min<int64_t>(STEP, job.padded - first);
    for (int64_t n = first; n < first + step; n += 2) {
      const uint16_t *q[2], *dout[2];
      for (int64_t i = 0; i < 2; ++i) {
        const bool real = n + i < job.N;
        q[i] = real ? head.row(job.qkv, n + i) : ZEROS;
        dout[i] = real ? head.row(job.dout, n + i) : ZEROS;
        head.lse[n + i] = real ? job.lse[(head.b * job.N + n + i) * job.h + head.h] : 0.0f;
        head.minus_delta[n + i] = real ? minus_delta(dout[i], head.row(job.out, n + i), d) : 0.0f;
      }
      pack_columns(q, d, step, n - first, head.q + first * d);
      pack_columns(dout, d, step, n - first, head.dout + first * d);
      pack_pairs(q, d, head.q_pairs + n * d);
      pack_pairs(dout, d, head.dout_pairs + n * d);
    }
  }
}

void pack_keys(const Head& head, int64_t first, int64_t keys, Block& block) {
  const int64_t d = head.job.d, last = head.job.N - 1;
  block.keys = keys, block.rows = tiles_of(keys, ROWS) * ROWS;
  std::fill(block.k + keys * d, block.k + block.rows * d, 0);
  std::fill(block.v + keys * d, block.v + block.rows * d, 0);
  for (int64_t m = 0; m < keys; ++m)
    for (int64_t which = 1; which <= 2; ++which) {
      const uint16_t* next = head.row(head.job.qkv, std::min(first + m + AHEAD, last), which);
      for (int64_t c = 0; c < d; c += 2 * LANES) _mm_prefetch(next + c, _MM_HINT_T0);
      const uint16_t* row = head.row(head.job.qkv, first + m, which);
      std::copy(row, row + d, (which == 1 ? block.k : block.v) + m * d);
    }
  for (int64_t m = 0; m < block.rows; ++m)
    for (int64_t c = 0; c < d; ++c) block.k_pairs[c * block.rows + m] = block.k[m * d + c];
}

// --- Products --------------------------------------------------------------------------

// P^T and dS^T / scale of a block with V vectors of queries from n on; 0 where there is no key or
// no query, whatever a product with the zeros there may be.
template <int V>
void scores(const Head& head, int64_t n, Block& block) {
  const int64_t d = head.job.d, column = n % QUERIES;
  const __m512 scale = _mm512_set1_ps(head.job.scale);
  for (int64_t m = 0; m < block.rows; m += ROWS) {
    alignas(64) float p[ROWS][V * LANES];
    __mmask16 real[ROWS][V];
    __m512 sums[ROWS][V] = {};
    products<ROWS, V>(block.k + m * d, d, head.q + n * d, d / 2, sums);
    for (int v = 0; v < V; ++v) {
      const __m512 lse = _mm512_loadu_ps(head.lse + n + v * LANES);
      for (int r = 0; r < ROWS; ++r) {
        // Rounded as in forward, no fmsub: the score that makes all of its lse is to give e^0.
        const __m512 score = _mm512_mul_ps(sums[r][v], scale);
        real[r][v] = m + r < block.keys ? lanes(head.job.N - n - v * LANES) : 0;
        sums[r][v] = _mm512_maskz_mov_ps(real[r][v], exp(_mm512_sub_ps(score, lse)));
        _mm512_store_ps(p[r] + v * LANES, sums[r][v]);
      }
      for (int r = 0; r < ROWS; r += 2)
        store(block.p[m + r] + column + v * LANES, block.p[m + r + 1] + column + v * LANES,
              both(sums[r][v], sums[r + 1][v]));
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] = _mm512_loadu_ps(head.minus_delta + n + v * LANES);
    products<ROWS, V>(block.v + m * d, d, head.dout + n * d, d / 2, sums);
    const auto ds = [&](int r, int v) {
      return _mm512_maskz_mul_ps(real[r][v], _mm512_load_ps(p[r] + v * LANES), sums[r][v]);
    };
    uint16_t* pairs = block.ds_pairs + column * block.rows + m * V * LANES;
    for (int r = 0; r < ROWS; r += 2)
      for (int v = 0; v < V; ++v) {
        const __m512i two = both(ds(r, v), ds(r + 1, v));
        store(block.ds[m + r] + column + v * LANES, block.ds[m + r + 1] + column + v * LANES, two);
        _mm512_storeu_si512(pairs + (r * V + 2 * v) * LANES, side_by_side(two));
      }
  }
}

// dK / scale and dV of a block from `queries` queries from n on.
template <int V>
void keys_gradients(const Head& head, int64_t n, int64_t queries, Block& block) {
  const int64_t d = V * LANES;
  const uint16_t *q = head.q_pairs + n * d, *dout = head.dout_pairs + n * d;
  for (int64_t m = 0; m < block.rows; m += ROWS) {
    accumulate<ROWS, V>(block.p[m], QUERIES, dout, queries / 2, n > 0, block.dv + m * d);
    accumulate<ROWS, V>(block.ds[m], QUERIES, q, queries / 2, n > 0, block.dk + m * d);
  }
}

// dQ^T / scale of V vectors of queries from n on, from a block, onto or over `dq` (d, step).
template <int V>
void queries_gradient(const Head& head, int64_t n, const Block& block, bool onto, float* dq) {
  constexpr int R = 4;  // divides all d, and is as fast as ROWS
  const uint16_t* pairs = block.ds_pairs + n % QUERIES * block.rows;
  for (int64_t c = 0; c < head.job.d; c += R)
    accumulate<R, V>(block.k_pairs + c * block.rows, block.rows, pairs, block.rows / 2, onto,
                     dq + c * V * LANES);
}

// --- Jobs ------------------------------------------------------------------------------

// Calls `function` with how many vectors `elements` are, 1 to 4, as a constant.
template <typename Function>
inline void with_vectors(int64_t elements, const Function& function) {
  switch (elements / LANES) {
    case 1: function(std::integral_constant<int, 1>()); break;
    case 2: function(std::integral_constant<int, 2>()); break;
    case 3: function(std::integral_constant<int, 3>()); break;
    case 4: function(std::integral_constant<int, 4>()); break;
  }
}

void write_keys(const Head& head, int64_t first, const Block& block) {
  const __m512 scale = _mm512_set1_ps(head.job.scale);
  for (int64_t m = 0; m < block.keys; ++m)
    for (int64_t c = 0; c < head.job.d; c += LANES) {
      const int64_t at = m * head.job.d + c;
      const __m512 dk = _mm512_mul_ps(_mm512_loadu_ps(block.dk + at), scale);
      store(head.gradient(first + m, 1) + c, head.gradient(first + m, 2) + c,
            both(dk, _mm512_loadu_ps(block.dv + at)));
    }
}

void run(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  Block block;
  for (int64_t index = begin; index < end; ++index) {
    const Head head(job, index / job.groups);
    const int64_t first = index % job.groups * job.group, last = std::min(first + job.group, job.N);
    const int64_t rows = tiles_of(last - first, tiles_of(last - first, KEYS));  // blocks alike
    const int64_t most = tiles_of(rows, ROWS) * ROWS;
    float* dq = job.dq + index * job.padded * job.d;
    for (int64_t m = first; m < last; m += most) {
      pack_keys(head, m, std::min(most, last - m), block);
      for (int64_t n = 0; n < job.padded; n += QUERIES) {
        const int64_t queries = std::min(QUERIES, job.padded - n);
        for (int64_t i = n; i < n + queries; i += STEP)
          with_vectors(std::min<int64_t>(STEP, n + queries - i), [&](auto V) {
            scores<V>(head, i, block);
            queries_gradient<V>(head, i, block, m > first, dq + i * job.d);
          });
        with_vectors(job.d, [&](auto V) { keys_gradients<V>(head, n, queries, block); });
      }
      write_keys(head, m, block);
    }
  }
}

// dQ of a step of queries: the sum over groups, transposed.
void write_queries(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  const int64_t steps = tiles_of(job.padded, STEP), d = job.d, size = job.padded * d;
  const __m512 scale = _mm512_set1_ps(job.scale);
  for (int64_t index = begin; index < end; ++index) {
    const Head head(job, index / steps);
    const int64_t first = index % steps * STEP, step = std::min<int64_t>(STEP, job.padded - first);
    const float* dq = job.dq + index / steps * job.groups * size + first * d;
    for (int64_t c = 0; c < d; c += 2)
      for (int64_t n = 0; n < step; n += LANES) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int64_t group = 0; group < job.groups; ++group) {
          const float* from = dq + group * size + c * step + n;
          even = _mm512_add_ps(even, _mm512_loadu_ps(from));
          odd = _mm512_add_ps(odd, _mm512_loadu_ps(from + step));
        }
        alignas(64) uint16_t pairs[2 * LANES];
        const __m512i two = both(_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale));
        _mm512_store_si512(pairs, side_by_side(two));
        const int64_t real = std::min<int64_t>(LANES, job.N - first - n);
        for (int64_t l = 0; l < real; ++l)
          std::memcpy(head.gradient(first + n + l, 0) + c, pairs + 2 * l, 4);
      }
  }
}

}  // namespace

#endif

// qkv (B, N, 3, h, d), dout and out (B, N, h, d), all bf16, each with its strides {b, n} and all
// else contiguous; lse (B, N, h) as forward gives it; dqkv (B, N, 3, h, d) is written. Shape and
// returns as forward's.
#if defined(__AVX512BF16__)
extern "C" int32_t uniformer_attention_bwd(
    const void* qkv, const int64_t* stride_qkv, const void* dout, const int64_t* stride_dout,
    const void* out, const int64_t* stride_out, const float* lse, void* dqkv,
    const int64_t* shape, float scale, ParallelFor parallel_for) {
  const int64_t N = shape[1], h = shape[2], d = shape[3], heads = shape[0] * h;
  if (!serves(d)) return 2;
  const int64_t at_once = tiles_of(heads, tiles_of(heads, HEADS));
  const int64_t parts = std::min(tiles_of(JOBS, at_once), tiles_of(N, KEYS));
  const int64_t group = tiles_of(tiles_of(N, parts), ROWS) * ROWS, groups = tiles_of(N, group);
  const int64_t padded = tiles_of(N, LANES) * LANES, steps = tiles_of(padded, STEP);
  // Kept from call to call: fresh pages cost as much as packing.
  static thread_local std::vector<uint16_t> packed;
  static thread_local std::vector<float> sums;
  try {
    packed.resize(at_once * 4 * padded * d);
    sums.resize(at_once * padded * (2 + groups * d));
  } catch (const std::bad_alloc&) {
    return 1;
  }
  const auto rows = [](const void* data, const int64_t* stride) {
    return Rows{static_cast<const uint16_t*>(data), stride[0], stride[1]};
  };
  Job job = {rows(qkv, stride_qkv), rows(dout, stride_dout), rows(out, stride_out), lse,
             static_cast<uint16_t*>(dqkv), N, h, d, scale, padded, groups, group,
             packed.data(), sums.data(), sums.data() + at_once * 2 * padded, 0};
  for (; job.first < heads; job.first += at_once) {
    const int64_t count = std::min(at_once, heads - job.first);
    if (parallel_for(0, count * steps, 1, pack_queries, &job) ||
        parallel_for(0, count * groups, 1, run, &job) ||
        parallel_for(0, count * steps, 1, write_queries, &job))
      return 1;
  }
  return 0;
}
#else
extern "C" int32_t uniformer_attention_bwd(
    const void*, const int64_t*, const void*, const int64_t*, const void*, const int64_t*,
    const float*, void*, const int64_t*, float, ParallelFor) {
  return 2;
}
#endif
