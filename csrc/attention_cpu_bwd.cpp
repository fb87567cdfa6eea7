// Softmax attention on the CPU in bf16 and fp32, backward, to the gradient of a packed qkv.
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
// order: the result is the same every time. PyTorch's kernel takes twice as long in bf16, 1.3 times
// in fp32, with dqkv put together (benchmarks/bench_attention.py).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "attention_cpu.h"

#if defined(__AVX512F__)

namespace {

constexpr int64_t KEYS = 11 * ROWS;    // of a block: 36 to 132 are as fast, and so are
// 1 to 8 steps between two additions to dK and dV are as fast; those of 128 err more in fp32.
template <typename E>
constexpr int64_t QUERIES = STEP * GROUP<E>;
constexpr int64_t JOBS = 16;           // at least, by groups; 3 % slower with 32 for 5 heads
constexpr int64_t HEADS = 64;          // at a time, at most: memory does not grow with the batch
constexpr int64_t AHEAD = 8;           // rows to prefetch by: 2 % faster, they lie far apart

template <typename E>
struct Rows {
  const E* data;
  int64_t stride_b, stride_n;  // in elements; heads and channels lie side by side
};

template <typename E>
struct Job {
  Rows<E> qkv, dout, out;
  const float* lse;       // (B, N, h)
  E* dqkv;                // (B, N, 3, h, d)
  int64_t N, h, d;
  float scale;
  int64_t padded;         // N, rounded up to LANES
  int64_t groups, group;  // of keys, and how many each has
  E* packed;              // (heads, 4, padded * d): see Head
  float* statistics;      // (heads, 2, padded): see Head
  float* dq;              // (heads, groups, padded * d): transposed, by steps (d, step)
  int64_t first;          // of the heads at work, of all clips
};

template <typename E>
struct Head {
  const Job<E>& job;
  int64_t b, h;
  E *q, *dout;              // by steps of queries (d / 2, step, 2)
  E *q_pairs, *dout_pairs;  // by pairs of queries (d, 2)
  float *lse, *minus_delta;

  Head(const Job<E>& of, int64_t index)
      : job(of), b((job.first + index) / job.h), h((job.first + index) % job.h) {
    const int64_t size = job.padded * job.d;
    q = job.packed + index * 4 * size;
    dout = q + size, q_pairs = dout + size, dout_pairs = q_pairs + size;
    lse = job.statistics + index * 2 * job.padded, minus_delta = lse + job.padded;
  }

  const E* row(const Rows<E>& rows, int64_t n, int64_t which = 0) const {
    return rows.data + b * rows.stride_b + n * rows.stride_n + (which * job.h + h) * job.d;
  }
  E* gradient(int64_t n, int64_t which) const {
    return job.dqkv + (((b * job.N + n) * 3 + which) * job.h + h) * job.d;
  }
};

// A block of keys; its scores with QUERIES queries; its gradients. 0.1 MB, on the stack.
template <typename E>
struct Block {
  int64_t keys, rows;                                      // rows: keys, rounded up to ROWS
  alignas(64) E k[KEYS * WIDEST], v[KEYS * WIDEST];        // (rows, d)
  alignas(64) E k_pairs[WIDEST * KEYS];                    // (d, rows): pairs of keys
  alignas(64) E p[KEYS][QUERIES<E>], ds[KEYS][QUERIES<E>];
  alignas(64) E ds_pairs[KEYS * QUERIES<E>];               // by steps (rows / 2, step, 2)
  alignas(64) float dk[KEYS * WIDEST], dv[KEYS * WIDEST];  // (rows, d)
};

// --- Packing ---------------------------------------------------------------------------

template <typename E>
float minus_delta(const E* dout, const E* out, int64_t d) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < d; c += LANES) sum = _mm512_fnmadd_ps(load(dout + c), load(out + c), sum);
  return _mm512_reduce_add_ps(sum);
}

