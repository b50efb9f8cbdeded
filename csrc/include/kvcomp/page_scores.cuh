// page_scores: the sum over a page's tokens of the probability, reduced over the heads of a group.
//
// Grid (tiles of pages, groups, sequences), 256 threads. A block owns a tile of whole pages. Its
// warps are split between runs of 32 * kVec tokens and slices of the group's heads: a warp walks
// down its heads with eight loads per lane in flight, keeps the max (or sum) of the probabilities
// of kVec tokens in registers, and leaves it in shared memory. Then groups of lanes combine the
// head slices of each token and sum over the pages. A page larger than the tile is walked in steps
// by one block, which needs each token's heads in one warp.
//
// Bytes: Hq * sum(seq_lens) * 4, or 2 in 16 bits, read, each once, and B * num_groups * P * 4
// written.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

struct PageScoresTile {
  static constexpr int kWarps = 8, kThreads = kWarps * 32;
  static constexpr int kLoads = 8;  // in flight per lane: up to 32 KB per block

  int pages;       // of a block
  int count;       // tiles of a row
  int head_warps;  // warps that share a token's heads: 1, 2 or 4
  int page_lanes;  // lanes that sum a page: a power of two up to 32
};

// Adds to probs (max or sum) the probabilities of kVec tokens at `logits` under heads first,
// first + step, ...
template <int kVec, bool kMax, typename Logit>
__device__ inline void reduce_heads(const Logit* logits, int64_t stride_h, const float* lse,
                                    int first, int heads, int step, float* probs) {
  for_each_head<PageScoresTile::kLoads, kVec>(
      logits, stride_h, lse, first, heads, step, [&](int j, float logprob) {
        // Subtracted before it is scaled: log2e folded into the lse would round that first.
        const float prob = exp2f(logprob * kLog2e);
        probs[j] = kMax ? fmaxf(probs[j], prob) : probs[j] + prob;
      });
}

// What a block keeps of its tokens: a run of 32 * kVec per warp.
template <int kVec>
using WarpProbs = float[PageScoresTile::kWarps][32 * kVec];

