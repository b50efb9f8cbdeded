// What the selections share: an order of scores as integers, and the search for the last key that
// is taken, eight bits at a time from the top. A round is a histogram of the next digit over the
// keys that agree so far, a scan of its bins by one warp, and on with the bin where the last place
// falls, until a bin is taken as a whole. Distinct scores take three or four rounds.
#pragma once

#include "kvcomp/device.cuh"

namespace kvcomp {

struct Radix {
  static constexpr int kBits = 8, kBins = 1 << kBits;  // of a digit
};

// In the order of the scores, NaN and -0 as their equals -inf and 0.
__device__ inline unsigned ordered_bits(float score) {
  const unsigned bits = __float_as_uint(score != score ? -INFINITY : score + 0.0f);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

// A lane's digit counts by its weight, which may be 0. Scores are often alike: those of a warp that
// have the digit of its first are added at once.
__device__ inline void count_digit(int* histogram, int weight, int digit) {
  const unsigned counting = __ballot_sync(kFullMask, weight != 0);
  if (counting == 0) return;
  const int leader = __ffs(counting) - 1;
  const bool alike = digit == __shfl_sync(kFullMask, digit, leader);
  const int sum = __reduce_add_sync(kFullMask, alike ? weight : 0);
  const bool leads = static_cast<int>(threadIdx.x % 32) == leader;
  if (leads || (weight != 0 && !alike)) atomicAdd(&histogram[digit], leads ? sum : weight);
}

// The bin in which the last of `places` falls: how many are in lower bins, and in it. The last bin
// where there are fewer than `places`.
struct Bin {
  int digit, below, size;
};

// By one warp; leaves the bins empty.
__device__ inline Bin take_bin(int* histogram, int places) {
  constexpr int kPerLane = Radix::kBins / 32;
  const int lane = threadIdx.x % 32;
  int sizes[kPerLane], through = 0;  // up to the last of this lane's bins
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    sizes[i] = histogram[lane * kPerLane + i];
    histogram[lane * kPerLane + i] = 0;
    through += sizes[i];
  }
  int below = -through;
  through = sum_through(through);
  below += through;
  Bin bin{lane * kPerLane, below, sizes[0]};
#pragma unroll
  for (int i = 0; i + 1 < kPerLane; ++i) {
    below += sizes[i];
    if (below < places) bin = {lane * kPerLane + i + 1, below, sizes[i + 1]};
  }
  const unsigned reached = __ballot_sync(kFullMask, through >= places) | 1u << 31;
  const int owner = __ffs(reached) - 1;
  return {__shfl_sync(kFullMask, bin.digit, owner), __shfl_sync(kFullMask, bin.below, owner),
          __shfl_sync(kFullMask, bin.size, owner)};
}

// What a block needs of shared memory for the search.
struct CutSearch {
  alignas(16) int histogram[Radix::kBins];  // four bins to a load: one by one they share banks
  Bin bin;
};

// Where a selection ends: a key is taken if it is ahead, and so are `places` of those that tie.
template <typename Key>
struct Cut {
  Key prefix;
  int shift, places;

  __device__ bool ahead(Key key) const { return key >> shift < prefix; }
  __device__ bool ties(Key key) const { return key >> shift == prefix; }
};

// By the whole block, the lowest keys first. for_each_key(use) calls use(key, weight) for every
// key, in whole warps; of what has a weight of 0 there is nothing to take.
template <typename Key, typename ForEachKey>
__device__ inline Cut<Key> find_cut(CutSearch& search, int places, const ForEachKey& for_each_key) {
  if (threadIdx.x < Radix::kBins) search.histogram[threadIdx.x] = 0;
  __syncthreads();
  Cut<Key> cut{0, 8 * sizeof(Key), places};
  do {
    cut.shift -= Radix::kBits;
    for_each_key([&](Key key, int weight) {
      const Key digits = key >> cut.shift;
      count_digit(search.histogram, digits >> Radix::kBits == cut.prefix ? weight : 0,
                  static_cast<int>(digits % Radix::kBins));
    });
    __syncthreads();
    if (threadIdx.x < 32) {
      const Bin found = take_bin(search.histogram, cut.places);
      if (threadIdx.x == 0) search.bin = found;
    }
    __syncthreads();
    cut.prefix = cut.prefix << Radix::kBits | static_cast<unsigned>(search.bin.digit);
    cut.places -= search.bin.below;
  } while (cut.places < search.bin.size && cut.shift > 0);
  return cut;
}

}  // namespace kvcomp
