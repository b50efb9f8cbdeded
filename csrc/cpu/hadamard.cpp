// Rows times the Walsh-Hadamard matrix. Bytes: each row, read and written once.
#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {

void hadamard(const HadamardParams& p) {
  constexpr std::int64_t kGrain = 1 << 16;  // elements that are worth a thread
  constexpr int kMostHeadDim = 512;
  const simd::Rows& all = simd::rows();
  const simd::TypedRows& rows = typed(all, p.dtype);
  const std::int64_t bytes = std::int64_t{p.head_dim} * size_of(p.dtype);
  const int threads = num_threads(p.num_rows * p.head_dim, kGrain);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t i = 0; i < p.num_rows; ++i) {
    float row[kMostHeadDim];
    rows.widen(static_cast<const char*>(p.x) + i * bytes, p.head_dim, row);
    all.codes.turn(row, p.head_dim);
    rows.narrow(row, 1.0f, p.head_dim, static_cast<char*>(p.out) + i * bytes);
  }
}

}  // namespace kvcomp::cpu
