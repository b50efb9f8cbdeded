// The mean over the heads of the cosine between a step's queries and those of the step before. One
// task is a sequence. Bytes: both, read once, and one written.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

float similarity(const QuerySimilarityParams& p, const simd::TypedRows& rows, int batch) {
  const std::int64_t size = size_of(p.dtype), row_bytes = p.head_dim * size;
  const char* q = static_cast<const char*>(p.q) + batch * p.stride_q_b * size;
  char* previous = static_cast<char*>(p.previous) + batch * p.num_heads * row_bytes;
  float total = 0.0f, length = 0.0f;
  for (int h = 0; h < p.num_heads; ++h, q += p.stride_q_h * size, previous += row_bytes) {
    float sums[3];
    rows.products(q, previous, p.head_dim, sums);
    const float norms = std::sqrt(sums[0]) * std::sqrt(sums[2]);
    total += norms > 0.0f ? std::clamp(sums[1] / norms, -1.0f, 1.0f) : 0.0f;
    length += sums[2];
    std::memcpy(previous, q, row_bytes);
  }
  constexpr float kUnknown = -std::numeric_limits<float>::infinity();
  return length == 0.0f ? kUnknown : total / static_cast<float>(p.num_heads);
}

}  // namespace

void query_similarity(const QuerySimilarityParams& p) {
  constexpr std::int64_t kGrain = 1 << 17;  // elements that are worth a thread
  const simd::TypedRows& rows = typed(simd::rows(), p.dtype);
  const std::int64_t work = std::int64_t{p.batch} * p.num_heads * p.head_dim;
  const int threads = std::min(p.batch, num_threads(work, kGrain));
  if (threads == 1) {  // most calls: entering a parallel region takes as long as the work
    for (int b = 0; b < p.batch; ++b) p.similarity[b] = similarity(p, rows, b);
    return;
  }
#pragma omp parallel for num_threads(threads)
  for (int b = 0; b < p.batch; ++b) p.similarity[b] = similarity(p, rows, b);
}

}  // namespace kvcomp::cpu
