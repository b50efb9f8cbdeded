// New rows behind those of each sequence. Bytes: the rows, read and written once.
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

void copy(const AppendedPart& p, const char* from, char* into, std::int64_t count) {
  const std::int64_t row = std::int64_t{p.width} * p.element;
  if (p.stride_from_d == p.element || p.width == 1) {
    if (p.stride_from_t == row && p.stride_into_t == row) {
      std::memcpy(into, from, count * row);
      return;
    }
    for (std::int64_t t = 0; t < count; ++t) {
      std::memcpy(into + t * p.stride_into_t, from + t * p.stride_from_t, row);
    }
    return;
  }
  for (std::int64_t t = 0; t < count; ++t) {
    for (std::int64_t d = 0; d < p.width; ++d) {
      std::memcpy(into + t * p.stride_into_t + d * p.element,
                  from + t * p.stride_from_t + d * p.stride_from_d, p.element);
    }
  }
}

}  // namespace

void append_rows(const AppendRowsParams& p) {
  constexpr std::int64_t kGrain = 1 << 17;  // bytes that are worth a thread
  const std::int64_t num_rows = std::int64_t{p.batch} * p.num_heads;
  std::int64_t bytes = 0;  // of a token of one head
  for (int i = 0; i < p.num_parts; ++i) bytes += p.parts[i].width * p.parts[i].element;
  const int threads = num_threads(num_rows * p.num_tokens * bytes, kGrain);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const std::int64_t b = row / p.num_heads, head = row % p.num_heads;
    const std::int64_t count = p.added ? p.added[b] : p.num_tokens, first = p.seq_lens[b];
    for (int i = 0; i < p.num_parts; ++i) {
      const AppendedPart& part = p.parts[i];
      if (part.width == 0) continue;  // no values: there may be no memory either
      copy(part,
           static_cast<const char*>(part.from) + b * part.stride_from_b + head * part.stride_from_h,
           static_cast<char*>(part.into) + b * part.stride_into_b + head * part.stride_into_h +
               first * part.stride_into_t,
           count);
    }
  }
  for (std::int32_t b = 0; b < p.batch; ++b) {
    const std::int32_t count = p.added ? p.added[b] : p.num_tokens;
    p.seq_lens[b] += count;
    if (p.logical_lens) p.logical_lens[b] += count;
  }
}

}  // namespace kvcomp::cpu
