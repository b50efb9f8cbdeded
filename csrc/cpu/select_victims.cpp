// The lowest-scored tokens of each row and unit, the newest protected: the value of the last one to
// leave is found, and where only some of those that equal it leave, they are ranked anew, by age.
// Bytes: scores and positions, read once or twice.
#include <bit>

#include "kernels.h"
#include "parallel.h"
#include "threshold.h"

namespace kvcomp::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void select_row(const SelectVictimsParams& p, const simd::Rows& rows, int batch, int unit) {
  const float* scores = p.scores + batch * p.stride_scores_b + unit * p.stride_scores_u;
  const std::int32_t* positions =
      p.positions + batch * p.stride_positions_b + unit * p.stride_positions_u;
  std::int32_t* victims = p.victims + (std::int64_t{batch} * p.num_units + unit) * p.num_victims;
  std::int32_t* const end = victims + p.num_victims;
  const int length = p.seq_lens[batch];
  const int count = length - p.kept_lens[batch];
  if (count <= 0) {
    std::fill(victims, end, -1);
    return;
  }

  static thread_local Workspace workspace;
  const std::size_t room = length + kSlack;
  float* ranking = workspace.get(2 * room);  // the largest leave
  float* space = ranking + room;

  std::int32_t newest = positions[0];
  for (int i = 1; i < length; ++i) newest = std::max(newest, positions[i]);
  const auto age = [=](int i) { return newest - static_cast<std::uint32_t>(positions[i]); };
  const auto num_recent = static_cast<std::uint32_t>(p.num_recent);
  // The protected ones tie with scores of +inf, and being the newest leave after them.
  for (int i = 0; i < length; ++i) {
    const float cost = scores[i] >= -kInfinity ? -scores[i] : kInfinity;
    ranking[i] = age(i) >= num_recent ? cost : -kInfinity;
  }
  Threshold threshold = find_threshold(rows, ranking, length, count, space);
  int num_equal = 0;
  for (int i = 0; i < length; ++i) num_equal += ranking[i] == threshold.value;
  if (0 < threshold.num_equal && threshold.num_equal < num_equal) {
    // As integers ages are in the order of the floats with the same bits, all of them normal.
    constexpr std::uint32_t kOldest = 0x7effffff, kSmallest = 0x00800000;
    for (int i = 0; i < length; ++i) {
      const float by_age = std::bit_cast<float>(std::min(age(i), kOldest) + kSmallest);
      const float tied = ranking[i] == threshold.value ? by_age : 0.0f;
      ranking[i] = ranking[i] > threshold.value ? kInfinity : tied;
    }
    threshold = find_threshold(rows, ranking, length, count, space);
  }
  auto* found = reinterpret_cast<std::int32_t*>(space);
  rows.select(ranking, length, threshold.value, threshold.num_equal, 0, found);
  std::fill(std::copy_n(found, count, victims), end, -1);
}

}  // namespace

void select_victims(const SelectVictimsParams& p) {
  constexpr std::int64_t kGrain = 1 << 13;  // scores that are worth a thread
  const simd::Rows& rows = simd::rows();
  const int num_rows = p.batch * p.num_units;
  const int threads = std::min(num_rows, num_threads(std::int64_t{num_rows} * p.num_slots, kGrain));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int row = 0; row < num_rows; ++row) {
    select_row(p, rows, row / p.num_units, row % p.num_units);
  }
}

}  // namespace kvcomp::cpu
