// decode_attention: one query per sequence over all tokens, or over listed pages.
//
// Grid (KV heads x tiles of 8 query heads, sequences, splits), so that splits which a short row
// leaves empty come last. A block has one split of the tokens of one KV head and up to 8 of the
// query heads that share it, so that each K and V row is read once. Its warps take tiles of 16
// tokens in turn, each with a pipeline and a softmax of its own: no barrier before the end. K and V
// are the tall operands of the tensor cores, tokens in rows, S [16 tokens, 8 heads] = K qT and OT
// [D, 8 heads] += VT P; where a group has fewer heads than 8 the columns idle, which costs nothing
// in a kernel that waits for memory. Dense and paged input differ in where the slot of a token
// comes from. At the end the warps' states are merged, and in a second kernel those of the splits.
//
// Bytes: 2 * T * D elements per KV head; 4 * D * Hq per split, written and read, for the merge;
// with logits 4 * T * Hq, or 2 in 16 bits. In flight per block: (stages - 1) tiles of 16 rows of K
// and V per warp.
#pragma once

#include <cstdint>

#include "kvcomp/decode_attention_fp32.cuh"
#include "kvcomp/decode_merge.cuh"
#include "kvcomp/decode_split.cuh"
#include "kvcomp/matrix.cuh"

namespace kvcomp {

// --- one warp's way through its tiles, 16-bit types ----------------------------------------------

template <typename T, int D>
class DecodeWarp {
  using Tile = DecodeTile<D>;
  using Stage = typename Tile::Stage;
  static constexpr int kTokens = Tile::kTokens, kSteps = D / 16;
  static constexpr int kPieces = kTokens * D / 8 / 32;  // a lane's 16 bytes of a tile's K or V
  static_assert(kTokens * D / 8 % 32 == 0);

