// What the warps of decode_attention and append_attention share, whatever the type: the shape of a
// block, its part of the tokens, its rows of q, and what a warp must offer.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

// K has D columns, V has Dv. kFragments fragments of S are 8 rows of q each: a block's columns.
template <int D, int Dv, int kFragments>
struct DecodeShape {
  static constexpr int kKeyDim = D, kValueDim = Dv;
  static constexpr int kTokens = 16, kColumns = 8 * kFragments;
  static constexpr int kKeySteps = D / 16, kValueSteps = Dv / 16;
  static constexpr int kWarps = D <= 128 ? 4 : 2, kThreads = kWarps * 32;

  // After the last token the pipelines' memory holds the states that are merged.
  struct States {
    float max[kWarps][kColumns], sum[kWarps][kColumns];
    float out[kWarps][kColumns][Dv];
  };

 protected:
  static constexpr std::size_t with_states(std::size_t pipeline) {
    return pipeline > sizeof(States) ? pipeline : sizeof(States);
  }
  // What an SM of 9.0 has room for, which registers must allow: 1 KB of each block is the system's.
  static constexpr int blocks(std::size_t shared, int registers) {
    const int by_shared_memory = 228 * 1024 / static_cast<int>(shared + 1024);
    const int by_registers = 65536 / (kThreads * registers);
    return by_shared_memory < by_registers ? by_shared_memory : by_registers;
  }
};

// Of rows in 16 bits; those in fp32 need no more.
template <int D, int Dv, int kFragments>
struct DecodeTile : DecodeShape<D, Dv, kFragments> {
  using Shape = DecodeShape<D, Dv, kFragments>;
  using Shape::kColumns, Shape::kKeySteps, Shape::kTokens, Shape::kValueSteps, Shape::kWarps;
  // 16 bytes more than a row: the 8 rows of a matrix then lie in different banks.
  static constexpr int kKeyPitch = D + 8, kValuePitch = Dv + 8;
  // Where a lane has no registers for its part of q, all warps read one copy of it.
  static constexpr bool kShareQueries = kFragments * kKeySteps > 16;

  struct Stage {
    alignas(16) uint16_t k[kTokens * kKeyPitch];
    alignas(16) uint16_t v[kTokens * kValuePitch];
    int slot[kTokens];  // where the tokens come from; < 0: not attended, see Slot
  };
  // As many as keep a block under 82 KB: three of most sizes share an SM of 9.0, two one of 8.0.
  static constexpr int kMost = 82 * 1024 / (kWarps * static_cast<int>(sizeof(Stage)));
  static constexpr int kStages = kMost < 2 ? 2 : kMost > 4 ? 4 : kMost;
  static constexpr std::size_t kStates = Shape::with_states(sizeof(Stage) * kStages * kWarps);
  // Behind them, with kShareQueries, q [kColumns, kKeyPitch] in 16 bits.
  static constexpr std::size_t kQueries = kShareQueries ? 2 * kColumns * kKeyPitch : 0;
  static constexpr std::size_t kShared = kStates + kQueries;
  // A thread's sums, its part of q, and its part of S and P; some 60 registers besides.
  static constexpr int kRegisters =
      60 + kFragments * (kValueSteps * 4 + kKeySteps * (kShareQueries ? 0 : 2) + 26);
  static constexpr int kBlocks = Shape::blocks(kShared, kRegisters);
};

// The tile of rows of type T; that of codes is in decode_codes.cuh.
template <typename T, int D, int Dv, int kFragments>
struct TileOf {
  using Type = DecodeTile<D, Dv, kFragments>;
};

// Whether V may have other columns than K: in a type of codes it has as many.
template <typename T>
inline constexpr bool kMayDiffer = true;

enum Slot : int { kSkipped = -1, kWild = -2 };  // kWild: an id out of range, which poisons the row

// Which positions a block attends to, and where they are.
struct DecodeSplit {
  const int32_t* ids;  // of this sequence and head; nullptr: dense
  int page_size, page_pitch, num_slots;
  int first, end;  // positions [first, end)
  bool wrong;      // a length that cannot be: the result is NaN

