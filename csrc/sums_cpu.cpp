// Sums of the columns of a matrix in bf16, added up in fp32: a bias's gradient.
//
// A thread has a share of the columns, and passes once over their rows. The library would first
// write the matrix in fp32.

#include <algorithm>

#include "cpu.h"

namespace {

struct Job {
  const bfloat16* data;
  int64_t rows, columns;
  float* sums;
};

void add(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  const int64_t step = job.columns;
  float* __restrict sums = job.sums;
  std::fill(sums + begin, sums + end, 0.0f);
  int64_t row = 0;
  for (; row + 4 <= job.rows; row += 4) {  // so that sums are fetched and stored a quarter as often
    const bfloat16* from = job.data + row * step;
    for (int64_t c = begin; c < end; ++c)
      sums[c] += (from[c] + float(from[c + step])) +
                 (from[c + 2 * step] + float(from[c + 3 * step]));
  }
  for (; row < job.rows; ++row)
    for (int64_t c = begin; c < end; ++c) sums[c] += job.data[row * step + c];
}

}  // namespace

// `data` is (rows, columns), contiguous. Returns 0.
extern "C" int32_t uniformer_column_sums(
    const bfloat16* data, int64_t rows, int64_t columns, float* sums, ParallelFor parallel_for) {
  Job job = {data, rows, columns, sums};
  return parallel_for(0, columns, 64, add, &job);
}
