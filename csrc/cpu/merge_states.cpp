// Two partial attentions over disjoint tokens into one, a row per head. Bytes: two outputs read,
// one written.
#include <cmath>
#include <limits>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

float log_add_exp(float a, float b) {
  if (a == b) return a + 0.693147181f;  // also where both are infinite
  return std::fmax(a, b) + std::log1p(std::exp(-std::fabs(a - b)));
}

// 0 for a side that attended to nothing, even where the other did not either.
float weight(float lse, float total) {
  return total == -std::numeric_limits<float>::infinity() ? 0.0f : std::exp(lse - total);
}

}  // namespace

void merge_states(const MergeStatesParams& p) {
  constexpr std::int64_t kGrain = 1 << 17;  // elements that are worth a thread
  const simd::TypedRows& rows = typed(simd::rows(), p.dtype);
  const std::int64_t bytes = std::int64_t{p.head_dim} * size_of(p.dtype);
  const char *out_a = static_cast<const char*>(p.out_a), *out_b = static_cast<const char*>(p.out_b);
  char* out = static_cast<char*>(p.out);
  const int threads = num_threads(p.num_rows * p.head_dim, kGrain);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t row = 0; row < p.num_rows; ++row) {
    const float a = p.lse_a[row], b = p.lse_b[row], lse = log_add_exp(a, b);
    p.lse[row] = lse;
    rows.blend(out_a + row * bytes, weight(a, lse), out_b + row * bytes, weight(b, lse), p.head_dim,
               out + row * bytes);
  }
}

}  // namespace kvcomp::cpu
