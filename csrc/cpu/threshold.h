// The value of the n-th largest of many floats. It lies between two values of a small sample, so
// one pass leaves a fraction of them, and so on until few are left.
#pragma once

#include <cmath>
#include <limits>

#include "simd/rows.h"

namespace kvcomp::cpu {

inline constexpr int kSlack = 16;  // that the loops of rows.h write past the end

struct Threshold {
  float value;
  int num_equal;  // how many of those that equal it fit: none, where the larger ones are enough
};

struct Range {
  float low, high;
};

// Two sampled values that hold the `rank`-th largest of x between them, nearly always: four
// standard deviations of the rank to either side.
inline Range sampled_range(const simd::Rows& rows, const float* x, int count, int rank) {
  constexpr int kSamples = 256;
  float sample[kSamples];
  const int step = count / kSamples;
  for (int i = 0; i < kSamples; ++i) sample[i] = x[i * step];
  const float at = static_cast<float>(rank) * kSamples / count;
  const float margin = 2 + 4 * std::sqrt(at * (kSamples - at) / kSamples);
  const int after = static_cast<int>(at + margin), before = static_cast<int>(at - margin);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  int ignored;
  return {after <= kSamples ? rows.nth_largest(sample, kSamples, after, &ignored) : -infinity,
          before >= 1 ? rows.nth_largest(sample, kSamples, before, &ignored) : infinity};
}

// The rank-th largest of x, 1 <= rank <= count, or what separates it from the next; `space` holds
// count + kSlack floats.
inline Threshold find_threshold(const simd::Rows& rows, const float* x, int count, int rank,
                                float* space) {
  constexpr int kFew = 1024;
  const float* left = x;
  int num_left = count, place = rank, num_above;
  for (bool shrinks = true; shrinks && num_left > kFew;) {
    const Range range = sampled_range(rows, left, num_left, place);
    const int num_inside = rows.bracket(left, num_left, range.low, range.high, space, &num_above);
    if (place <= num_above || place > num_above + num_inside) {  // an unlucky sample: start again
      left = x, num_left = count, place = rank;
      break;
    }
    shrinks = num_inside < num_left - num_left / 4;
    left = space, num_left = num_inside, place -= num_above;
    if (range.low == range.high) return {range.low, place};
  }
  const float value = rows.nth_largest(left, num_left, place, &num_above);
  return {value, place - num_above};
}

}  // namespace kvcomp::cpu
