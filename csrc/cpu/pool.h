// Where a row of the pool lies.
#pragma once

#include <cstdint>

#include "kvcomp/params.h"

namespace kvcomp::cpu {

// One head's rows. Rows that are asked for in sequence are found in a step.
class PoolHead {
 public:
  // `head` counts over the batch.
  PoolHead(const PoolBlocks& pool, std::int64_t head, std::int64_t row_bytes)
      : pool_(pool), head_(head), row_bytes_(row_bytes) {}

  // K of a row; V follows.
  char* operator[](std::int32_t row) {
    while (row < pool_.first_row[block_]) --block_;
    while (row >= pool_.first_row[block_ + 1]) ++block_;
    const std::int32_t first = pool_.first_row[block_], end = pool_.first_row[block_ + 1];
    const std::int64_t index = head_ * (end - first) + (row - first);
    return static_cast<char*>(pool_.data[block_]) + index * 2 * row_bytes_;
  }

 private:
  const PoolBlocks& pool_;
  const std::int64_t head_, row_bytes_;
  int block_ = 0;
};

}  // namespace kvcomp::cpu
