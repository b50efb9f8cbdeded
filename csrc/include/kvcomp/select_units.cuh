// select_units: the tokens of the best units that fit a budget, as ascending pool rows.
//
// Grid (heads, sequences), 1024 threads. Units are taken in the order of a 32-bit key, which is
// lower for a higher score, then of their number. The block finds the key of the last unit that is
// taken, see radix_select.cuh, where a unit counts as many times as it has tokens: the last place
// is where the budget is full. Then each warp adds up what is taken in its stretch of units, which
// says where its rows begin, and writes them, a unit at a time.
//
// Bytes: 8 per unit, read once per pass (about six), from L1 after the first up to some 20K units
// and from L2 beyond; 4 per token of the budget written. A context of 128K is 64 KB per head: the
// time is latency and barriers, where a row is triggered; elsewhere -1 is written and no more.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"
#include "kvcomp/radix_select.cuh"

namespace kvcomp {

struct SelectUnitsTile {
  static constexpr int kWarps = 32, kThreads = kWarps * 32;
  static constexpr int kLoads = 4;  // units in flight per thread
};

struct UnitOrder {
  const float* scores;
  const int32_t* starts;
  int32_t budget;

  // Units first, first + step, ... below end, no tokens past it. All loads are under way at once.
  // On a GPU nobody has checked that starts ascend, and more tokens than the budget are as many.
  template <int kLoads>
  __device__ void load(int first, int step, int end, unsigned (&keys)[kLoads],
                       int (&sizes)[kLoads]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int unit = first + i * step;
      keys[i] = unit < end ? ~ordered_bits(scores[unit]) : 0;
      sizes[i] = unit < end ? min(max(starts[unit + 1] - starts[unit], 0), budget) : 0;
    }
  }
};

__global__ void __launch_bounds__(SelectUnitsTile::kThreads, 1)
    select_units_kernel(const __grid_constant__ SelectUnitsParams p) {
  using Tile = SelectUnitsTile;
  constexpr int kThreads = Tile::kThreads, kWarps = Tile::kWarps, kLoads = Tile::kLoads;
  static_assert(kWarps == 32, "a lane per warp when each warp adds up what all found");
  __shared__ CutSearch search;
  __shared__ int warp_ahead[kWarps], warp_tied[kWarps];

  const int head = blockIdx.x, sequence = blockIdx.y;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int32_t* rows = p.rows + (static_cast<int64_t>(sequence) * p.num_heads + head) * p.budget;
  // On a GPU nobody has checked it.
  const int count = p.active[sequence] ? min(p.num_indexed[sequence], p.num_units) : 0;
  if (count <= 0) {
    for (int i = thread; i < p.budget; i += kThreads) rows[i] = -1;
    return;
  }
  const UnitOrder order{
      p.scores + sequence * p.stride_scores_b + head * p.stride_scores_h,
      p.starts + sequence * p.stride_starts_b + head * p.stride_starts_h,
      p.budget,
  };
  const auto cut = find_cut<unsigned>(search, p.budget, [&](const auto& use) {
    for (int first = 0; first < count; first += kLoads * kThreads) {
      unsigned keys[kLoads];
      int sizes[kLoads];
      order.load(first + thread, kThreads, count, keys, sizes);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) use(keys[i], sizes[i]);
    }
  });

  // Each warp has a stretch of units. Tokens of it that are ahead of the last key, and tied with
  // it: of these the first `places` are taken.
  const int stretch = (count + kThreads - 1) / kThreads * 32;
  const int begin = min(warp * stretch, count), end = min(begin + stretch, count);
  int ahead = 0, tied = 0;
  for (int first = begin; first < end; first += 32 * kLoads) {
    unsigned keys[kLoads];
    int sizes[kLoads];
    order.load(first + lane, 32, end, keys, sizes);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      ahead += cut.ahead(keys[i]) ? sizes[i] : 0;
      tied += cut.ties(keys[i]) ? sizes[i] : 0;
    }
  }
  ahead = __reduce_add_sync(kFullMask, ahead);
  tied = __reduce_add_sync(kFullMask, tied);
  if (lane == 0) warp_ahead[warp] = ahead, warp_tied[warp] = tied;
  __syncthreads();
  ahead = warp_ahead[lane], tied = warp_tied[lane];
  const int total =
      __reduce_add_sync(kFullMask, ahead) + min(__reduce_add_sync(kFullMask, tied), cut.places);
  ahead = __reduce_add_sync(kFullMask, lane < warp ? ahead : 0);  // of the warps before
  tied = __reduce_add_sync(kFullMask, lane < warp ? tied : 0);
  for (int first = begin; first < end; first += 32) {
    unsigned keys[1];
    int sizes[1];
    order.load(first + lane, 32, end, keys, sizes);
    const int own_ahead = cut.ahead(keys[0]) ? sizes[0] : 0;
    const int own_tied = cut.ties(keys[0]) ? sizes[0] : 0;
    if (!__any_sync(kFullMask, own_ahead || own_tied)) continue;
    const int ahead_through = ahead + sum_through(own_ahead);
    const int tied_through = tied + sum_through(own_tied);
    const int place = ahead_through - own_ahead + min(tied_through - own_tied, cut.places);
    const int taken = ahead_through + min(tied_through, cut.places) - place;
    for (unsigned left = __ballot_sync(kFullMask, taken > 0); left; left &= left - 1) {
      const int source = __ffs(left) - 1, unit = first + source;
      const int from = __shfl_sync(kFullMask, place, source);
      const int size = __shfl_sync(kFullMask, taken, source);
      for (int i = lane; i < size; i += 32) {
        // Beyond the budget only where the sizes are so wrong that their sums overflow.
        if (static_cast<unsigned>(from + i) < static_cast<unsigned>(p.budget)) {
          rows[from + i] = order.starts[unit] + i;
        }
      }
    }
    ahead = __shfl_sync(kFullMask, ahead_through, 31);
    tied = __shfl_sync(kFullMask, tied_through, 31);
  }
  for (int i = max(total, 0) + thread; i < p.budget; i += kThreads) rows[i] = -1;
}

// Starts the kernel through `launch(kernel, grid, block, shared_bytes, args...)`.
template <typename Launch>
void launch_select_units(const SelectUnitsParams& p, const Launch& launch) {
  if (p.batch == 0 || p.num_heads == 0 || p.budget == 0) return;
  launch(select_units_kernel, dim3(p.num_heads, p.batch), dim3(SelectUnitsTile::kThreads), 0, p);
}

}  // namespace kvcomp
