// segment_boundaries: closes a row's open segment, and lets its oldest units stop being local.
//
// Grid (sequences), a warp each. What is read is head 0's; the lanes write a closed segment's end
// for all heads, and ask for the starts of 32 units at a time where some stop being local.
//
// Bytes: some 30 per row, and 4 per head where a segment is closed. Two latencies of a load, three
// where the row is triggered.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

__global__ void __launch_bounds__(32)
    segment_boundaries_kernel(const __grid_constant__ SegmentBoundariesParams p) {
  const int row = blockIdx.x, lane = threadIdx.x;
  int32_t* starts = p.starts + row * p.stride_starts_b;
  const float similarity = p.similarity[row];
  const int newest = p.lengths[row] - 1;
  // On a GPU nobody has checked the counts: starts beyond U are neither read nor written.
  int units = min(max(p.num_units[row], 0), p.max_units);
  int indexed = min(max(p.num_indexed[row], 0), units);
  const int count = newest - starts[units];
  const int num_local = newest - starts[indexed];
  __syncwarp();  // what is written now has been read

  const bool turned = similarity < p.cut_below && count >= p.shortest;
  const bool closes = count > 0 && (turned || count >= p.longest) && units < p.max_units;
  if (closes) {
    ++units;
    for (int head = lane; head < p.num_heads; head += 32) {
      starts[head * p.stride_starts_h + units] = newest;
    }
  }
  const bool triggered = similarity < p.retrieve_below || num_local - p.longest >= p.local;
  if (triggered) {
    // The units that go start before the end just written.
    indexed += count_leading(units - indexed,
                             [&](int i) { return newest - starts[indexed + i] > p.local; });
  }
  if (lane == 0) {
    p.num_units[row] = units;
    p.num_indexed[row] = indexed;
    p.closed[row] = closes ? count : 0;
    p.triggered[row] = triggered;
  }
}

// Starts the kernel through `launch(kernel, grid, block, shared_bytes, args...)`.
template <typename Launch>
void launch_segment_boundaries(const SegmentBoundariesParams& p, const Launch& launch) {
  if (p.batch == 0) return;
  launch(segment_boundaries_kernel, dim3(p.batch), dim3(32), 0, p);
}

}  // namespace kvcomp
