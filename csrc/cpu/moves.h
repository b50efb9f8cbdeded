// How the holes of a row are filled with its last survivors.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kvcomp::cpu {

// The moves of a row of `length` slots that loses `holes`, ascending: move(hole, survivor) for each
// hole below the new length.
template <class Move>
void for_each_move(const std::int32_t* holes, const std::int32_t* end, int length, Move move) {
  const int kept = length - static_cast<int>(end - holes);
  const std::int32_t* const in_tail = std::lower_bound(holes, end, kept);
  const std::int32_t* next = in_tail;
  int survivor = kept;
  for (const std::int32_t* hole = holes; hole < in_tail; ++hole, ++survivor) {
    for (; next < end && *next == survivor; ++next) ++survivor;
    move(*hole, survivor);
  }
}

}  // namespace kvcomp::cpu
