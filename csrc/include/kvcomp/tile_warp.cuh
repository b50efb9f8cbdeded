// What the warps of decode_attention and append_attention on the tensor cores share, whatever the
// type of their rows: the way through the tokens, and what becomes of their logits.
//
// A warp takes tiles of 16 tokens in turn with the other warps of its block, with a pipeline and a
// softmax of its own. S [16 tokens, 8 columns] is a fragment for 8 columns of the block.
#pragma once

#include <cstdint>

#include "kvcomp/decode_softmax.cuh"
#include "kvcomp/decode_split.cuh"
#include "kvcomp/matrix.cuh"

namespace kvcomp {

template <typename T>
__device__ uint16_t bits_of(T value) {
  uint16_t word;
  memcpy(&word, &value, sizeof word);
  return word;
}
__device__ inline int8_t bits_of(int8_t code) { return code; }

// Rows of type T. `Self`, the warp of these rows, has
//   multiply_keys(stage, s)              s becomes the logits, before a cap
//   accumulate_values(stage, s, decay)   s: probabilities; decay: for the output so far
//   copy_words(stage, slot)              what a row has besides, asked for with K
//   element(step, half), unit()          of out_[f][step][i + 2 * half]: where it goes, its unit
template <typename Self, typename T, typename Tile, int kFragments, typename Columns>
class TileWarp {
  static constexpr int kAtOnce = 16 / sizeof(T);  // elements of a piece of 16 bytes
  static constexpr int kTokens = Tile::kTokens;
  using Stage = typename Tile::Stage;

 public:
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
      self().multiply_keys(stage, s);
      if (p_.softcap > 0) cap(s);
      mask(stage, position(tile), s);
      float decay[kFragments][2];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) advance_softmax(s[f], decay[f], max_[f], sum_[f]);
      wait_for_copies<2 * kAhead>();
      __syncwarp();
      self().accumulate_values(stage, s, decay);
      __syncwarp();  // all lanes are done with the stage, which comes to be filled again
    }
    wait_for_copies<0>();
  }

  __device__ void leave(typename Tile::States& states) const {
    const int warp = threadIdx.x / 32;
    const float unit = self().unit();
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = sum_[f][i];
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kFullMask, sum, lanes);
        const int column = f * 8 + lane_ % 4 * 2 + i;
        if (lane_ < 4) states.max[warp][column] = max_[f][i], states.sum[warp][column] = sum;
