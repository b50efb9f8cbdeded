// decode_attention: one query per sequence over all tokens, or over listed pages.
//
// Grid (KV heads x tiles of 8 query heads, sequences, splits), so that splits which a short row
// leaves empty come last. A block has one split of the tokens of one KV head and up to 8 of the
// query heads that share it, so that each K and V row is read once. Its warps take tiles of 16
// tokens in turn, each with a pipeline and a softmax of its own: no barrier before the end. K and V
// are the tall operands of the tensor cores, tokens in rows, S [16 tokens, 8 heads] = K qT and OT
// [Dv, 8 heads] += VT P; where a group has fewer heads than 8 the columns idle, which costs nothing
// in a kernel that waits for memory. Dense and paged input differ in where the slot of a token
// comes from. At the end the warps' states are merged, and in a second kernel those of the splits.
//
// Bytes: T * (D + Dv) elements per KV head; 4 * Dv * Hq per split, written and read, for the merge;
// with logits 4 * T * Hq, or 2 in 16 bits. In flight per block: (stages - 1) tiles of 16 rows of K
// and V per warp.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kvcomp/decode_attention_fp32.cuh"
#include "kvcomp/decode_merge.cuh"
#include "kvcomp/decode_split.cuh"
#include "kvcomp/decode_warp.cuh"
#include "kvcomp/head_sizes.h"

namespace kvcomp {

// --- one split of the tokens, by a block ---------------------------------------------------------

template <typename T, int D, int Dv, int kFragments, typename Columns>
__device__ void attend_split(const DecodeAttentionParams& p, const Columns& columns, int sequence,
                             int kv_head, int split_index) {
  using Tile = typename TileOf<T, D, Dv, kFragments>::Type;
  using Warp = DecodeWarp<T, D, Dv, kFragments, Columns>;
  const DecodeSplit split(p, sequence, kv_head, split_index);
  if (columns.count() > 0) {
    auto* stages = dynamic_shared<typename Tile::Stage>() + threadIdx.x / 32 * Tile::kStages;
    uint16_t* queries = nullptr;
    if constexpr (Tile::kQueries > 0) {
      queries = dynamic_shared<uint16_t>() + Tile::kStates / sizeof(uint16_t);
      Warp::share(p, columns, queries);
      __syncthreads();
    }
    Warp warp(p, split, columns, sequence, kv_head, stages, queries);
    warp.run();
    __syncthreads();
    warp.leave(*dynamic_shared<typename Tile::States>());
    __syncthreads();
  }

  const auto& states = *dynamic_shared<typename Tile::States>();
  for (int i = threadIdx.x; i < columns.stored() * Dv; i += Tile::kThreads) {
    const int column = i / Dv, element = i % Dv;
    DecodeMerge merge;
    float out = 0;
    if (column < columns.count()) {
      for (int w = 0; w < Tile::kWarps; ++w) merge.see(states.max[w][column]);
      for (int w = 0; w < Tile::kWarps; ++w) {
        const float weight = merge.weight(states.max[w][column]);
        merge.sum += weight * states.sum[w][column];
        out += weight * states.out[w][column][element];
      }
    }
    if (split.wrong || columns.wrong()) merge.sum = NAN;
    const float value = merge.sum == 0 ? 0.0f : out / merge.sum;
    const int64_t row = columns.out(column);
    if (p.num_splits == 1) {
      store_as(p.q_dtype, value, p.out, row * Dv + element);
      if (element == 0) p.lse[row] = merge.lse();
    } else {
      const int64_t partial = row * p.num_splits + split_index;
      p.partial_out[partial * Dv + element] = value;
      if (element == 0) p.partial_lse[partial] = merge.lse();
    }
    if (element == 0 && split_index == 0 && p.arrived) p.arrived[row] = 0;
  }
}

template <typename T, int D, int Dv>
__global__ void __launch_bounds__(TileOf<T, D, Dv, 1>::Type::kThreads,
                                  TileOf<T, D, Dv, 1>::Type::kBlocks)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p) {
  constexpr int kColumns = TileOf<T, D, Dv, 1>::Type::kColumns;
  const int sequence = blockIdx.y, group = p.num_heads / p.num_kv_heads;
  const int tiles = (group + kColumns - 1) / kColumns;
  const int kv_head = blockIdx.x / tiles;
  const DecodeColumns columns(p, sequence, kv_head, blockIdx.x % tiles);
  attend_split<T, D, Dv, 1>(p, columns, sequence, kv_head, blockIdx.z);
}

// --- the splits merged ---------------------------------------------------------------------------

// One block per row of the outputs, a thread per element.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    merge_splits_kernel(const __grid_constant__ DecodeAttentionParams p) {
  merge_head(p, blockIdx.x);
}

template <int Dv, typename Launch>
void launch_merge_splits(const DecodeAttentionParams& p, int rows, const Launch& launch) {
  if (p.num_splits == 1 || p.arrived) return;
  constexpr int kThreads = (Dv + 31) / 32 * 32;
  launch(merge_splits_kernel<kThreads>, dim3(rows), dim3(kThreads), 0, p);
}

// --- launches ------------------------------------------------------------------------------------

// Starts the kernels over rows of type T through `launch(kernel, grid, block, shared_bytes,
// args...)`.
template <typename T, typename Launch>
void launch_decode_attention(T, const DecodeAttentionParams& p, const Launch& launch) {
  with_head_sizes<kMayDiffer<T>>(p.head_dim, p.value_dim, [&](auto key, auto value) {
    using Tile = typename TileOf<T, key(), value(), 1>::Type;
    const int tiles = (p.num_heads / p.num_kv_heads + Tile::kColumns - 1) / Tile::kColumns;
    launch(decode_attention_kernel<T, key(), value()>,
           dim3(p.num_kv_heads * tiles, p.batch, p.num_splits), dim3(Tile::kThreads), Tile::kShared,
           p);
    launch_merge_splits<value()>(p, p.batch * p.num_heads, launch);
  });
}

}  // namespace kvcomp
