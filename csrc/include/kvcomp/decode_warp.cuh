// A warp of decode_attention and append_attention in 16-bit types, on the tensor cores.
//
// It takes tiles of 16 tokens in turn with the other warps of its block, with a pipeline and a
// softmax of its own. K and V are the tall operands, tokens in rows, S [16 tokens, 8 columns] =
// K qT and OT [D, 8 columns] += VT P, for each of the block's fragments of 8 columns. What becomes
// of a column does not depend on how many there are.
#pragma once

#include <cstdint>

#include "kvcomp/decode_softmax.cuh"
#include "kvcomp/decode_split.cuh"
#include "kvcomp/matrix.cuh"

namespace kvcomp {

template <typename T>
__device__ unsigned bits_of(T value) {
  uint16_t word;
  memcpy(&word, &value, sizeof word);
  return word;
}

// A block's q as B fragments. A lane of a fragment holds rows of B that are neighbours in its
// column of q: B's fragment is that of its transpose, q as it is.
template <typename T, int D, int kFragments,
          bool kShared = DecodeTile<D, kFragments>::kShareQueries>
class Queries {  // in registers
  static constexpr int kSteps = D / 16;

 public:
  template <typename Columns>
  __device__ Queries(const DecodeAttentionParams& p, const Columns& columns, const uint16_t*) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int column = f * 8 + lane / 4;
      const bool used = column < columns.count();
      const T* q = static_cast<const T*>(p.q) + (used ? columns.q(column) : 0) + lane % 4 * 2;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const T* from = q + step * 16 + i * 8;
          q_[f][step][i] = used ? bits_of(from[0]) | bits_of(from[1]) << 16 : 0;
        }
      }
    }
  }

  __device__ void get(int step, unsigned (&q)[kFragments][2]) const {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) q[f][0] = q_[f][step][0], q[f][1] = q_[f][step][1];
  }

 private:
  unsigned q_[kFragments][kSteps][2];
};

template <typename T, int D, int kFragments>
class Queries<T, D, kFragments, true> {  // in shared memory
  using Tile = DecodeTile<D, kFragments>;
  static_assert(kFragments % 2 == 0 || kFragments == 1);

 public:
  template <typename Columns>
  __device__ Queries(const DecodeAttentionParams&, const Columns&, const uint16_t* queries)
      : row_(kFragments == 1
                 ? queries + threadIdx.x % 32 / 4 * Tile::kPitch + threadIdx.x % 4 * 2
                 : queries + (threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8) * Tile::kPitch +
                       threadIdx.x / 8 % 2 * 8) {}

  template <typename Columns>
  __device__ static void share(const DecodeAttentionParams& p, const Columns& columns,
                               uint16_t* queries) {
    for (int i = threadIdx.x; i < Tile::kColumns * D; i += Tile::kThreads) {
      const int column = i / D, element = i % D;
      const bool used = column < columns.count();
      const T* q = static_cast<const T*>(p.q) + (used ? columns.q(column) : 0);
      queries[column * Tile::kPitch + element] =
          used ? static_cast<uint16_t>(bits_of(q[element])) : 0;
    }
  }

  __device__ void get(int step, unsigned (&q)[kFragments][2]) const {
    if constexpr (kFragments == 1) {
      memcpy(&q[0][0], row_ + step * 16, sizeof(unsigned));
      memcpy(&q[0][1], row_ + step * 16 + 8, sizeof(unsigned));
    } else {
#pragma unroll
      for (int f = 0; f < kFragments; f += 2) {
        unsigned two[4];
        load_matrices(two, row_ + f * 8 * Tile::kPitch + step * 16);
        q[f][0] = two[0], q[f][1] = two[1], q[f + 1][0] = two[2], q[f + 1][1] = two[3];
      }
    }
  }

 private:
  // Of one fragment the lane's own elements, else the row that it names of two fragments' matrices
  const uint16_t* row_;
};

