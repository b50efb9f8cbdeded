// select_victims: the lowest-scored tokens of every row and unit, the newest ones protected.
//
// Grid (units, sequences), 1024 threads. Tokens leave in the order of a 64-bit key: score, then
// position. The block finds the key of the last one that leaves, see radix_select.cuh; equal scores
// take all eight rounds. Then each warp counts the victims in its stretch of slots, and writes
// them.
//
// Bytes: 8 per token, read once per pass (about seven) and from L1 after the first: a row of 2K is
// 16 KB. The time is latency and barriers, once per window of steps, so one block per unit will do.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"
#include "kvcomp/radix_select.cuh"

namespace kvcomp {

struct SelectVictimsTile {
  static constexpr int kWarps = 32, kThreads = kWarps * 32;
  static constexpr int kLoads = 4;  // tokens in flight per thread
};

// A unit's tokens and the order in which they leave.
struct LeavingOrder {
  static constexpr std::uint64_t kNever = ~std::uint64_t{0};  // above the key of any score

  const float* scores;
  const int32_t* positions;
  int32_t newest;       // position of the newest token
  unsigned num_recent;  // that never leave

  // Score, then position, the older first.
  __device__ std::uint64_t key(int slot) const {
    const unsigned bits = ordered_bits(scores[slot]);
    const int32_t position = positions[slot];
    const std::uint64_t key =
        std::uint64_t{bits} << 32 | (static_cast<unsigned>(position) ^ 1u << 31);
    const unsigned age = static_cast<unsigned>(newest) - static_cast<unsigned>(position);
    return age >= num_recent ? key : kNever;
  }

  // Of slots first, first + step, ... below end; kNever past it. All loads are under way at once.
  __device__ void load_keys(int first, int step, int end,
                            std::uint64_t (&keys)[SelectVictimsTile::kLoads]) const {
#pragma unroll
    for (int i = 0; i < SelectVictimsTile::kLoads; ++i) {
      const int slot = first + i * step;
      keys[i] = slot < end ? key(slot) : kNever;
    }
  }
};

__global__ void __launch_bounds__(SelectVictimsTile::kThreads)
    select_victims_kernel(const __grid_constant__ SelectVictimsParams p) {
  using Tile = SelectVictimsTile;
  constexpr int kThreads = Tile::kThreads, kWarps = Tile::kWarps, kLoads = Tile::kLoads;
  static_assert(kWarps == 32, "a lane per warp when one warp reduces what all found");
  __shared__ CutSearch search;
  __shared__ int warp_values[kWarps];

  const int unit = blockIdx.x, sequence = blockIdx.y;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t row = static_cast<int64_t>(sequence) * p.num_units + unit;
  int32_t* victims = p.victims + row * p.num_victims;
  // On a GPU nobody has checked these.
  const int length = max(min(p.seq_lens[sequence], p.num_slots), 0);
  const int count = min(length - max(p.kept_lens[sequence], 0), p.num_victims);
  if (count <= 0) {
    for (int i = thread; i < p.num_victims; i += kThreads) victims[i] = -1;
    return;
  }
  LeavingOrder order{
      p.scores + sequence * p.stride_scores_b + unit * p.stride_scores_u,
      p.positions + sequence * p.stride_positions_b + unit * p.stride_positions_u,
      INT32_MIN,
      static_cast<unsigned>(p.num_recent),
  };

  // The newest position.
  int newest = INT32_MIN;
#pragma unroll 4
  for (int slot = thread; slot < length; slot += kThreads) {
    newest = max(newest, order.positions[slot]);
  }
  newest = __reduce_max_sync(kFullMask, newest);
  if (lane == 0) warp_values[warp] = newest;
  __syncthreads();
  order.newest = __reduce_max_sync(kFullMask, warp_values[lane]);

  std::uint64_t keys[kLoads];
  const auto cut = find_cut<std::uint64_t>(search, count, [&](const auto& use) {
    for (int first = 0; first < length; first += kLoads * kThreads) {
      order.load_keys(first + thread, kThreads, length, keys);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) use(keys[i], keys[i] != LeavingOrder::kNever);
    }
  });

  // Each warp has a stretch of slots, 32 of them to a word of votes.
  const int stretch = (length + kThreads - 1) / kThreads * 32;
  const int begin = warp * stretch, end = min(begin + stretch, length);
  unsigned words[kLoads];
  const auto vote = [&](int first) {
    order.load_keys(first + lane, 32, end, keys);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool leaves = cut.ahead(keys[i]) || cut.ties(keys[i]);
      words[i] = __ballot_sync(kFullMask, leaves && keys[i] != LeavingOrder::kNever);
    }
  };
  int leaving = 0;
  for (int first = begin; first < end; first += 32 * kLoads) {
    vote(first);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) leaving += __popc(words[i]);
  }
  if (lane == 0) warp_values[warp] = leaving;
  __syncthreads();
  leaving = warp_values[lane];
  const int total = min(__reduce_add_sync(kFullMask, leaving), count);
  int place = __reduce_add_sync(kFullMask, lane < warp ? leaving : 0);
  for (int first = begin; first < end; first += 32 * kLoads) {
    vote(first);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int mine = place + __popc(words[i] & ((1u << lane) - 1));
      // More than `total` only where positions repeat, which they must not.
      if (words[i] >> lane & 1 && mine < total) victims[mine] = first + 32 * i + lane;
      place += __popc(words[i]);
    }
  }
  for (int i = total + thread; i < p.num_victims; i += kThreads) victims[i] = -1;
}

// Starts the kernel through `launch(kernel, grid, block, shared_bytes, args...)`.
template <typename Launch>
void launch_select_victims(const SelectVictimsParams& p, const Launch& launch) {
  if (p.batch == 0 || p.num_units == 0 || p.num_victims == 0) return;
  launch(select_victims_kernel, dim3(p.num_units, p.batch), dim3(SelectVictimsTile::kThreads), 0,
         p);
}

}  // namespace kvcomp
