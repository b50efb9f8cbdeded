// The hits of up to 32 steps replayed into last-hit step and longest interval, 32 tokens at a time:
// their state stays in registers over all steps. Bytes: the bits and two integers per token.
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

void update_row(const RecurrenceUpdateParams& p, const simd::Rows& rows, int batch, int unit) {
  const std::int64_t row = std::int64_t{batch} * p.num_units + unit;
  std::int32_t* last_hit = p.last_hit + row * p.num_slots;
  std::int32_t* longest = p.longest + row * p.num_slots;
  const std::uint32_t* hits = p.hits + batch * p.stride_hits_b + std::int64_t{unit} * p.num_words;

  const int length = p.seq_lens[batch];
  for (int slot = std::max(0, length - p.born[batch]); slot < length; ++slot) {
    last_hit[slot] = p.first_step + std::max(0, p.num_steps - (length - slot)) - 1;
    longest[slot] = 0;
  }
  int slot = 0;
  for (; slot + 32 <= length; slot += 32) {
    rows.replay(hits + slot / 32, p.stride_hits_r, p.num_steps, p.first_step, last_hit + slot,
                longest + slot);
  }
  if (const int rest = length - slot; rest > 0) {  // in a copy: what lies past the end stays
    std::int32_t last[32] = {}, interval[32] = {};
    std::memcpy(last, last_hit + slot, rest * 4);
    std::memcpy(interval, longest + slot, rest * 4);
    rows.replay(hits + slot / 32, p.stride_hits_r, p.num_steps, p.first_step, last, interval);
    std::memcpy(last_hit + slot, last, rest * 4);
    std::memcpy(longest + slot, interval, rest * 4);
  }
}

}  // namespace

void recurrence_update(const RecurrenceUpdateParams& p) {
  constexpr std::int64_t kGrain = 1 << 18;  // bits that are worth a thread
  const simd::Rows& rows = simd::rows();
  const int num_rows = p.batch * p.num_units;
  const std::int64_t work = std::int64_t{num_rows} * p.num_slots * p.num_steps;
  const int threads = std::min(num_rows, num_threads(work, kGrain));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int row = 0; row < num_rows; ++row) {
    update_row(p, rows, row / p.num_units, row % p.num_units);
  }
}

}  // namespace kvcomp::cpu