template <typename T, int D, int kFragments, typename Columns>
class DecodeWarp {
  using Tile = DecodeTile<D, kFragments>;
  using Stage = typename Tile::Stage;
  static constexpr int kTokens = Tile::kTokens, kSteps = Tile::kSteps;
  static constexpr int kPieces = kTokens * D / 8 / 32;  // a lane's 16 bytes of a tile's K or V
  static_assert(kTokens * D / 8 % 32 == 0);

 public:
  // By the whole block, before its warps are made.
  __device__ static void share(const DecodeAttentionParams& p, const Columns& columns,
                               uint16_t* queries) {
    if constexpr (Tile::kShareQueries) Queries<T, D, kFragments>::share(p, columns, queries);
  }

  // `queries` is read with kShareQueries.
  __device__ DecodeWarp(const DecodeAttentionParams& p, const DecodeSplit& split,
                        const Columns& columns, int sequence, int kv_head, Stage* stages,
                        const uint16_t* queries)
      : split_(split),
        columns_(columns),
        k_(static_cast<const T*>(p.k) + sequence * p.stride_k_b + kv_head * p.stride_k_h),
        v_(static_cast<const T*>(p.v) + sequence * p.stride_v_b + kv_head * p.stride_v_h),
        stride_k_(p.stride_k_t),
        stride_v_(p.stride_v_t),
        aligned_(is_aligned(k_, p.stride_k_t) && is_aligned(v_, p.stride_v_t)),
        stages_(stages),
        scale_(p.scale),
        logits_(p),
        lane_(threadIdx.x % 32),
        first_tile_(split.first + threadIdx.x / 32 * kTokens),
        q_(p, columns, queries) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) max_[f][0] = max_[f][1] = -INFINITY;
  }

  __device__ void run() {
    constexpr int kAhead = Tile::kStages - 1;
    next_id_ = load_id(0);
#pragma unroll
    for (int tile = 0; tile < kAhead; ++tile) fetch(tile);
    for (int tile = 0; position(tile) < split_.end; ++tile) {
      fetch(tile + kAhead);
      const Stage& stage = stages_[tile % Tile::kStages];
      float s[kFragments][4] = {};
      wait_for_copies<2 * kAhead + 1>();  // K of this tile; V and later tiles may be under way
      __syncwarp();
      multiply_keys(stage, s);
      mask(stage, position(tile), s);
      float decay[kFragments][2];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) advance_softmax(s[f], decay[f], max_[f], sum_[f]);
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
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = sum_[f][i];
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kFullMask, sum, lanes);
        const int column = f * 8 + lane_ % 4 * 2 + i;
        if (lane_ < 4) states.max[warp][column] = max_[f][i], states.sum[warp][column] = sum;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          states.out[warp][column][step * 16 + lane_ / 4] = out_[f][step][i];
          states.out[warp][column][step * 16 + lane_ / 4 + 8] = out_[f][step][i + 2];
        }
      }
    }
  }

 private:
  __device__ static bool is_aligned(const T* base, int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(base) % 16 == 0 && stride % 8 == 0;
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
    const auto ask = [&](int i) { return __shfl_sync(kFullMask, slot, row_of(i)); };
    if constexpr (D <= 256) {
      int slots[kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) slots[i] = ask(i);
      copy_keys_and_values(stage, [&](int i) { return slots[i]; });
    } else {  // there are no registers for so many beside the output
      copy_keys_and_values(stage, ask);
    }
    next_id_ = load_id(tile + 1);
  }

  template <typename Slots>
  __device__ void copy_keys_and_values(Stage& stage, const Slots& slot_of) const {
    copy_rows(stage.k, k_, stride_k_, slot_of);
    end_copy_group();
    copy_rows(stage.v, v_, stride_v_, slot_of);
    end_copy_group();
  }

  // Of the lane's pieces of a tile.
  __device__ int row_of(int i) const { return (i * 32 + lane_) / (D / 8); }
  __device__ int column_of(int i) const { return (i * 32 + lane_) % (D / 8) * 8; }

  // Rows of tokens that are not attended become zeros: their probabilities are, but 0 * NaN is not.
  template <typename Slots>
  __device__ void copy_rows(uint16_t* rows, const T* base, int64_t stride,
                            const Slots& slot_of) const {
    const auto for_each_piece = [&](const auto& copy) {
#pragma unroll(kPieces <= 16 ? kPieces : 4)
      for (int i = 0; i < kPieces; ++i) {
        const int slot = slot_of(i);
        const auto row = static_cast<uint32_t>(max(slot, 0));  // 32 x 64 bits are two products
        copy(rows + row_of(i) * Tile::kPitch + column_of(i), base + row * stride + column_of(i),
             slot >= 0);
      }
    };
    if (aligned_) {
      for_each_piece(
          [](uint16_t* to, const T* from, bool wanted) { copy_async(to, from, wanted); });
    } else {
      for_each_piece([](uint16_t* to, const T* from, bool wanted) {
        for (int j = 0; j < 8; ++j) to[j] = wanted ? bits_of(from[j]) : 0;
      });
    }
  }

  __device__ void multiply_keys(const Stage& stage, float (&s)[kFragments][4]) const {
    const uint16_t* row = stage.k + lane_ % 16 * Tile::kPitch + lane_ / 16 * 8;
    // A second chain, so that a product waits for every other one only.
    float odd[kFragments][4] = {};
#pragma unroll(kSteps <= 16 ? kSteps : 4)
    for (int step = 0; step < kSteps; ++step) {
      unsigned keys[4], q[kFragments][2];
      load_matrices(keys, row + step * 16);
      q_.get(step, q);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        multiply_add(step % 2 ? odd[f] : s[f], keys, q[f], T{});
      }
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[f][i] += odd[f][i];
    }
  }

  // s becomes logits; -inf where a token is not attended.
  __device__ void mask(const Stage& stage, int first, float (&s)[kFragments][4]) const {
    const int token = lane_ / 4;
    const int slots[2] = {stage.slot[token], stage.slot[token + 8]};
    const bool all = columns_.see_all(first + kTokens);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = f * 8 + lane_ % 4 * 2 + i % 2, at = first + token + i / 2 * 8;
        const float poison = slots[i / 2] == kSkipped ? -INFINITY : NAN;
        s[f][i] = slots[i / 2] < 0 ? poison : s[f][i] * scale_;
        if (!all && !columns_.sees(column, at)) s[f][i] = -INFINITY;
      }
    }
    if (!logits_) return;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = f * 8 + lane_ % 4 * 2 + i % 2, at = first + token + i / 2 * 8;
        if (column < columns_.count() && at < split_.end) {
          logits_.store(columns_.logits(column), at, s[f][i]);
        }
      }
    }
  }

  __device__ void accumulate_values(const Stage& stage, const float (&s)[kFragments][4],
                                    const float (&decay)[kFragments][2]) {
    unsigned probs[kFragments][2];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      probs[f][0] = transpose_matrix(pack(s[f][0], s[f][1], T{}));
      probs[f][1] = transpose_matrix(pack(s[f][2], s[f][3], T{}));
    }
    const uint16_t* row = stage.v + (lane_ % 8 + lane_ / 16 * 8) * Tile::kPitch + lane_ / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned values[4];
      load_matrices_transposed(values, row + step * 16);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[f][step][i] *= decay[f][i % 2];
        multiply_add(out_[f][step], values, probs[f], T{});
      }
    }
  }

  const DecodeSplit& split_;
  const Columns& columns_;
  const T *k_, *v_;
  const int64_t stride_k_, stride_v_;
  const bool aligned_;  // rows can be copied 16 bytes at a time
  Stage* stages_;
  const float scale_;
  const LogitsOut logits_;
  const int lane_, first_tile_;
  int next_id_;  // of the tile to be fetched next, lane's token
  const Queries<T, D, kFragments> q_;
  float max_[kFragments][2], sum_[kFragments][2] = {};  // of the lane's columns; sums by lane
  float out_[kFragments][kSteps][4] = {};
};

}  // namespace kvcomp
