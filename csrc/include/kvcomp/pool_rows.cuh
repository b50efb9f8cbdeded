// Where rows lie in the host pool, whose pinned memory a GPU reads and writes at its own addresses.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

// K of a row, and right behind it V, `row_bytes` each. `head` counts over all sequences' heads. On
// a GPU nobody has checked rows: null for one that the pool has not.
__device__ inline char* pool_row(const PoolBlocks& pool, int64_t head, int row, int row_bytes) {
  if (row < 0 || row >= pool.first_row[pool.num_blocks]) return nullptr;
  int block = 0;
  while (row >= pool.first_row[block + 1]) ++block;
  const int first = pool.first_row[block], size = pool.first_row[block + 1] - first;
  return static_cast<char*>(pool.data[block]) + (head * size + (row - first)) * 2 * row_bytes;
}

}  // namespace kvcomp
