// recurrence_update: replays the hit bits of up to 32 steps into last hit and longest interval.
//
// Grid (runs of 128 slots, units, sequences), a thread per slot. A warp's 32 slots share one word
// of each step: lane r loads that of step r, and 32 votes turn the steps' words into the slots'
// words, whose bits are steps. A slot then visits only the steps that hit it.
//
// Bytes: R / 8 per slot for the bits (a block takes half of each 32-byte sector), 8 read and 8
// written; where nothing happened nothing is written. One latency of a load: all are issued at
// once.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

struct RecurrenceUpdateTile {
  static constexpr int kThreads = 128;
};

__global__ void __launch_bounds__(RecurrenceUpdateTile::kThreads)
    recurrence_update_kernel(const __grid_constant__ RecurrenceUpdateParams p) {
  const int unit = blockIdx.y, sequence = blockIdx.z, lane = threadIdx.x % 32;
  const int slot = blockIdx.x * RecurrenceUpdateTile::kThreads + threadIdx.x;
  const int length = min(p.seq_lens[sequence], p.num_slots);  // on a GPU nobody has checked it
  if (slot - lane >= length) return;                          // the whole warp
  const int64_t row = static_cast<int64_t>(sequence) * p.num_units + unit;
  int32_t* last_hit = p.last_hit + row * p.num_slots + slot;
  int32_t* longest = p.longest + row * p.num_slots + slot;

  unsigned word = 0;  // of step `lane`: bits are slots
  if (lane < p.num_steps) {
    word = p.hits[sequence * p.stride_hits_b + lane * p.stride_hits_r +
                  static_cast<int64_t>(unit) * p.num_words + slot / 32];
  }
  const bool valid = slot < length, born = length - slot <= p.born[sequence];
  int last = 0, interval = 0;
  if (valid && !born) {
    last = *last_hit;
    interval = *longest;
  }
  // One token is born at each step, the newest at the last; those before the first are a prompt.
  if (born) last = p.first_step + max(p.num_steps - (length - slot), 0) - 1;

  unsigned steps = 0;  // of this slot: bits are steps
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const unsigned hits = __ballot_sync(kFullMask, word >> i & 1);
    if (i == lane) steps = hits;
  }
  if (!valid || !(born || steps)) return;
  for (; steps; steps &= steps - 1) {
    const int step = p.first_step + __ffs(steps) - 1;
    interval = max(interval, step - last);
    last = step;
  }
  *last_hit = last;
  *longest = interval;
}

// Starts the kernel through `launch(kernel, grid, block, shared_bytes, args...)`.
template <typename Launch>
void launch_recurrence_update(const RecurrenceUpdateParams& p, const Launch& launch) {
  constexpr int kThreads = RecurrenceUpdateTile::kThreads;
  if (p.batch == 0 || p.num_units == 0 || p.num_slots == 0) return;
  const dim3 grid((p.num_slots + kThreads - 1) / kThreads, p.num_units, p.batch);
  launch(recurrence_update_kernel, grid, dim3(kThreads), 0, p);
}

}  // namespace kvcomp
