// latent_attention: one query per head over rows that all heads share.
//
// Grid (tiles of heads, sequences, splits). A block has one split of the tokens of a sequence and
// 32 heads (16 of wider rows), and takes tiles of 16 tokens, each copied to shared memory once: the
// whole row is the key, its first columns are the value. For S = q rowsT the four warps divide the
// columns of the rows, and hold their part of q in registers; the parts are added where the softmax
// of a head is, 4 threads a head. For O += P V the warps divide the value's columns, so that each
// keeps its part of O. With many heads the tensor cores are the bound, not memory: the blocks of
// one split read the same rows, from L2 all but the first.
//
// Multiply-adds: T * Hq * (D + Dv). Bytes: T * D elements per tile of heads; 4 * Dv * Hq per split,
// written and read, for the merge; with logits 4 * T * Hq, or 2 in 16 bits. Barriers: 3 a tile.
#pragma once

#include <cstdint>

#include "kvcomp/decode_attention.cuh"
#include "kvcomp/latent_attention_fp32.cuh"
#include "kvcomp/matrix.cuh"

namespace kvcomp {

// kFragments of 16 heads each, over rows of at most kMostDim columns, kMostValue of them the value.
template <int kFragments_, int kMostDim, int kMostValue>
struct LatentTile {
  static constexpr int kFragments = kFragments_, kHeads = 16 * kFragments, kTokens = 16;
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr int kSteps = kMostDim / 16 / kWarps;     // of 16 columns of q, a warp's part
  static constexpr int kGroups = kMostValue / 16 / kWarps;  // of 16 columns of the value
  static_assert(kSteps * 16 * kWarps == kMostDim && kGroups * 16 * kWarps == kMostValue);
  static constexpr int kStages = kMostDim > 576 ? 2 : 3;
  static constexpr int kBlocks = 2;            // of a multiprocessor: 66 to 76 KB each
  static constexpr int kPitch = kMostDim + 8;  // the 8 rows of a matrix lie in different banks
  static constexpr int kLanes = kThreads / kHeads, kEach = kTokens / kLanes;  // of a head's softmax

  struct Stage {
    alignas(16) uint16_t rows[kTokens * kPitch];
    int slot[kTokens];  // where the tokens come from; < 0: not attended, see Slot
  };
  struct Shared {
    Stage stages[kStages];
    float parts[kWarps][kHeads][kTokens + 8];  // of S
    alignas(16) uint16_t probs[kHeads][kTokens + 8];
    float decay[kHeads];  // of what was summed before this tile; at the end 1 / sum
  };
};

template <typename T, typename Tile>
class LatentBlock {
  using Stage = typename Tile::Stage;
  static constexpr int kFragments = Tile::kFragments;

 public:
  __device__ LatentBlock(const DecodeAttentionParams& params, typename Tile::Shared& shared)
      : p_(params),
        value_dim_(params.value_dim),
        shared_(shared),
        sequence_(blockIdx.y),
        first_head_(blockIdx.x * Tile::kHeads),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        head_(threadIdx.x / Tile::kLanes),
        split_(p_, sequence_, 0, blockIdx.z),
        rows_(static_cast<const T*>(p_.k) + sequence_ * p_.stride_k_b),
        aligned_(reinterpret_cast<std::uintptr_t>(rows_) % 16 == 0 && p_.stride_k_t % 8 == 0),
        logits_(p_) {
    const int all = p_.head_dim / 16, part = (all + Tile::kWarps - 1) / Tile::kWarps;
    first_step_ = warp_ * part;
    steps_ = min(part, all - first_step_);  // below 1: none
    load_queries();
  }

  __device__ void run() {
    constexpr int kAhead = Tile::kStages - 1;
    next_id_ = load_id(0);
#pragma unroll
    for (int tile = 0; tile < kAhead; ++tile) fetch(tile);
    for (int tile = 0; position(tile) < split_.end; ++tile) {
      wait_for_copies<kAhead - 1>();
      __syncthreads();  // the tile is there, and the one before, whose stage is filled next, done
      fetch(tile + kAhead);
      const Stage& stage = shared_.stages[tile % Tile::kStages];
      multiply_keys(stage);
      __syncthreads();
      advance_softmax(stage, position(tile));
      __syncthreads();
      accumulate_values(stage);
    }
    wait_for_copies<0>();
  }