// The block's pages of its group and sequence. lse: of the group's heads.
template <int kVec, bool kMax, typename Logit>
__device__ inline void score_pages(const PageScoresParams& p, const PageScoresTile& tile,
                                   const float* lse, WarpProbs<kVec>& warp_probs) {
  constexpr int kWarps = PageScoresTile::kWarps;
  constexpr int kRun = 32 * kVec;  // tokens of a warp
  const int group = blockIdx.y, sequence = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_page = blockIdx.x * tile.pages;
  const int num_pages = min(tile.pages, p.num_pages - first_page);
  const int start = first_page * p.page_size;
  const int length = min(p.seq_lens[sequence], p.num_slots);  // on a GPU nobody has checked it
  const int end = min(length, start + num_pages * p.page_size);

  // Each warp: its tokens, reduced over its slice of heads.
  const int heads = p.num_heads / p.num_groups, head_warps = tile.head_warps;
  const int slice = warp % head_warps, step = kWarps / head_warps * kRun;
  const Logit* logits = static_cast<const Logit*>(p.logits) + sequence * p.stride_logits_b +
                        int64_t{group} * heads * p.stride_logits_h;
  float total[kVec] = {};
  // More than one step only in a page larger than the tile.
  for (int token = start + warp / head_warps * kRun + lane * kVec; token < end; token += step) {
    const Logit* at = logits + token;
    float probs[kVec] = {};
    if (token + kVec <= end) {
      reduce_heads<kVec, kMax>(at, p.stride_logits_h, lse, slice, heads, head_warps, probs);
    } else {  // the last tokens of the row: nothing past them is read
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (token + j >= end) break;
        reduce_heads<1, kMax>(at + j, p.stride_logits_h, lse, slice, heads, head_warps, &probs[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) total[j] += probs[j];
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) warp_probs[warp][lane * kVec + j] = total[j];
  __syncthreads();

  // Groups of lanes: the tokens of their pages, over all slices of heads.
  const int tokens = min(p.page_size, step);  // of a page, as they lie in shared memory
  const int width = tile.page_lanes, rank = threadIdx.x % width;
  float* scores = p.scores + (static_cast<int64_t>(sequence) * p.num_groups + group) * p.num_pages;
  for (int base = 0; base < num_pages; base += PageScoresTile::kThreads / width) {
    const int page = base + threadIdx.x / width;
    float sum = 0;
    for (int i = rank; i < tokens && page < num_pages; i += width) {
      const int token = page * p.page_size + i;
      const float* probs = &warp_probs[token / kRun * head_warps][token % kRun];
      float prob = probs[0];
      for (int h = 1; h < head_warps; ++h) {
        prob = kMax ? fmaxf(prob, probs[h * kRun]) : prob + probs[h * kRun];
      }
      sum += prob;
    }
    sum = group_sum(sum, width);
    if (rank == 0 && page < num_pages) scores[first_page + page] = sum;
  }
}

template <int kVec, bool kMax, typename Logit>
__global__ void __launch_bounds__(PageScoresTile::kThreads)
    page_scores_kernel(const __grid_constant__ PageScoresParams p, PageScoresTile tile) {
  __shared__ WarpProbs<kVec> warp_probs;
  const int first_head = blockIdx.y * (p.num_heads / p.num_groups);
  const float* lse = p.lse + static_cast<int64_t>(blockIdx.z) * p.num_heads + first_head;
  score_pages<kVec, kMax, Logit>(p, tile, lse, warp_probs);
}

// start(tile, vec, Logit{}), vec 4 or 1 as an integral_constant, with the tile for these logits and
// pages.
template <typename Start>
void with_tile(const PageScoresParams& p, const Start& start) {
  using Tile = PageScoresTile;
  const int heads = p.num_heads / p.num_groups;

  // Enough heads per warp for some loads in flight, otherwise more warps and so more blocks.
  Tile tile{.pages = 1,
            .count = 0,
            .head_warps = heads >= 16  ? 4
                          : heads >= 8 ? 2
                                       : 1,
            .page_lanes = 1};

  // Loads of 4 logits where every row and every tile of pages starts at a multiple of them.
  const bool rows_aligned =
      logits_aligned<4>(p.logits_dtype, p.logits, p.stride_logits_b, p.stride_logits_h);
  const int multiple = p.page_size % 4 == 0 ? 1 : p.page_size % 2 == 0 ? 2 : 4;
  const auto capacity = [&](int vec) { return Tile::kWarps / tile.head_warps * 32 * vec; };
  const bool vec4 =
      rows_aligned && (multiple == 1 || multiple * int64_t{p.page_size} <= capacity(4));
  const int vec = vec4 ? 4 : 1;
  if (p.page_size > capacity(vec)) tile.head_warps = 1;
  if (const int fit = capacity(vec) / p.page_size; fit > 1) {
    tile.pages = vec4 ? fit / multiple * multiple : fit;
  }
  while (tile.page_lanes < 32 && tile.page_lanes * 4 < p.page_size) tile.page_lanes *= 2;
  tile.count = (p.num_pages + tile.pages - 1) / tile.pages;
  with_logit_type(p.logits_dtype, [&](auto logit) {
    vec4 ? start(tile, std::integral_constant<int, 4>{}, logit)
         : start(tile, std::integral_constant<int, 1>{}, logit);
  });
}

// Starts the kernel through `launch(kernel, grid, block, shared_bytes, args...)`.
template <typename Launch>
void launch_page_scores(const PageScoresParams& p, const Launch& launch) {
  if (p.batch == 0 || p.num_pages == 0) return;
  with_tile(p, [&](const PageScoresTile& tile, auto vec, auto logit) {
    using Logit = decltype(logit);
    const auto kernel = p.use_max ? page_scores_kernel<vec(), true, Logit>
                                  : page_scores_kernel<vec(), false, Logit>;
    launch(kernel, dim3(tile.count, p.num_groups, p.batch), dim3(PageScoresTile::kThreads), 0, p,
           tile);
  });
}

}  // namespace kvcomp