template <typename E>
void pack_queries(int64_t begin, int64_t end, void* context) {
  const Job<E>& job = *static_cast<Job<E>*>(context);
  const int64_t steps = tiles_of(job.padded, STEP), d = job.d;
  for (int64_t index = begin; index < end; ++index) {
    const Head<E> head(job, index / steps);
    const int64_t first = index % steps * STEP, step = std::min<int64_t>(STEP, job.padded - first);
    for (int64_t n = first; n < first + step; n += 2) {
      const E *q[2], *dout[2];
      for (int64_t i = 0; i < 2; ++i) {
        const bool real = n + i < job.N;
        q[i] = real ? head.row(job.qkv, n + i) : ZEROS<E>;
        dout[i] = real ? head.row(job.dout, n + i) : ZEROS<E>;
        head.lse[n + i] = real ? job.lse[(head.b * job.N + n + i) * job.h + head.h] : 0.0f;
        head.minus_delta[n + i] = real ? minus_delta(dout[i], head.row(job.out, n + i), d) : 0.0f;
      }
      pack_columns(q, d, step, n - first, head.q + first * d);
      pack_columns(dout, d, step, n - first, head.dout + first * d);
      pack_rows(q, d, head.q_pairs + n * d);
      pack_rows(dout, d, head.dout_pairs + n * d);
    }
  }
}

template <typename E>
void pack_keys(const Head<E>& head, int64_t first, int64_t keys, Block<E>& block) {
  const int64_t d = head.job.d, last = head.job.N - 1;
  block.keys = keys, block.rows = tiles_of(keys, ROWS) * ROWS;
  std::fill(block.k + keys * d, block.k + block.rows * d, 0);
  std::fill(block.v + keys * d, block.v + block.rows * d, 0);
  for (int64_t m = 0; m < keys; ++m)
    for (int64_t which = 1; which <= 2; ++which) {
      const E* next = head.row(head.job.qkv, std::min(first + m + AHEAD, last), which);
      for (int64_t c = 0; c < d; c += 2 * LANES) _mm_prefetch(next + c, _MM_HINT_T0);
      const E* row = head.row(head.job.qkv, first + m, which);
      std::copy(row, row + d, (which == 1 ? block.k : block.v) + m * d);
    }
  for (int64_t m = 0; m < block.rows; ++m)
    for (int64_t c = 0; c < d; ++c) block.k_pairs[c * block.rows + m] = block.k[m * d + c];
}

// --- Products --------------------------------------------------------------------------

// P^T and dS^T / scale of a block with V vectors of queries from n on; 0 where there is no key or
// no query, whatever a product with the zeros there may be. Sums stay in registers only where
// every loop over them is unrolled: GCC 12 does so by itself in bf16, not in fp32 (1.6 times as
// slow).
template <int V, typename E>
void scores(const Head<E>& head, int64_t n, Block<E>& block) {
  const int64_t d = head.job.d, column = n % QUERIES<E>;
  const __m512 scale = _mm512_set1_ps(head.job.scale);
  for (int64_t m = 0; m < block.rows; m += ROWS) {
    alignas(64) float p[ROWS][V * LANES];
    __mmask16 real[ROWS][V];
    __m512 sums[ROWS][V] = {};
    products<ROWS, V>(block.k + m * d, d, head.q + n * d, d / GROUP<E>, sums);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 lse = _mm512_loadu_ps(head.lse + n + v * LANES);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        // Rounded as in forward, no fmsub (which GCC makes of mul_ps and sub_ps): the score that
        // makes all of its lse is to give e^0.
        const __m512 score = _mm512_mul_round_ps(sums[r][v], scale, _MM_FROUND_CUR_DIRECTION);
        real[r][v] = m + r < block.keys ? lanes(head.job.N - n - v * LANES) : 0;
        sums[r][v] = _mm512_maskz_mov_ps(real[r][v], exp(_mm512_sub_ps(score, lse)));
        _mm512_store_ps(p[r] + v * LANES, sums[r][v]);
      }
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r += 2)
        store(block.p[m + r] + column + v * LANES, block.p[m + r + 1] + column + v * LANES,
              sums[r][v], sums[r + 1][v]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = _mm512_loadu_ps(head.minus_delta + n + v * LANES);
    products<ROWS, V>(block.v + m * d, d, head.dout + n * d, d / GROUP<E>, sums);
    const auto ds = [&](int r, int v) {
      return _mm512_maskz_mul_ps(real[r][v], _mm512_load_ps(p[r] + v * LANES), sums[r][v]);
    };
    E* pairs = block.ds_pairs + column * block.rows + m * V * LANES;
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r += 2)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m512 x = ds(r, v), y = ds(r + 1, v);
        store(block.ds[m + r] + column + v * LANES, block.ds[m + r + 1] + column + v * LANES, x, y);
        store_packed(pairs + (r * V + GROUP<E> * v) * LANES, V * LANES, x, y);
      }
  }
}

