// A whole block of the network on the CPU, for inference: its kernels, one after another.
//
//   x = x + dpe(x)    x = x + second(aggregate(first(norm1(x))))    x = x + ffn(norm2(x))
//
// `aggregate` is softmax attention, or a depthwise convolution. What passes between kernels stays in
// memory that the next block finds again, and nothing of Python runs between them: there it takes
// half a millisecond of a block's 7 to 36, for the kernels leave nothing of it in the caches.

#include "tokens_cpu.h"

extern "C" {
int32_t uniformer_pointwise_fwd(const Pointwise*, float, int32_t, ParallelFor);
int32_t uniformer_ffn_fwd(const FFN*, float, int32_t, ParallelFor);
int32_t uniformer_attention_fwd(
    const void*, int64_t, int64_t, void*, float*, const int64_t*, float, int32_t, ParallelFor);
int32_t uniformer_dwconv3d_fwd(
    const void*, const int64_t*, const void*, const void*, void*, const int64_t*, const int64_t*,
    int32_t, int32_t, int32_t, int32_t, ParallelFor);
}

// A depthwise convolution, as `uniformer_dwconv3d_fwd` has it; or none, without a weight.
struct Depthwise {
  const void *weight, *bias;
  int64_t half;
  int64_t kernel[3];
};

// The arguments of a call; all of x's dtype or in fp32.
struct Block {
  int64_t B, T, H, W, C, half;  // x, contiguous
  Depthwise dpe;
  Norm norm1;
  Weight first;
  Depthwise tube;
  int64_t heads;  // of the attention, where there is no tube
  Weight second;
  Norm norm2;
  Weight fc1, fc2;
};

namespace {

constexpr int64_t ROUND = 2048;  // tokens: so many clips at once, or one, to save memory

// The clips of a round.
struct Round {
  const Block& block;
  int64_t clips;
  ParallelFor parallel_for;

  int64_t tokens() const { return clips * block.T * block.H * block.W; }

  int32_t convolve(const Depthwise& conv, const void* x, void* y, bool residual) const {
    const int64_t T = block.T, H = block.H, W = block.W, C = block.C;
    const int64_t shape[] = {clips, T, H, W, C};
    const int64_t strides[] = {T * H * W * C, H * W * C, W * C, C, 1};
    const int32_t dtype = block.half ? 2 : 0, weight_dtype = conv.half ? 2 : 0;
    return uniformer_dwconv3d_fwd(
        x, strides, conv.weight, conv.bias, y, shape, conv.kernel, dtype, weight_dtype, false,
        residual, parallel_for);
  }

  Result into(void* y, const void* residual) const {
    return {y, block.half, {residual, block.C, block.half}, {nullptr, 0}, tokens()};
  }

  int32_t multiply(
      const void* x, const Norm& norm, float eps, const Weight& weight, const Result& y) const {
    const Pointwise call = {{x, weight.columns, block.half}, norm, weight, y, tokens()};
    return uniformer_pointwise_fwd(&call, eps, block.half, parallel_for);
  }

  int32_t attend(const void* qkv, void* out, float scale) const {
    const int64_t N = tokens() / clips, C = block.C;
    const int64_t shape[] = {clips, N, block.heads, C / block.heads};
    return uniformer_attention_fwd(
        qkv, N * 3 * C, 3 * C, out, nullptr, shape, scale, block.half ? 2 : 4, parallel_for);
  }
};

}  // namespace

// x and y are (B, T, H, W, C), contiguous, in bf16 where `half`, else in fp32; `scale` is that of the
// attention's scores. Returns 0, 1 where memory ran out, 2 for what one of the kernels does not serve.
extern "C" int32_t uniformer_block_fwd(
    const Block* call, const void* x, void* y, float eps1, float eps2, float scale,
    ParallelFor parallel_for) {
  const Block& block = *call;
  const int64_t tokens = block.T * block.H * block.W, bytes = block.half ? 2 : 4;
  const int64_t most = std::max<int64_t>(ROUND / tokens, 1), row = block.C * bytes;
  static thread_local std::vector<uint8_t> memory;
  uint8_t *sum, *wide, *narrow;
  try {
    const int64_t rows = std::min(most, block.B) * tokens;
    sum = aligned(memory, rows * (2 * row + block.first.rows * bytes));
    narrow = sum + rows * row;
    wide = narrow + rows * row;
  } catch (const std::bad_alloc&) {
    return 1;
  }
  for (int64_t b = 0; b < block.B; b += most) {
    const Round round = {block, std::min(most, block.B - b), parallel_for};
    const void* in = static_cast<const uint8_t*>(x) + b * tokens * row;
    void* out = static_cast<uint8_t*>(y) + b * tokens * row;
    int32_t code = 0;
    if (block.dpe.weight) {
      code = round.convolve(block.dpe, in, sum, true);
      in = sum;
    }
    code = code ? code : round.multiply(in, block.norm1, eps1, block.first, round.into(wide, nullptr));
    if (!code)
      code = block.tube.weight ? round.convolve(block.tube, wide, narrow, false)
                               : round.attend(wide, narrow, scale);
    code = code ? code : round.multiply(narrow, {}, 0.0f, block.second, round.into(sum, in));
    const FFN ffn = {{sum, block.C, block.half}, block.norm2, block.fc1, block.fc2,
                     round.into(out, sum), round.tokens()};
    code = code ? code : uniformer_ffn_fwd(&ffn, eps2, block.half, parallel_for);
    if (code) return code;
  }
  return 0;
}