  __device__ DecodeSplit(const DecodeAttentionParams& p, int sequence, int kv_head, int split)
      : ids(p.page_ids ? p.page_ids + sequence * p.stride_ids_b + kv_head * p.stride_ids_h
                       : nullptr),
        page_size(p.page_size),
        page_pitch(p.page_pitch),
        num_slots(p.num_slots) {
    const int positions = p.num_positions;
    const int length = p.seq_lens[sequence];
    wrong = length < 0 || length > positions;
    // Equal parts of what this row has, whatever there is room for; at most split_size.
    const int own = max(min(length, positions), 0);
    int part = (own + p.num_splits - 1) / p.num_splits;
    part = min(max((part + kRound - 1) / kRound * kRound, kLeast), p.split_size);
    first = split * part;
    end = min(first + part, own);
  }

  // Of the page that a position is in; a slot is made of it later, when it has come.
  __device__ int load_id(int position) const {
    return ids && position < end ? ids[position / page_size] : kSkipped;
  }
  __device__ int slot(int position, int64_t id) const {
    if (position >= end) return kSkipped;
    if (!ids) return position;
    const int64_t at = id * page_pitch + position % page_size;
    return id == -1 ? kSkipped : id < 0 || at >= num_slots ? kWild : static_cast<int>(at);
  }
  __device__ int slot(int position) const { return slot(position, load_id(position)); }

 private:
  static constexpr int kRound = 64;   // tokens that a block's warps take at a time
  static constexpr int kLeast = 256;  // fewer cost more to merge than they save
};

// The logits, where they are wanted.
class LogitsOut {
 public:
  __device__ explicit LogitsOut(const DecodeAttentionParams& p) : p_(p) {}

  __device__ explicit operator bool() const { return p_.logits; }

  // `row` is the offset of a query head's logits.
  __device__ void store(int64_t row, int position, float logit) const {
    const int64_t at = row + position;
    if (p_.logits_dtype == ScalarType::f32) {
      static_cast<float*>(p_.logits)[at] = logit;
    } else {
      constexpr float kMax = 65504;  // finite logits stay so
      if (fabsf(logit) < INFINITY) logit = fminf(fmaxf(logit, -kMax), kMax);
      from_float(logit, static_cast<__half*>(p_.logits)[at]);
    }
  }

 private:
  const DecodeAttentionParams& p_;
};

// A soft cap: softcap * tanh(logit / softcap), with errors of some 1e-7 of the cap.
__device__ inline float cap_logit(float logit, float softcap) {
  const float squared = exp2f(logit * (2 * kLog2e / softcap));  // e^x of tanh x; inf: the cap
  return softcap - __fdividef(2 * softcap, squared + 1);
}

// The columns of a block of decode_attention: up to 8 of the query heads that share a KV head.
// append_attention has its own.
class DecodeColumns {
  static constexpr int kColumns = DecodeShape<32, 32, 1>::kColumns;

 public:
  __device__ DecodeColumns(const DecodeAttentionParams& p, int sequence, int kv_head, int tile)
      : p_(p),
        sequence_(sequence),
        first_(kv_head * (p.num_heads / p.num_kv_heads) + tile * kColumns),
        count_(min(kColumns, (kv_head + 1) * (p.num_heads / p.num_kv_heads) - first_)) {}

  // Columns that attend, and those that have outputs.
  __device__ int count() const { return count_; }
  __device__ int stored() const { return count_; }
  __device__ bool wrong() const { return false; }

  // Offsets of a column's q and logits, and its row of the outputs.
  __device__ int64_t q(int column) const {
    return sequence_ * p_.stride_q_b + (first_ + column) * p_.stride_q_h;
  }
  __device__ int64_t logits(int column) const {
    return sequence_ * p_.stride_logits_b + (first_ + column) * p_.stride_logits_h;
  }
  __device__ int64_t out(int column) const {
    return static_cast<int64_t>(sequence_) * p_.num_heads + first_ + column;
  }

  // Whether all columns see all of the positions before `end`; else, whether one sees a position.
  __device__ bool see_all(int) const { return true; }
  __device__ bool sees(int, int) const { return true; }

 private:
  const DecodeAttentionParams& p_;
  const int64_t sequence_;
  const int first_, count_;
};

// One warp's way through its tokens: made from the block's place, run() attends, leave(states)
// hands over max, sum and output of each column.
template <typename T, int D, int Dv, int kFragments, typename Columns>
class DecodeWarp;

}  // namespace kvcomp