// dK / scale and dV of a block from `queries` queries from n on.
template <int V, typename E>
void keys_gradients(const Head<E>& head, int64_t n, int64_t queries, Block<E>& block) {
  const int64_t d = V * LANES;
  const E *q = head.q_pairs + n * d, *dout = head.dout_pairs + n * d;
  for (int64_t m = 0; m < block.rows; m += ROWS) {
    accumulate<ROWS, V>(block.p[m], QUERIES<E>, dout, queries / GROUP<E>, n > 0, block.dv + m * d);
    accumulate<ROWS, V>(block.ds[m], QUERIES<E>, q, queries / GROUP<E>, n > 0, block.dk + m * d);
  }
}

// dQ^T / scale of V vectors of queries from n on, from a block, onto or over `dq` (d, step).
template <int V, typename E>
void queries_gradient(const Head<E>& head, int64_t n, const Block<E>& block, bool onto, float* dq) {
  constexpr int R = 4;  // divides all d, and is as fast as ROWS
  const E* pairs = block.ds_pairs + n % QUERIES<E> * block.rows;
  for (int64_t c = 0; c < head.job.d; c += R)
    accumulate<R, V>(block.k_pairs + c * block.rows, block.rows, pairs, block.rows / GROUP<E>, onto,
                     dq + c * V * LANES);
}

// --- Jobs ------------------------------------------------------------------------------

template <typename E>
void write_keys(const Head<E>& head, int64_t first, const Block<E>& block) {
  const __m512 scale = _mm512_set1_ps(head.job.scale);
  for (int64_t m = 0; m < block.keys; ++m)
    for (int64_t c = 0; c < head.job.d; c += LANES) {
      const int64_t at = m * head.job.d + c;
      const __m512 dk = _mm512_mul_ps(_mm512_loadu_ps(block.dk + at), scale);
      store(head.gradient(first + m, 1) + c, head.gradient(first + m, 2) + c,
            dk, _mm512_loadu_ps(block.dv + at));
    }
}

template <typename E>
void run(int64_t begin, int64_t end, void* context) {
  const Job<E>& job = *static_cast<Job<E>*>(context);
  Block<E> block;
  for (int64_t index = begin; index < end; ++index) {
    const Head<E> head(job, index / job.groups);
    const int64_t first = index % job.groups * job.group, last = std::min(first + job.group, job.N);
    const int64_t rows = tiles_of(last - first, tiles_of(last - first, KEYS));  // blocks alike
    const int64_t most = tiles_of(rows, ROWS) * ROWS;
    float* dq = job.dq + index * job.padded * job.d;
    for (int64_t m = first; m < last; m += most) {
      pack_keys(head, m, std::min(most, last - m), block);
      for (int64_t n = 0; n < job.padded; n += QUERIES<E>) {
        const int64_t queries = std::min(QUERIES<E>, job.padded - n);
        for (int64_t i = n; i < n + queries; i += STEP)
          with_vectors(std::min<int64_t>(STEP, n + queries - i) / LANES, [&](auto V) {
            scores<V>(head, i, block);
            queries_gradient<V>(head, i, block, m > first, dq + i * job.d);
          });
        with_vectors(job.d / LANES, [&](auto V) { keys_gradients<V>(head, n, queries, block); });
      }
      write_keys(head, m, block);
    }
  }
}

