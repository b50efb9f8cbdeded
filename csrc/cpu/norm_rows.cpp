// RMS norm of rows. Bytes: x and the weights, read once, and out.
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {

void norm_rows(const NormRowsParams& p) {
  constexpr std::int64_t kGrain = 1 << 16;  // elements that are worth a thread
  const simd::TypedRows& rows = typed(simd::rows(), p.dtype);
  const std::int64_t size = size_of(p.dtype), bytes = p.width * size;
  const int padded = static_cast<int>(simd::padded(p.width));
  const bool whole = padded == p.width;
  const float over = 1.0f / static_cast<float>(p.width);
  const int threads = num_threads(p.num_rows * p.width, kGrain);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Workspace workspace;
    char *weight = nullptr, *row = nullptr;  // with zeros past the width
    if (!whole) {
      weight = reinterpret_cast<char*>(workspace.get(2 * padded));
      row = weight + padded * size;
      std::memset(weight, 0, 2 * padded * size);
      std::memcpy(weight, p.weight, bytes);
    }
#pragma omp for
    for (std::int64_t i = 0; i < p.num_rows; ++i) {
      const char* x = static_cast<const char*>(p.x) + i * bytes;
      char* out = static_cast<char*>(p.out) + i * bytes;
      if (whole) {
        rows.norm(x, p.weight, padded, over, p.eps, out);
        continue;
      }
      std::memcpy(row, x, bytes);
      rows.norm(row, weight, padded, over, p.eps, row);
      std::memcpy(out, row, bytes);
    }
  }
}

}  // namespace kvcomp::cpu
