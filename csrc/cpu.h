// PyTorch's threads, which come as a pointer: no source on the CPU needs a header of PyTorch.

#pragma once

#include <cstdint>

namespace {

typedef void (*Body)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

}  // namespace