// dQ of a step of queries: the sum over groups, transposed.
template <typename E>
void write_queries(int64_t begin, int64_t end, void* context) {
  const Job<E>& job = *static_cast<Job<E>*>(context);
  const int64_t steps = tiles_of(job.padded, STEP), d = job.d, size = job.padded * d;
  const __m512 scale = _mm512_set1_ps(job.scale);
  for (int64_t index = begin; index < end; ++index) {
    const Head<E> head(job, index / steps);
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
        alignas(64) E pairs[2 * LANES];
        side_by_side(pairs, _mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale));
        const int64_t real = std::min<int64_t>(LANES, job.N - first - n);
        for (int64_t l = 0; l < real; ++l)
          std::memcpy(head.gradient(first + n + l, 0) + c, pairs + 2 * l, 2 * sizeof(E));
      }
  }
}

template <typename E>
int32_t backward(
    const void* qkv, const int64_t* stride_qkv, const void* dout, const int64_t* stride_dout,
    const void* out, const int64_t* stride_out, const float* lse, void* dqkv,
    const int64_t* shape, float scale, ParallelFor parallel_for) {
  const int64_t N = shape[1], h = shape[2], d = shape[3], heads = shape[0] * h;
  const int64_t at_once = tiles_of(heads, tiles_of(heads, HEADS));
  const int64_t parts = std::min(tiles_of(JOBS, at_once), tiles_of(N, KEYS));
  const int64_t group = tiles_of(tiles_of(N, parts), ROWS) * ROWS, groups = tiles_of(N, group);
  const int64_t padded = tiles_of(N, LANES) * LANES, steps = tiles_of(padded, STEP);
  // Kept from call to call: fresh pages cost as much as packing.
  static thread_local std::vector<E> memory;
  static thread_local std::vector<float> memory_of_sums;
  E* packed;
  float* sums;
  try {
    packed = aligned(memory, at_once * 4 * padded * d);
    sums = aligned(memory_of_sums, at_once * padded * (2 + groups * d));
  } catch (const std::bad_alloc&) {
    return 1;
  }
  const auto rows = [](const void* data, const int64_t* stride) {
    return Rows<E>{static_cast<const E*>(data), stride[0], stride[1]};
  };
  Job<E> job = {rows(qkv, stride_qkv), rows(dout, stride_dout), rows(out, stride_out), lse,
             static_cast<E*>(dqkv), N, h, d, scale, padded, groups, group,
             packed, sums, sums + at_once * 2 * padded, 0};
  for (; job.first < heads; job.first += at_once) {
    const int64_t count = std::min(at_once, heads - job.first);
    if (parallel_for(0, count * steps, 1, pack_queries<E>, &job) ||
        parallel_for(0, count * groups, 1, run<E>, &job) ||
        parallel_for(0, count * steps, 1, write_queries<E>, &job))
      return 1;
  }
  return 0;
}

}  // namespace

#endif

// qkv (B, N, 3, h, d), dout and out (B, N, h, d), of elements of `bytes`, each with its strides
// {b, n} and all else contiguous; lse (B, N, h) as forward gives it; dqkv (B, N, 3, h, d) is
// written. Shape and returns as forward's.
extern "C" int32_t uniformer_attention_bwd(
    [[maybe_unused]] const void* qkv, [[maybe_unused]] const int64_t* stride_qkv,
    [[maybe_unused]] const void* dout, [[maybe_unused]] const int64_t* stride_dout,
    [[maybe_unused]] const void* out, [[maybe_unused]] const int64_t* stride_out,
    [[maybe_unused]] const float* lse, [[maybe_unused]] void* dqkv, const int64_t* shape,
    [[maybe_unused]] float scale, int32_t bytes, [[maybe_unused]] ParallelFor parallel_for) {
  if (!serves(shape[3], bytes)) return 2;
#if defined(__AVX512F__)
  auto run = backward<float>;
#if defined(__AVX512BF16__)
  if (bytes == 2) run = backward<uint16_t>;
#endif
  return run(qkv, stride_qkv, dout, stride_dout, out, stride_out, lse, dqkv, shape, scale,
             parallel_for);
#endif
  return 2;
}
