// A matrix product over channels on the CPU, with the norm before it, drop path and residual behind.
//
//   y = residual + scale * (norm(x) W^T + bias)
//
// A chunk of tokens is normalised on its way into the cache, and its result, when it is complete,
// written with all that is to be done to it: x, the residual and y each pass by once.

#include "tokens_cpu.h"

namespace {

#if defined(__AVX512F__)

struct Job : Pointwise {
  float eps;
  void* tiles;  // of all tokens, where there are few
  bool full;    // memory
};

template <typename E>
void by_tokens(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  static thread_local std::vector<E> memory;
  const int64_t N = job.weight.rows, K = job.weight.columns, chunk = chunk_of(end - begin, K * sizeof(E));
  try {
    E* tiles = aligned(memory, chunk * K);
    for (int64_t token = begin; token < end; token += chunk) {
      const int64_t count = std::min(chunk, end - token);
      read(job.x, job.norm, job.eps, token, count, K, tiles);
      multiply(job.weight, 0, N, tiles, count, IntoRows{job.y, N, token, count});
    }
  } catch (const std::bad_alloc&) {
    job.full = true;
  }
}

template <typename E>
void by_channels(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  try {
    multiply(job.weight, begin * N, end * N, static_cast<E*>(job.tiles), job.tokens,
             IntoRows{job.y, job.weight.rows, 0, job.tokens});
  } catch (const std::bad_alloc&) {
    job.full = true;
  }
}

template <typename E>
int32_t forward(Job& job, ParallelFor parallel_for) {
  if (job.tokens > FEW)
    return parallel_for(0, job.tokens, LANES, by_tokens<E>, &job) || job.full;
  static thread_local std::vector<E> memory;
  try {
    job.tiles = aligned(memory, FEW * job.weight.columns);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  read(
      job.x, job.norm, job.eps, 0, job.tokens, job.weight.columns, static_cast<E*>(job.tiles));
  return parallel_for(0, job.weight.rows / N, 4, by_channels<E>, &job) || job.full;
}

#endif

}  // namespace

// Whether `uniformer_pointwise_fwd` serves such a product: in bf16 where `half`, else in fp32.
extern "C" int32_t uniformer_pointwise_fwd_serves(int64_t rows, int64_t columns, int32_t half) {
  return serves({nullptr, rows, columns, 0, {nullptr, 0}}, half);
}

// Products in bf16 where `half`, else in fp32; `eps` is the norm's. Returns 0, 1 where memory ran
// out, 2 for what it does not serve.
extern "C" int32_t uniformer_pointwise_fwd(
    const Pointwise* call, [[maybe_unused]] float eps, int32_t half,
    [[maybe_unused]] ParallelFor parallel_for) {
  if (!serves(call->weight, half)) return 2;
#if defined(__AVX512F__)
  try {
    Job job = {*call, eps, nullptr, false};
    Parameters parameters;
    parameters.widen(job.norm, job.weight.columns, eps);
    parameters.widen(job.weight.bias, job.weight.rows);
    parameters.widen(job.y, job.tokens);
    static thread_local std::vector<uint16_t> memory;
    if (cast(job.weight, half, memory, parallel_for)) return 1;
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