  __device__ void leave() {
    float sum = group_sum(sum_, Tile::kLanes);
    if (split_.wrong) sum = NAN;
    const bool leads = threadIdx.x % Tile::kLanes == 0;
    __syncthreads();
    if (leads) shared_.decay[head_] = sum == 0 ? 0.0f : 1 / sum;
    __syncthreads();
    if (leads && first_head_ + head_ < p_.num_heads) {
      float* const lse = p_.num_splits == 1 ? p_.lse : p_.partial_lse;
      lse[place(head_)] = sum == 0 ? -INFINITY : max_ + logf(sum);
    }
    for_each_value([&](int group, int column) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int head = f * 16 + lane_ / 4 + i / 2 % 2 * 8;
          if (first_head_ + head >= p_.num_heads) continue;
          const float value = out_[group][f][i / 4][i % 4] * shared_.decay[head];
          const int64_t at = place(head) * value_dim_ + column + i / 4 * 8 + lane_ % 4 * 2 + i % 2;
          if (p_.num_splits == 1) {
            from_float(value, static_cast<T*>(p_.out)[at]);
          } else {
            p_.partial_out[at] = value;
          }
        }
      }
    });
  }

 private:
  __device__ int position(int tile) const { return split_.first + tile * Tile::kTokens; }

  // Of a head of the block in the outputs of this split.
  __device__ int64_t place(int head) const {
    const int64_t row = static_cast<int64_t>(sequence_) * p_.num_heads + first_head_ + head;
    return row * p_.num_splits + blockIdx.z;
  }

  // use(i, column) for the groups of 16 columns of the value that are this warp's.
  template <typename Use>
  __device__ void for_each_value(const Use& use) {
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      const int column = (group * Tile::kWarps + warp_) * 16;
      if (column < value_dim_) use(group, column);
    }
  }

  // As A fragments: heads in rows.
  __device__ void load_queries() {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int head = first_head_ + f * 16 + lane_ / 4 + i % 2 * 8;
          const int column = (first_step_ + step) * 16 + lane_ % 4 * 2 + i / 2 * 8;
          const T* q = static_cast<const T*>(p_.q) + sequence_ * p_.stride_q_b +
                       head * p_.stride_q_h + column;
          const bool used = head < p_.num_heads && step < steps_;
          q_[f][step][i] = used ? bits_of(q[0]) | bits_of(q[1]) << 16 : 0;
        }
      }
    }
  }

  // Of the page of the thread's token: a row is copied by 8 threads.
  __device__ int load_id(int tile) const { return split_.load_id(position(tile) + row()); }
  __device__ static int row() { return threadIdx.x / 8; }
  static_assert(Tile::kThreads / 8 == Tile::kTokens);

  // Asks for a tile's rows; its page ids have been asked for a tile earlier. Rows of tokens that
  // are not attended become zeros: their probabilities are, but 0 * NaN is not.
  __device__ void fetch(int tile) {
    Stage& stage = shared_.stages[tile % Tile::kStages];
    const int slot = split_.slot(position(tile) + row(), next_id_);
    if (threadIdx.x % 8 == 0) stage.slot[row()] = slot;
    const T* from = rows_ + max(slot, 0) * p_.stride_k_t;
    uint16_t* to = stage.rows + row() * Tile::kPitch;
    for (int i = threadIdx.x % 8 * 8; i < p_.head_dim; i += 64) {
      if (aligned_) {
        copy_async(to + i, from + i, slot >= 0);
      } else {
        for (int j = i; j < i + 8; ++j) to[j] = slot >= 0 ? bits_of(from[j]) : 0;
      }
    }
    end_copy_group();
    next_id_ = load_id(tile + 1);
  }

  // The warp's part of S, of its columns of q.
  __device__ void multiply_keys(const Stage& stage) {
    const uint16_t* rows = stage.rows + (lane_ % 8 + lane_ / 16 * 8) * Tile::kPitch +
                           lane_ / 8 % 2 * 8 + first_step_ * 16;
    float s[kFragments][2][4] = {};
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      if (step >= steps_) break;
      unsigned keys[4];
      load_matrices(keys, rows + step * 16);
      const unsigned tokens[2][2] = {{keys[0], keys[1]}, {keys[2], keys[3]}};
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        multiply_add(s[f][0], q_[f][step], tokens[0], T{});
        multiply_add(s[f][1], q_[f][step], tokens[1], T{});
      }
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int head = f * 16 + lane_ / 4 + i / 2 % 2 * 8;
        shared_.parts[warp_][head][i / 4 * 8 + lane_ % 4 * 2 + i % 2] = s[f][i / 4][i % 4];
      }
    }
  }

  // Logits of the thread's head and tokens, and probabilities relative to the maximum so far.
  __device__ void advance_softmax(const Stage& stage, int first) {
    const int token = threadIdx.x % Tile::kLanes * Tile::kEach;
    float s[Tile::kEach], top = max_;
#pragma unroll
    for (int i = 0; i < Tile::kEach; ++i) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < Tile::kWarps; ++w) sum += shared_.parts[w][head_][token + i];
      const int slot = stage.slot[token + i];
      s[i] = slot >= 0 ? sum * p_.scale : slot == kSkipped ? -INFINITY : NAN;
      top = fmaxf(top, s[i]);
    }
    const int head = first_head_ + head_;
    if (logits_ && head < p_.num_heads) {
      const int64_t row = sequence_ * p_.stride_logits_b + head * p_.stride_logits_h;
      for (int i = 0; i < Tile::kEach; ++i) {
        if (first + token + i < split_.end) logits_.store(row, first + token + i, s[i]);
      }
    }
    for (int lanes = 1; lanes < Tile::kLanes; lanes *= 2) {
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, lanes));
    }
    const float base = top == -INFINITY ? 0.0f : top;
    const float decay = exp2f((max_ - base) * kLog2e);
    max_ = top;
    sum_ *= decay;