#pragma unroll
        for (int step = 0; step < Tile::kValueSteps; ++step) {
          float* out = states.out[warp][column];
          out[self().element(step, 0)] = out_[f][step][i] * unit;
          out[self().element(step, 1)] = out_[f][step][i + 2] * unit;
        }
      }
    }
  }

 protected:
  __device__ TileWarp(const DecodeAttentionParams& p, const DecodeSplit& split,
                      const Columns& columns, int sequence, int kv_head, Stage* stages)
      : p_(p),
        lane_(threadIdx.x % 32),
        split_(split),
        columns_(columns),
        k_(static_cast<const T*>(p.k) + sequence * p.stride_k_b + kv_head * p.stride_k_h),
        v_(static_cast<const T*>(p.v) + sequence * p.stride_v_b + kv_head * p.stride_v_h),
        aligned_(is_aligned(k_, p.stride_k_t) && is_aligned(v_, p.stride_v_t)),
        stages_(stages),
        logits_(p),
        first_tile_(split.first + threadIdx.x / 32 * kTokens) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) max_[f][0] = max_[f][1] = -INFINITY;
  }

  const DecodeAttentionParams& p_;
  const int lane_;
  float out_[kFragments][Tile::kValueSteps][4] = {};

 private:
  __device__ Self& self() { return static_cast<Self&>(*this); }
  __device__ const Self& self() const { return static_cast<const Self&>(*this); }

  __device__ static bool is_aligned(const T* base, int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(base) % 16 == 0 && stride % kAtOnce == 0;
  }
  __device__ int position(int tile) const { return first_tile_ + tile * Tile::kWarps * kTokens; }

  // Of the page of the lane's token. Nothing is made of it before the tile is fetched.
  __device__ int load_id(int tile) const {
    return lane_ < kTokens ? split_.load_id(position(tile) + lane_) : kSkipped;
  }

  // A lane's pieces of the rows of a tile.
  template <int kDim>
  struct Pieces {
    static constexpr int kPerRow = kDim / kAtOnce, kTotal = kTokens * kPerRow;
    static constexpr int kEach = (kTotal + 31) / 32;
    static constexpr bool kFull = kTotal % 32 == 0;  // whether all lanes have as many

    const int lane;
    __device__ bool has(int i) const { return kFull || i * 32 + lane < kTotal; }
    __device__ int row(int i) const {
      const int row = (i * 32 + lane) / kPerRow;
      return kFull ? row : min(row, kTokens - 1);
    }
    __device__ int column(int i) const { return (i * 32 + lane) % kPerRow * kAtOnce; }
  };
  using KeyPieces = Pieces<Tile::kKeyDim>;
  using ValuePieces = Pieces<Tile::kValueDim>;

  // Asks for a tile's rows; its page ids have been asked for a tile earlier.
  __device__ void fetch(int tile) {
    Stage& stage = stages_[tile % Tile::kStages];
    const int slot = lane_ < kTokens ? split_.slot(position(tile) + lane_, next_id_) : kSkipped;
    if (lane_ < kTokens) {
      stage.slot[lane_] = slot;
      self().copy_words(stage, slot);
    }
    const KeyPieces keys{lane_};
    const ValuePieces values{lane_};
    if constexpr (Tile::kKeyDim == Tile::kValueDim && KeyPieces::kEach <= 16) {
      int slots[KeyPieces::kEach];
#pragma unroll
      for (int i = 0; i < KeyPieces::kEach; ++i) {
        slots[i] = __shfl_sync(kFullMask, slot, keys.row(i));
      }
      const auto slot_of = [&](int i) { return slots[i]; };
      copy_keys_and_values(stage, keys, slot_of, values, slot_of);
    } else {  // other rows, or more than there are registers for beside the output
      copy_keys_and_values(
          stage, keys, [&](int i) { return __shfl_sync(kFullMask, slot, keys.row(i)); }, values,
          [&](int i) { return __shfl_sync(kFullMask, slot, values.row(i)); });
    }
    next_id_ = load_id(tile + 1);
  }

  template <typename KeySlots, typename ValueSlots>
  __device__ void copy_keys_and_values(Stage& stage, const KeyPieces& keys, const KeySlots& key,
                                       const ValuePieces& values, const ValueSlots& value) const {
    copy_rows(stage.k, Tile::kKeyPitch, k_, p_.stride_k_t, keys, key);
    end_copy_group();
    copy_rows(stage.v, Tile::kValuePitch, v_, p_.stride_v_t, values, value);
    end_copy_group();
  }

  // Rows of tokens that are not attended become zeros: their probabilities are, but 0 * NaN is not.
  template <typename Bits, typename PiecesOf, typename Slots>
  __device__ void copy_rows(Bits* rows, int pitch, const T* base, int64_t stride,
                            const PiecesOf& pieces, const Slots& slot_of) const {
    const auto for_each_piece = [&](const auto& copy) {
#pragma unroll(PiecesOf::kEach <= 16 ? PiecesOf::kEach : 4)
      for (int i = 0; i < PiecesOf::kEach; ++i) {
        const int slot = slot_of(i);
        if (!pieces.has(i)) break;
        const auto row = static_cast<uint32_t>(max(slot, 0));  // 32 x 64 bits are two products
        copy(rows + pieces.row(i) * pitch + pieces.column(i),
             base + row * stride + pieces.column(i), slot >= 0);
      }
    };
    if (aligned_) {
      for_each_piece([](Bits* to, const T* from, bool wanted) { copy_async(to, from, wanted); });
    } else {
      for_each_piece([](Bits* to, const T* from, bool wanted) {
        for (int j = 0; j < kAtOnce; ++j) to[j] = wanted ? bits_of(from[j]) : Bits{0};
      });
    }
  }

  __device__ void cap(float (&s)[kFragments][4]) const {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[f][i] = cap_logit(s[f][i], p_.softcap);
    }
  }

  // -inf where a token is not attended, NaN where its page is out of range; and what is wanted of
  // the logits.
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
        if (slots[i / 2] < 0) s[f][i] = poison;
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

  const DecodeSplit& split_;
  const Columns& columns_;
  const T *k_, *v_;
  const bool aligned_;  // rows can be copied 16 bytes at a time
  Stage* stages_;
  const LogitsOut logits_;
  const int first_tile_;
  int next_id_;  // of the tile to be fetched next, lane's token
  float max_[kFragments][2], sum_[kFragments][2] = {};  // of the lane's columns; sums by lane
};

}  // namespace kvcomp
