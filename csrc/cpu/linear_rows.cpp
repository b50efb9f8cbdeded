// A few rows through a matrix of weights, which lie as they are: no packing. A part takes a run of
// outputs. Bytes: the weights, read once for all rows: those that a cache holds go through all
// groups of rows before the next ones.
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {

void linear_rows(const LinearRowsParams& p) {
  if (p.num_rows == 0 || p.num_outputs == 0) return;
  constexpr std::int64_t kGrain = 1 << 16;  // weights that are worth a thread
  constexpr std::int64_t kParts = 4;  // of a thread, so that one that falls behind takes fewer
  constexpr std::int64_t kBlock = 8;  // outputs: what is computed together stays together
  constexpr std::int64_t kCached = 1 << 17;  // bytes of weights that stay in L2 for all groups
  const simd::TypedRows& rows = typed(simd::rows(), p.dtype);
  const std::int64_t size = size_of(p.dtype);
  const int padded = static_cast<int>(simd::padded(p.width));
  const std::int64_t stride = simd::linear_stride(p.width);
  static thread_local Workspace workspace;
  float* x = workspace.get((p.num_rows + 1) * stride);
  for (int r = 0; r < p.num_rows; ++r) {
    const void* row = p.x[r];
    if (padded > p.width) {
      float* whole = x + p.num_rows * stride;
      std::memset(whole, 0, padded * size);
      row = std::memcpy(whole, row, p.width * size);
    }
    rows.prepare_q(row, padded, x + r * stride);
  }

  const std::int64_t blocks = (p.num_outputs + kBlock - 1) / kBlock;
  const std::int64_t groups = (p.num_rows + simd::kLinearRows - 1) / simd::kLinearRows;
  const std::int64_t cached =
      groups == 1 ? p.num_outputs
                  : std::max<std::int64_t>(
                        kCached / std::max<std::int64_t>(p.width * size, 1) / kBlock, 1) *
                        kBlock;
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
      for (int row = 0; row < p.num_rows; row += simd::kLinearRows) {
        rows.linear(x + row * stride, std::min(p.num_rows - row, simd::kLinearRows),
                    at(p.weight, out * p.stride_weight), p.stride_weight, p.width, count,
                    p.bias ? at(p.bias, out) : nullptr,
                    static_cast<char*>(p.out) + (row * p.num_outputs + out) * size, p.num_outputs);
      }
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
