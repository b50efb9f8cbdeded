// Where a row of the pool lies.
#pragma once

#include <cstdint>

#include "kvcomp/params.h"

namespace kvcomp::cpu {

// One head's rows. Rows that are asked for in sequence are found in a step.
class PoolHead {
 public:
  // `head` counts over the batch.
  PoolHead(const PoolBlocks& pool, std::int64_t head) : pool_(pool), head_(head) {}

  // K of a row; V follows, and of codes the word.
  char* operator[](std::int32_t row) {
    while (row < pool_.first_row[block_]) --block_;
    while (row >= pool_.first_row[block_ + 1]) ++block_;
    const std::int32_t first = pool_.first_row[block_], end = pool_.first_row[block_ + 1];
    const std::int64_t index = head_ * (end - first) + (row - first);
    return static_cast<char*>(pool_.data[block_]) + index * pool_.row_bytes;
  }

 private:
  const PoolBlocks& pool_;
  const std::int64_t head_;
  int block_ = 0;
};

}  // namespace kvcomp::cpu
