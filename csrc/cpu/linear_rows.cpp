// A few rows through a matrix of weights, which lie as they are: no packing. A part takes a run of
// outputs. Bytes: the weights, read once for all rows: those that a cache holds go through all
// groups of rows before the next ones.
#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {

void linear_rows(const LinearRowsParams& p) {
  if (p.num_rows == 0 || p.num_outputs == 0) return;
  constexpr std::int64_t kGrain = 1 << 16;  // weights that are worth a thread
  constexpr std::int64_t kParts = 4;   // of a thread, so that one that falls behind takes fewer
  constexpr std::int64_t kBlock = 32;  // outputs: what is computed together stays together
  constexpr std::int64_t kCached = 1 << 17;  // bytes of weights that stay in L2 for all groups
  constexpr std::int64_t kFew = 8;           // outputs that are reduced together
  const simd::Linear& linear = typed(simd::rows(), p.dtype).linear;
  const std::int64_t size = size_of(p.dtype);
  const std::int64_t group_size = linear.size(std::min(p.num_rows, linear.most_rows), p.width);
  const std::int64_t groups = (p.num_rows + linear.most_rows - 1) / linear.most_rows;
  static thread_local Workspace workspace;
  float* x = workspace.get(groups * group_size);
  const auto for_groups = [&](const auto& f) {  // (first row, rows, prepared)
    float* prepared = x;
    for (int row = 0; row < p.num_rows; row += linear.most_rows, prepared += group_size) {
      f(row, std::min(p.num_rows - row, linear.most_rows), prepared);
    }
  };
  for_groups([&](int row, int rows, float* prepared) {
    linear.prepare(p.x + row, rows, p.width, prepared);
  });

  const std::int64_t blocks = (p.num_outputs + kBlock - 1) / kBlock;
  const std::int64_t fitting = kCached / std::max<std::int64_t>(p.width * size, 1);
  const std::int64_t cached = groups == 1 ? p.num_outputs : std::max(fitting / kFew * kFew, kFew);
  const std::int64_t work = p.num_outputs * p.width * groups;
  const int threads = num_threads(work, kGrain);
  const std::int64_t parts =
      std::min(blocks, threads * std::clamp<std::int64_t>(work / threads / kGrain, 1, kParts));
  const auto run_part = [&](std::int64_t part) {
    const std::int64_t first = blocks * part / parts * kBlock;
    const std::int64_t last = std::min(blocks * (part + 1) / parts * kBlock, p.num_outputs);
    const auto at = [&](const void* data, std::int64_t element) {
      return static_cast<const char*>(data) + element * size;
    };
    for (std::int64_t out = first; out < last; out += cached) {
      const std::int64_t count = std::min(cached, last - out);
      for_groups([&](int row, int rows, const float* prepared) {
        linear.multiply(prepared, rows, at(p.weight, out * p.stride_weight), p.stride_weight,
                        p.width, count, p.bias ? at(p.bias, out) : nullptr,
                        static_cast<char*>(p.out) + (row * p.num_outputs + out) * size,
                        p.num_outputs);
      });
    }
  };
  if (parts == 1) {
    run_part(0);
  } else {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t part = 0; part < parts; ++part) run_part(part);
  }
}

}  // namespace kvcomp::cpu
