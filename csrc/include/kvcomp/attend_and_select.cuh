// attend_and_select: what follows the splits of decode_attention, in one launch: their merge, the
// scores of the pages, and the selection.
//
// Grid (tiles of pages, groups, sequences), that of page_scores. Every block works out the lse of
// its group's heads from those of the splits, scores its pages with it, and says so at the counter
// of its row and group; then it merges its share of the group's outputs. The last block to arrive
// finds all scores written and selects. Which one that is differs from run to run, and nothing else
// does. The counters are set to 0 by the kernel before (DecodeAttentionParams::arrived), so their
// memory needs no care between calls, nor between replays of a CUDA graph.
//
// Bytes: those of page_scores and select_pages, once 4 * (D + 1) per split and query head, and
// 4 per split and query head for each block, from L2.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kvcomp/decode_merge.cuh"
#include "kvcomp/page_scores.cuh"
#include "kvcomp/select_pages.cuh"

namespace kvcomp {

// Whether this block is the last of its row and group to get here. All that the others wrote before
// they did is then seen by all of its threads.
__device__ inline bool arrive_last(uint32_t* arrived, bool& last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what this block wrote comes before the count
    last = atomicAdd(arrived, 1) == gridDim.x - 1;
    __threadfence();  // and what the others wrote before theirs
  }
  __syncthreads();
  return last;
}

template <int kVec, bool kMax, typename Logit>
__global__ void __launch_bounds__(PageScoresTile::kThreads, 3)
    merge_and_select_kernel(const __grid_constant__ AttendAndSelectParams p, PageScoresTile tile) {
  constexpr int kWarps = PageScoresTile::kWarps;
  constexpr int kAtOnce = PageScoresTile::kThreads / kWeighing;  // heads
  __shared__ WarpProbs<kVec> warp_probs;
  __shared__ SelectPagesShared<kWarps> selecting;
  __shared__ bool last;

  const DecodeAttentionParams& attention = p.attention;
  const bool split = attention.num_splits > 1;
  const int group = blockIdx.y, sequence = blockIdx.z;
  const int heads = p.scoring.num_heads / p.scoring.num_groups;
  const int64_t row = static_cast<int64_t>(sequence) * p.scoring.num_heads + group * heads;
  float* lse = dynamic_shared<float>();  // [heads]
  for (int first = 0; first < heads; first += kAtOnce) {
    const int head = first + threadIdx.x / kWeighing, of = min(head, heads - 1);
    const float its = split ? weigh_splits(attention, row + of).lse() : attention.lse[row + of];
    if (head < heads && threadIdx.x % kWeighing == 0) lse[head] = its;
  }
  __syncthreads();
  score_pages<kVec, kMax, Logit>(p.scoring, tile, lse, warp_probs);
  const bool selects = arrive_last(attention.arrived + row, last);
  if (split) {
    for (int head = blockIdx.x; head < heads; head += gridDim.x) merge_head(attention, row + head);
  }
  if (selects) select_set<kWarps>(p.selection, group, sequence, selecting);
}

// Whether there are so many pages that a block of eight warps would be long at choosing: then a
// larger one is worth a launch of its own, and the op is its three parts in turn.
inline bool selects_apart(const AttendAndSelectParams& p) { return p.scoring.num_pages > 2048; }

// What the first launch is given: the splits are merged behind it, or at once where it selects
// apart.
inline DecodeAttentionParams attention_of(const AttendAndSelectParams& p) {
  DecodeAttentionParams attention = p.attention;
  if (selects_apart(p)) attention.arrived = nullptr;
  return attention;
}

// Starts the kernel through `launch(kernel, grid, block, shared_bytes, args...)`, behind that of
// the splits.
template <typename Launch>
void launch_merge_and_select(const AttendAndSelectParams& p, const Launch& launch) {
  const PageScoresParams& scoring = p.scoring;
  with_tile(scoring, [&](const PageScoresTile& tile, auto vec, auto logit) {
    using Logit = decltype(logit);
    const auto kernel = scoring.use_max ? merge_and_select_kernel<vec(), true, Logit>
                                        : merge_and_select_kernel<vec(), false, Logit>;
    const dim3 grid(std::max(tile.count, 1), scoring.num_groups, scoring.batch);
    launch(kernel, grid, dim3(PageScoresTile::kThreads),
           scoring.num_heads / scoring.num_groups * sizeof(float), p, tile);
  });
}

}  // namespace kvcomp
