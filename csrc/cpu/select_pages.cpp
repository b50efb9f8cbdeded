// The best pages of each row, ascending: the value of the last one that fits is found first, then
// one pass takes what lies above it and the oldest of what equals it. That value lies between two
// values of a small sample, so one pass leaves a fraction of the scores, and so on until few are
// left. Bytes: the scores, read twice.
#include <functional>
#include <limits>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kSlack = 16;  // that the loops of rows.h write past the end

struct Threshold {
  float value;
  int num_equal;  // how many of those that equal it fit
};

struct Range {
  float low, high;
};

// Two sampled values that hold the `rank`-th largest of x between them, nearly always.
Range sampled_range(const float* x, int count, int rank) {
  constexpr int kSamples = 128, kMargin = 12;  // 2 to 4 standard deviations of the rank
  float sample[kSamples];
  const std::int64_t step = count / kSamples;
  for (int i = 0; i < kSamples; ++i) {
    const float value = x[i * step];
    sample[i] = value == value ? value : -kInfinity;
  }
  std::sort(sample, sample + kSamples, std::greater<>());
  const int at = static_cast<int>(std::int64_t{rank} * kSamples / count);
  return {at + kMargin < kSamples ? sample[at + kMargin] : -kInfinity,
          at >= kMargin ? sample[at - kMargin] : kInfinity};
}

// The rank-th largest of x, 1 <= rank <= count; `space` holds count + kSlack floats.
Threshold find_threshold(const simd::Rows& rows, const float* x, int count, int rank,
                         float* space) {
  constexpr int kFew = 384;
  while (count > kFew) {
    Range range = sampled_range(x, count, rank);
    int num_above;
    int inside = rows.bracket(x, count, range.low, range.high, space, &num_above);
    if (rank <= num_above || rank > num_above + inside) break;  // an unlucky sample
    rank -= num_above;
    if (range.low == range.high) return {range.low, rank};
    x = space;
    const bool shrunk = inside <= count - count / 4;
    count = inside;
    if (!shrunk) break;
  }
  return {};
}

}  // namespace

}  // namespace kvcomp::cpu