 public:
  __device__ DecodeWarp(const DecodeAttentionParams& p, const DecodeSplit& split, int sequence,
                        int kv_head, int first_head, Stage* stages)
      : p_(p),
        split_(split),
        k_(static_cast<const T*>(p.k) + sequence * p.stride_k_b + kv_head * p.stride_k_h),
        v_(static_cast<const T*>(p.v) + sequence * p.stride_v_b + kv_head * p.stride_v_h),
        aligned_(is_aligned(k_, p.stride_k_t) && is_aligned(v_, p.stride_v_t)),
        stages_(stages),
        scale_(p.scale),
        logits_(p, sequence),
        lane_(threadIdx.x % 32),
        first_tile_(split.first + threadIdx.x / 32 * kTokens) {
    const int group = p.num_heads / p.num_kv_heads;
    num_heads_ = min(Tile::kHeads, group - first_head);
    head_ = kv_head * group + first_head;
    const T* q = static_cast<const T*>(p.q) + sequence * p.stride_q_b;
    const int column = lane_ / 4;  // of B, whose fragment is that of its transpose: q as it is
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        q_[step][i] = 0;
        if (column < num_heads_) {
          const T* from = q + (head_ + column) * p.stride_q_h + step * 16 + i * 8 + lane_ % 4 * 2;
          q_[step][i] = bits(from[0]) | bits(from[1]) << 16;
        }
      }
    }
  }

  __device__ void run() {
    constexpr int kAhead = Tile::kStages - 1;
    next_id_ = load_id(0);
#pragma unroll
    for (int tile = 0; tile < kAhead; ++tile) fetch(tile);
    for (int tile = 0; position(tile) < split_.end; ++tile) {
      fetch(tile + kAhead);
      const Stage& stage = stages_[tile % Tile::kStages];
      float s[4] = {};
      wait_for_copies<2 * kAhead + 1>();  // K of this tile; V and later tiles may be under way
      __syncwarp();
      multiply_keys(stage, s);
      mask(stage, position(tile), s);
      float decay[2];
      advance_softmax(s, decay);
      wait_for_copies<2 * kAhead>();
      __syncwarp();
      accumulate_values(stage, s, decay);
      __syncwarp();  // all lanes are done with the stage, which comes to be filled again
    }
    wait_for_copies<0>();
  }

  __device__ void leave(typename Tile::States& states) const {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sum_[i];
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kFullMask, sum, lanes);
      const int head = lane_ % 4 * 2 + i;
      if (lane_ < 4) states.max[warp][head] = max_[i], states.sum[warp][head] = sum;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        states.out[warp][head][step * 16 + lane_ / 4] = out_[step][i];
        states.out[warp][head][step * 16 + lane_ / 4 + 8] = out_[step][i + 2];
      }
    }
  }

 private:
  __device__ static bool is_aligned(const T* base, int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(base) % 16 == 0 && stride % 8 == 0;
  }
  __device__ static unsigned bits(T value) {
    uint16_t word;
    memcpy(&word, &value, sizeof word);
    return word;
  }

  __device__ int position(int tile) const { return first_tile_ + tile * Tile::kWarps * kTokens; }

  // Of the page of the lane's token. Nothing is made of it before the tile is fetched.
  __device__ int load_id(int tile) const {
    return lane_ < kTokens ? split_.load_id(position(tile) + lane_) : kSkipped;
  }

  // Asks for a tile's rows; its page ids have been asked for a tile earlier.
  __device__ void fetch(int tile) {
    Stage& stage = stages_[tile % Tile::kStages];
    const int slot = lane_ < kTokens ? split_.slot(position(tile) + lane_, next_id_) : kSkipped;
    if (lane_ < kTokens) stage.slot[lane_] = slot;
    int slots[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) slots[i] = __shfl_sync(kFullMask, slot, row_of(i));
    copy_rows(stage.k, k_, p_.stride_k_t, slots);
    end_copy_group();
    copy_rows(stage.v, v_, p_.stride_v_t, slots);
    end_copy_group();
    next_id_ = load_id(tile + 1);
  }

  // Of the lane's pieces of a tile.
  __device__ int row_of(int i) const { return (i * 32 + lane_) / (D / 8); }
  __device__ int column_of(int i) const { return (i * 32 + lane_) % (D / 8) * 8; }

  // Rows of tokens that are not attended become zeros: their probabilities are, but 0 * NaN is not.
  __device__ void copy_rows(uint16_t* rows, const T* base, int64_t stride,
                            const int (&slots)[kPieces]) const {
    const auto for_each_piece = [&](const auto& copy) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const auto row = static_cast<uint32_t>(max(slots[i], 0));  // 32 x 64 bits are two products
        copy(rows + row_of(i) * Tile::kPitch + column_of(i), base + row * stride + column_of(i),
             slots[i] >= 0);
      }
    };
    if (aligned_) {
      for_each_piece(
          [](uint16_t* to, const T* from, bool wanted) { copy_async(to, from, wanted); });
    } else {
      for_each_piece([](uint16_t* to, const T* from, bool wanted) {
        for (int j = 0; j < 8; ++j) to[j] = wanted ? bits(from[j]) : 0;
      });
    }
  }

  __device__ void multiply_keys(const Stage& stage, float (&s)[4]) const {
    const uint16_t* row = stage.k + lane_ % 16 * Tile::kPitch + lane_ / 16 * 8;
    float odd[4] = {};  // a second chain, so that a product waits for every other one only
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned keys[4];
      load_matrices(keys, row + step * 16);
      multiply_add(step % 2 ? odd : s, keys, q_[step], T{});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] += odd[i];
  }

  // s becomes logits; -inf where a token is not attended.
  __device__ void mask(const Stage& stage, int first, float (&s)[4]) const {
    const int token = lane_ / 4;
    const int slots[2] = {stage.slot[token], stage.slot[token + 8]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float poison = slots[i / 2] == kSkipped ? -INFINITY : NAN;
      s[i] = slots[i / 2] < 0 ? poison : s[i] * scale_;
    }
    if (!logits_) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = lane_ % 4 * 2 + i % 2, at = first + token + i / 2 * 8;
      if (head < num_heads_ && at < split_.end) logits_.store(head_ + head, at, s[i]);
    }
  }

  // s becomes probabilities, relative to the maximum so far; decay what that does to earlier ones.
  __device__ void advance_softmax(float (&s)[4], float (&decay)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = fmaxf(s[i], s[i + 2]);
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, lanes));
      }
      top = fmaxf(top, max_[i]);
      const float base = top == -INFINITY ? 0.0f : top;
      decay[i] = exp2f((max_[i] - base) * kLog2e);
      s[i] = exp2f((s[i] - base) * kLog2e);
      s[i + 2] = exp2f((s[i + 2] - base) * kLog2e);
      sum_[i] = sum_[i] * decay[i] + s[i] + s[i + 2];
      max_[i] = top;
    }
  }

  __device__ void accumulate_values(const Stage& stage, const float (&s)[4],
                                    const float (&decay)[2]) {
    const unsigned probs[2] = {transpose_matrix(pack(s[0], s[1], T{})),
                               transpose_matrix(pack(s[2], s[3], T{}))};
    const uint16_t* row = stage.v + (lane_ % 8 + lane_ / 16 * 8) * Tile::kPitch + lane_ / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned values[4];
      load_matrices_transposed(values, row + step * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[step][i] *= decay[i % 2];
      multiply_add(out_[step], values, probs, T{});
    }
  }

  const DecodeAttentionParams& p_;
  const DecodeSplit& split_;
  const T *k_, *v_;
  const bool aligned_;  // rows can be copied 16 bytes at a time
  Stage* stages_;
  const float scale_;
  const LogitsOut logits_;
  const int lane_, first_tile_;
  int num_heads_, head_;   // of this block: head_ + 0, 1, ...
  int next_id_;            // of the tile to be fetched next, lane's token
  unsigned q_[kSteps][2];  // B fragments
  float max_[2] = {-INFINITY, -INFINITY}, sum_[2] = {};  // of the lane's two heads; sums by lane
  float out_[kSteps][4] = {};
};