#pragma unroll
    for (int i = 0; i < Tile::kEach; ++i) {
      s[i] = exp2f((s[i] - base) * kLog2e);
      sum_ += s[i];
    }
#pragma unroll
    for (int i = 0; i < Tile::kEach; i += 2) {
      const unsigned pair = pack(s[i], s[i + 1], T{});
      memcpy(&shared_.probs[head_][token + i], &pair, sizeof pair);
    }
    if (token == 0) shared_.decay[head_] = decay;
  }

  __device__ void accumulate_values(const Stage& stage) {
    unsigned probs[kFragments][4];
    float decay[kFragments][2];
    bool steady = true;  // no maximum has changed
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      load_matrices(probs[f], &shared_.probs[f * 16 + lane_ % 16][lane_ / 16 * 8]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        decay[f][i] = shared_.decay[f * 16 + lane_ / 4 + i * 8];
        steady = steady && decay[f][i] == 1.0f;
      }
    }
    steady = __ballot_sync(kFullMask, steady) == kFullMask;
    const uint16_t* rows = stage.rows + lane_ % 16 * Tile::kPitch + lane_ / 16 * 8;
    for_each_value([&](int group, int column) {
      unsigned values[4];
      load_matrices_transposed(values, rows + column);
      const unsigned columns[2][2] = {{values[0], values[1]}, {values[2], values[3]}};
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        auto& out = out_[group][f];
        if (!steady) {
#pragma unroll
          for (int i = 0; i < 8; ++i) out[i / 4][i % 4] *= decay[f][i / 2 % 2];
        }
        multiply_add(out[0], probs[f], columns[0], T{});
        multiply_add(out[1], probs[f], columns[1], T{});
      }
    });
  }

  const DecodeAttentionParams& p_;
  const int value_dim_;
  typename Tile::Shared& shared_;
  const int sequence_, first_head_, warp_, lane_;
  const int head_;  // of the block: the one whose softmax this thread takes part in
  const DecodeSplit split_;
  const T* const rows_;
  const bool aligned_;  // rows can be copied 16 bytes at a time
  const LogitsOut logits_;
  int first_step_, steps_;
  int next_id_;  // of the tile to be fetched next
  unsigned q_[kFragments][Tile::kSteps][4];
  float max_ = -INFINITY, sum_ = 0;  // of head_; the sum of the thread's own tokens
  float out_[Tile::kGroups][kFragments][2][4] = {};
};

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    latent_attention_kernel(const __grid_constant__ DecodeAttentionParams p) {
  LatentBlock<T, Tile> block(p, *dynamic_shared<typename Tile::Shared>());
  block.run();
  block.leave();
}

// --- launches ------------------------------------------------------------------------------------

template <typename T, typename Tile, typename Launch>
void launch_latent_tiles(const DecodeAttentionParams& p, const Launch& launch) {
  const int tiles = (p.num_heads + Tile::kHeads - 1) / Tile::kHeads;
  launch(latent_attention_kernel<T, Tile>, dim3(tiles, p.batch, p.num_splits), dim3(Tile::kThreads),
         sizeof(typename Tile::Shared), p);
}

template <typename T, typename Launch>
void launch_latent_halves(const DecodeAttentionParams& p, const Launch& launch) {
  if (p.head_dim <= 576 && p.value_dim <= 512) {
    launch_latent_tiles<T, LatentTile<2, 576, 512>>(p, launch);
  } else {
    launch_latent_tiles<T, LatentTile<1, 1024, 1024>>(p, launch);
  }
}

// Starts the kernels through `launch(kernel, grid, block, shared_bytes, args...)`.
template <typename Launch>
void launch_latent_attention(const DecodeAttentionParams& p, const Launch& launch) {
  switch (p.kv_dtype) {
    case ScalarType::f32: launch_latent_fp32(p, launch); break;
    case ScalarType::f16: launch_latent_halves<__half>(p, launch); break;
    case ScalarType::bf16: launch_latent_halves<__nv_bfloat16>(p, launch); break;
    case ScalarType::i8: break;  // the boundary has refused them
  }
  launch_merge_splits<256>(p, p.batch * p.num_heads, launch);
}

}  // namespace kvcomp
