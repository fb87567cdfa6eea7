// What all sources for the CPU share: shares of work, and PyTorch's threads to do them, which come
// as a pointer, so that none needs a header of PyTorch.

#pragma once

#include <cstdint>

namespace {

typedef void (*Body)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

}  // namespace