// --- one split's states merged -------------------------------------------------------------------

template <typename T, int D>
__global__ void __launch_bounds__(DecodeTile<D>::kThreads, DecodeTile<D>::kBlocks)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p) {
  using Tile = DecodeTile<D>;
  const int sequence = blockIdx.y, split_index = blockIdx.z;
  const int group = p.num_heads / p.num_kv_heads;
  const int tiles = (group + Tile::kHeads - 1) / Tile::kHeads;
  const int kv_head = blockIdx.x / tiles, first_head = blockIdx.x % tiles * Tile::kHeads;
  const DecodeSplit split(p, sequence, kv_head, split_index);
  {
    auto* stages = dynamic_shared<typename Tile::Stage>() + threadIdx.x / 32 * Tile::kStages;
    DecodeWarp<T, D> warp(p, split, sequence, kv_head, first_head, stages);
    warp.run();
    __syncthreads();
    warp.leave(*dynamic_shared<typename Tile::States>());
    __syncthreads();
  }

  const auto& states = *dynamic_shared<typename Tile::States>();
  const int num_heads = min(Tile::kHeads, group - first_head);
  for (int i = threadIdx.x; i < num_heads * D; i += Tile::kThreads) {
    const int head = i / D, column = i % D;
    DecodeMerge merge;
    for (int w = 0; w < Tile::kWarps; ++w) merge.see(states.max[w][head]);
    float out = 0;
    for (int w = 0; w < Tile::kWarps; ++w) {
      const float weight = merge.weight(states.max[w][head]);
      merge.sum += weight * states.sum[w][head];
      out += weight * states.out[w][head][column];
    }
    if (split.wrong) merge.sum = NAN;
    const float value = merge.sum == 0 ? 0.0f : out / merge.sum;
    const int64_t row =
        static_cast<int64_t>(sequence) * p.num_heads + kv_head * group + first_head + head;
    if (p.num_splits == 1) {
      from_float(value, static_cast<T*>(p.out)[row * D + column]);
      if (column == 0) p.lse[row] = merge.lse();
    } else {
      const int64_t partial = row * p.num_splits + split_index;
      p.partial_out[partial * D + column] = value;
      if (column == 0) p.partial_lse[partial] = merge.lse();
    }
    if (column == 0 && split_index == 0 && p.arrived) p.arrived[row] = 0;
  }
}

// One block per query head of a sequence.
__global__ void merge_splits_kernel(const __grid_constant__ DecodeAttentionParams p) {
  merge_head(p, blockIdx.x);
}

template <typename T, int D, typename Launch>
void launch_decode_attention(const DecodeAttentionParams& p, const Launch& launch) {
  using Tile = DecodeTile<D>;
  const int tiles = (p.num_heads / p.num_kv_heads + Tile::kHeads - 1) / Tile::kHeads;
  launch(decode_attention_kernel<T, D>, dim3(p.num_kv_heads * tiles, p.batch, p.num_splits),
         dim3(Tile::kThreads), Tile::kShared, p);
  if (p.num_splits > 1 && !p.arrived) {
    constexpr int kThreads = (D + 31) / 32 * 32;  // a thread per element
    launch(merge_splits_kernel, dim3(p.batch * p.num_heads), dim3(kThreads), 0, p);
  }
}

template <typename T, typename Launch>
void launch_decode_attention(const DecodeAttentionParams& p, const Launch& launch) {
  switch (p.head_dim) {
    case 32: return launch_decode_attention<T, 32>(p, launch);
    case 64: return launch_decode_attention<T, 64>(p, launch);
    case 80: return launch_decode_attention<T, 80>(p, launch);
    case 96: return launch_decode_attention<T, 96>(p, launch);
    case 128: return launch_decode_attention<T, 128>(p, launch);
    case 256: return launch_decode_attention<T, 256>(p, launch);
  }
}

// Starts the kernels through `launch(kernel, grid, block, shared_bytes, args...)`.
template <typename Launch>
void launch_decode_attention(const DecodeAttentionParams& p, const Launch& launch) {
  switch (p.dtype) {
    case ScalarType::f32: return launch_decode_attention<float>(p, launch);
    case ScalarType::f16: return launch_decode_attention<__half>(p, launch);
    case ScalarType::bf16: return launch_decode_attention<__nv_bfloat16>(p, launch);
  }
}

}  // namespace kvcomp
