// attention_hits: one bit per token and unit of heads: whether any of the unit's heads gives it a
// probability that reaches the threshold.
//
// Grid (tiles of words, units, sequences), 128 threads. The warps of a block are split between runs
// of 32 * kVec tokens and slices of the unit's heads: a warp walks down its heads with eight loads
// per lane in flight, its lanes put their bits together into kVec words, and the slices meet in
// shared memory. Tokens past the end give 0.
//
// Bytes: Hq * sum(seq_lens) * 4, or 2 in 16 bits, read, each once, and
// a bit per token and unit written.
// At batch 1 the time is two latencies, of the length and of the logits, if all loads are under way
// at once: loads of 4 logits only where their fewer blocks still fill the GPU.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

struct AttentionHitsTile {
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr int kLoads = 8;         // in flight per lane
  static constexpr int kManyBlocks = 256;  // about two for each multiprocessor

  int head_warps;  // warps that share a token's heads: 1, 2 or 4
};

// Bit j: token j at `logits` is hit under one of the heads first, first + step, ...
template <int kVec, typename Logit>
__device__ inline unsigned hits_of_heads(const Logit* logits, int64_t stride_h, const float* lse,
                                         int first, int heads, int step, float log_threshold) {
  unsigned hits = 0;
  for_each_head<AttentionHitsTile::kLoads, kVec>(
      logits, stride_h, lse, first, heads, step,
      [&](int j, float logprob) { hits |= unsigned{logprob >= log_threshold} << j; });
  return hits;
}

template <int kVec, typename Logit>
__global__ void __launch_bounds__(AttentionHitsTile::kThreads)
    attention_hits_kernel(const __grid_constant__ AttentionHitsParams p, AttentionHitsTile tile) {
  constexpr int kWarps = AttentionHitsTile::kWarps;
  constexpr int kLanes = 32 / kVec;  // that make up a word
  __shared__ unsigned warp_words[kWarps][kVec];

  const int unit = blockIdx.y, sequence = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head_warps = tile.head_warps, num_words = kWarps / head_warps * kVec;
  const int first_word = blockIdx.x * num_words;
  const int64_t token = int64_t{first_word + warp / head_warps * kVec} * 32 + lane * kVec;
  const int end = min(p.seq_lens[sequence], p.num_slots);  // on a GPU nobody has checked it

  const int heads = p.num_heads / p.num_units, slice = warp % head_warps;
  const int64_t first_head = static_cast<int64_t>(unit) * heads;
  const float* lse = p.lse + static_cast<int64_t>(sequence) * p.num_heads + first_head;
  const Logit* at = static_cast<const Logit*>(p.logits) + sequence * p.stride_logits_b +
                    first_head * p.stride_logits_h + token;
  unsigned word = 0;
  if (token < end) {
    if (kVec == 1 || token + kVec <= p.num_slots) {
      word = hits_of_heads<kVec>(at, p.stride_logits_h, lse, slice, heads, head_warps,
                                 p.log_threshold);
    } else {  // nothing past the row's memory is read
      for (int j = 0; token + j < end; ++j) {
        word |= hits_of_heads<1>(at + j, p.stride_logits_h, lse, slice, heads, head_warps,
                                 p.log_threshold)
                << j;
      }
    }
    if (token + kVec > end) word &= (1u << (end - token)) - 1;
  }
  word <<= lane % kLanes * kVec;
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    word |= __shfl_xor_sync(kFullMask, word, lanes);
  }
  if (lane % kLanes == 0) warp_words[warp][lane / kLanes] = word;
  __syncthreads();

  // A thread per word, over all slices of heads.
  const int rank = threadIdx.x;
  if (rank >= num_words || first_word + rank >= p.num_words) return;
  word = 0;
  for (int h = 0; h < head_warps; ++h) {
    word |= warp_words[rank / kVec * head_warps + h][rank % kVec];
  }
  p.hits[sequence * p.stride_hits_b + static_cast<int64_t>(unit) * p.num_words + first_word +
         rank] = word;
}

// Chooses the tile and starts the kernel through `launch(kernel, grid, block, shared_bytes,
// args...)`.
template <typename Launch>
void launch_attention_hits(const AttentionHitsParams& p, const Launch& launch) {
  using Tile = AttentionHitsTile;
  if (p.batch == 0 || p.num_words == 0) return;
  const int heads = p.num_heads / p.num_units;
  // Enough heads per warp for some loads in flight, otherwise more warps and so more blocks.
  const Tile tile{.head_warps = heads >= 16 ? 4 : heads >= 8 ? 2 : 1};
  const auto num_blocks = [&](int vec) {
    const int words = Tile::kWarps / tile.head_warps * vec;
    return (p.num_words + words - 1) / words;
  };
  const bool rows_aligned =
      logits_aligned<4>(p.logits_dtype, p.logits, p.stride_logits_b, p.stride_logits_h);
  const bool many = int64_t{num_blocks(4)} * p.num_units * p.batch >= Tile::kManyBlocks;
  const bool vec4 = rows_aligned && many;
  with_logit_type(p.logits_dtype, [&](auto logit) {
    using Logit = decltype(logit);
    launch(vec4 ? attention_hits_kernel<4, Logit> : attention_hits_kernel<1, Logit>,
           dim3(num_blocks(vec4 ? 4 : 1), p.num_units, p.batch), dim3(Tile::kThreads), 0, p, tile);
  });
}

}  // namespace kvcomp
