// Rows of K and V in eight bits, each with a scale of its own. One task makes a run of tokens of
// one head. Bytes: the rows, read once, and half of that (of fp32, a quarter) written.
#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {

void quantize_rows(const QuantizeRowsParams& p) {
  constexpr std::int64_t kGrain = 1 << 15;  // elements that are worth a thread
  constexpr int kTokens = 64;               // of a task
  constexpr int kMostHeadDim = 512;
  const simd::Rows& all = simd::rows();
  const simd::TypedRows& rows = typed(all, p.dtype);
  const std::int64_t size = size_of(p.dtype);
  const int tasks_per_head = (p.num_tokens + kTokens - 1) / kTokens;
  const std::int64_t num_tasks = std::int64_t{p.batch} * p.num_heads * tasks_per_head;
  const std::int64_t work =
      std::int64_t{p.batch} * p.num_heads * p.num_tokens * 2 * std::int64_t{p.head_dim};
  const int threads = num_threads(work, kGrain);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t task = 0; task < num_tasks; ++task) {
    const std::int64_t head = task / tasks_per_head, b = head / p.num_heads, h = head % p.num_heads;
    const std::int64_t first = task % tasks_per_head * kTokens;
    const std::int64_t last = std::min<std::int64_t>(first + kTokens, p.num_tokens);
    const char* k = static_cast<const char*>(p.k) + (b * p.stride_k_b + h * p.stride_k_h) * size;
    const char* v = static_cast<const char*>(p.v) + (b * p.stride_v_b + h * p.stride_v_h) * size;
    std::int8_t* k_codes = p.k_codes + b * p.stride_k_codes_b + h * p.stride_k_codes_h;
    std::int8_t* v_codes = p.v_codes + b * p.stride_v_codes_b + h * p.stride_v_codes_h;
    std::uint32_t* words = p.words + b * p.stride_words_b + h * p.stride_words_h;
    float row[kMostHeadDim];
    for (std::int64_t t = first; t < last; ++t) {
      rows.widen(k + t * p.stride_k_t * size, p.head_dim, row);
      if (p.turn) all.codes.turn(row, p.head_dim);
      const std::uint32_t low =
          all.codes.quantize(row, p.head_dim, k_codes + t * p.stride_k_codes_t);
      rows.widen(v + t * p.stride_v_t * size, p.head_dim, row);
      const std::uint32_t high =
          all.codes.quantize(row, p.head_dim, v_codes + t * p.stride_v_codes_t);
      words[t] = high << 16 | low;
    }
  }
}

}  // namespace kvcomp::cpu
