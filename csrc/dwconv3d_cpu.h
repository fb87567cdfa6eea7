// What the two CPU kernels of dwconv3d share: vectors over channels, and frames packed for them.
//
// Plain C++ behind a C interface: it needs no header of PyTorch, whose threads come as a pointer.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu.h"

#if defined(__AVX512F__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

constexpr int64_t MAX_KERNEL = 9;

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

typedef uint16_t shorts __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef uint32_t words __attribute__((vector_size(LANES * sizeof(uint32_t))));

struct Shape {
  int64_t b, t, h, w, c;
};

struct Tensor {
  const void* data;
  const int64_t* stride;  // of b, t, h, w, c, in elements
};

// LANES elements in fp32, and back. The compiler makes vectors of loops over fp16, if slowly, and
// not over bf16.
inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline vec load(const _Float16* from) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#endif
  float wide[LANES];
  for (int l = 0; l < LANES; ++l) wide[l] = float(from[l]);
  return load(wide);
}

inline vec load(const bfloat16* from) {
  shorts value;
  std::memcpy(&value, from, sizeof value);
  const words wide = __builtin_convertvector(value, words) << 16;
  return (vec)wide;  // the same bits
}

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }

inline void store(_Float16* to, vec value) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_storeu_si256((__m256i*)to, half);
#endif
  for (int l = 0; l < LANES; ++l) to[l] = _Float16(value[l]);
}

inline void store(bfloat16* to, vec value) {  // to the nearest, ties to even
  const words wide = (words)value;  // the same bits
  const words rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  const words none = (words)(value != value);  // all ones where there is no number
  const shorts half = __builtin_convertvector((rounded & ~none) | (none & 0x7fc0), shorts);
  std::memcpy(to, &half, sizeof half);
}

// Rectangle of frame t of `source` from (h, w) on, `size` large, `blocks` blocks of channels from c
// on -> `out` (blocks, h, w, LANES); zeros outside.
template <typename scalar>
void pack(
    const Tensor& source, const Shape& shape, Shape at, Shape size, int64_t blocks, float* out) {
  const int64_t* stride = source.stride;
  const scalar* frame = static_cast<const scalar*>(source.data) + at.b * stride[0] +
                        at.t * stride[1] + at.c * stride[4];
  const int64_t plane = size.h * size.w * LANES, channels = shape.c - at.c;
  const int64_t full = stride[4] == 1 ? std::min(blocks, channels / LANES) : 0;
  for (int64_t h = at.h; h < at.h + size.h; ++h) {
    const bool inside = h >= 0 && h < shape.h;
    for (int64_t w = at.w; w < at.w + size.w; ++w, out += LANES) {
      if (!inside || w < 0 || w >= shape.w) {
        for (int64_t block = 0; block < blocks; ++block) store(out + block * plane, vec{});
        continue;
      }
      const scalar* pixel = frame + h * stride[2] + w * stride[3];
      for (int64_t block = 0; block < full; ++block)
        store(out + block * plane, load(pixel + block * LANES));
      for (int64_t block = full; block < blocks; ++block)
        for (int64_t l = 0; l < LANES; ++l) {
          const int64_t c = block * LANES + l;
          out[block * plane + l] = c < channels ? float(pixel[c * stride[4]]) : 0.0f;
        }
    }
  }
}

}  // namespace
