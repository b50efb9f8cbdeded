// Where rows lie in the host pool, whose pinned memory a GPU reads and writes at its own addresses.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

// K of a row; right behind it V, and of codes the word. `head` counts over all sequences' heads. On
// a GPU nobody has checked rows: null for one that the pool has not.
__device__ inline char* pool_row(const PoolBlocks& pool, int64_t head, int row) {
  if (row < 0 || row >= pool.first_row[pool.num_blocks]) return nullptr;
  int block = 0;
  while (row >= pool.first_row[block + 1]) ++block;
  const int first = pool.first_row[block], size = pool.first_row[block + 1] - first;
  return static_cast<char*>(pool.data[block]) + (head * size + (row - first)) * pool.row_bytes;
}

}  // namespace kvcomp
