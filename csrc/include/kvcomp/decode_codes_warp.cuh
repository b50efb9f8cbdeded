// A warp of decode_attention and append_attention over K and V in eight bits, on the tensor cores.
//
// As the warp of 16-bit rows, tiles of 16 tokens in turn, but a tile has half the bytes. ldmatrix
// moves codes in pairs along D. Of K a lane gets four neighbours of a row, which are columns of two
// fragments once q's elements are dealt out alike. Of V, transposed, it gets two neighbours of each
// of two tokens, which become two rows of VT. Codes turn into fp16 there and nowhere else; K's
// scales come in at the logits, V's at the probabilities. These are kept in fp16, relative to
// the largest scale so far times 2^-15, so that none of them overflows and few lose bits.
#pragma once

#include <cstdint>

#include "kvcomp/codes.cuh"
#include "kvcomp/decode_softmax.cuh"
#include "kvcomp/decode_split.cuh"
#include "kvcomp/matrix.cuh"

namespace kvcomp {

struct Codes {};  // the type of such rows, q in 16 bits

template <int D, int kFragments>
struct CodeTile : DecodeShape<D, kFragments> {
  using Shape = DecodeShape<D, kFragments>;
  using Shape::kColumns, Shape::kSteps, Shape::kTokens, Shape::kWarps;
  // The 8 rows of a matrix lie in different banks.
  static constexpr int kPitch = D % 32 ? D : D + 16;

  struct Stage {
    alignas(16) int8_t k[kTokens * kPitch];
    alignas(16) int8_t v[kTokens * kPitch];
    uint32_t words[kTokens];
    int slot[kTokens];  // where the tokens come from; < 0: not attended, see Slot
  };
  static constexpr int kMost = 72 * 1024 / (kWarps * static_cast<int>(sizeof(Stage)));
  static constexpr int kStages = kMost < 2 ? 2 : kMost > 6 ? 6 : kMost;
  static constexpr std::size_t kStates = Shape::with_states(sizeof(Stage) * kStages * kWarps);
  // Behind them q [kColumns, kQueryPitch] as integers in fp16, and their steps.
  static constexpr int kQueryPitch = D + 16;
  static constexpr std::size_t kQueries = kColumns * (2 * kQueryPitch + sizeof(float));
  static constexpr std::size_t kShared = kStates + kQueries;
  static constexpr bool kHoldQueries = kFragments * kSteps <= 16;  // in registers
  // A thread's sums, its part of q, and its part of S and P; some 64 registers besides.
  static constexpr int kRegisters = 64 + kFragments * (kSteps * (kHoldQueries ? 6 : 4) + 28);
  static constexpr int kBlocks = Shape::blocks(kShared, kRegisters);
};

template <int D, int kFragments>
struct TileOf<Codes, D, kFragments> {
  using Type = CodeTile<D, kFragments>;
};

// A block's q in shared memory, and of that a lane's B fragments: element 4 * (lane % 4) + i of
// every 16 is row 2 * (lane % 4) + i % 2 of the upper (i < 2) or lower half.
template <int D, int kFragments>
class CodeQueries {
  using Tile = CodeTile<D, kFragments>;
  static constexpr int kSteps = Tile::kSteps, kHeld = Tile::kHoldQueries ? kSteps : 1;

 public:
  // By the whole block, before its warps are made.
  template <typename Columns>
  __device__ static void share(const DecodeAttentionParams& p, const Columns& columns,
                               uint16_t* queries) {
    const int lane = threadIdx.x % 32;
    for (int column = threadIdx.x / 32; column < Tile::kColumns; column += Tile::kWarps) {
      const bool used = column < columns.count();
      const int64_t row = used ? columns.q(column) : 0;
      uint32_t top = 0;
      for (int i = lane; i < D; i += 32) top = max(top, magnitude(element(p, row + i)));
      const QueryStep integers(__reduce_max_sync(kFullMask, top));
      for (int i = lane; i < D; i += 32) {
        const __half q = __float2half_rn(used ? integers.integer(element(p, row + i)) : 0.0f);
        memcpy(queries + column * Tile::kQueryPitch + i, &q, sizeof q);
      }
      if (lane == 0) steps(queries)[column] = used ? integers.step() : 0.0f;
    }
  }
  __device__ static float step(const uint16_t* queries, int column) {
    return steps(const_cast<uint16_t*>(queries))[column];
  }

  __device__ explicit CodeQueries(const uint16_t* queries)
      : row_(queries + threadIdx.x % 32 / 4 * Tile::kQueryPitch + threadIdx.x % 4 * 4) {
    if constexpr (Tile::kHoldQueries) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) load(f, step, q_[f][step]);
      }
    }
  }

  __device__ void get(int step, unsigned (&q)[kFragments][2]) const {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      if constexpr (Tile::kHoldQueries) {
        q[f][0] = q_[f][step][0], q[f][1] = q_[f][step][1];
      } else {
        load(f, step, q[f]);
      }
    }
  }

 private:
  __device__ static float element(const DecodeAttentionParams& p, int64_t at) {
    return p.q_dtype == ScalarType::f16 ? to_float(static_cast<const __half*>(p.q)[at])
                                        : to_float(static_cast<const __nv_bfloat16*>(p.q)[at]);
  }
  __device__ static float* steps(uint16_t* queries) {
    return reinterpret_cast<float*>(queries + Tile::kColumns * Tile::kQueryPitch);
  }
  __device__ void load(int f, int step, unsigned (&q)[2]) const {
    const uint2 two = *reinterpret_cast<const uint2*>(row_ + f * 8 * Tile::kQueryPitch + step * 16);
    q[0] = two.x, q[1] = two.y;
  }

  const uint16_t* row_;
  unsigned q_[Tile::kHoldQueries ? kFragments : 1][kHeld][2];
};

template <int D, int kFragments, typename Columns>
class DecodeWarp<Codes, D, kFragments, Columns> {
  using Tile = CodeTile<D, kFragments>;
  using Stage = typename Tile::Stage;
  using Queries = CodeQueries<D, kFragments>;
  static constexpr int kTokens = Tile::kTokens, kSteps = Tile::kSteps;
  static constexpr int kPerRow = D / 16, kTotal = kTokens * kPerRow;  // pieces of 16 bytes
  static constexpr int kPieces = (kTotal + 31) / 32;                  // a lane's, of K or V
  static constexpr float kHeadroom = 32768;                           // below the largest fp16

 public:
  __device__ static void share(const DecodeAttentionParams& p, const Columns& columns,
                               uint16_t* queries) {
    Queries::share(p, columns, queries);
  }

  __device__ DecodeWarp(const DecodeAttentionParams& p, const DecodeSplit& split,
                        const Columns& columns, int sequence, int kv_head, Stage* stages,
                        const uint16_t* queries)
      : split_(split),
        columns_(columns),
        k_(static_cast<const int8_t*>(p.k) + sequence * p.stride_k_b + kv_head * p.stride_k_h),
        v_(static_cast<const int8_t*>(p.v) + sequence * p.stride_v_b + kv_head * p.stride_v_h),
        words_(p.words + sequence * p.stride_words_b + kv_head * p.stride_words_h),
        stride_k_(p.stride_k_t),
        stride_v_(p.stride_v_t),
        aligned_(is_aligned(k_, p.stride_k_t) && is_aligned(v_, p.stride_v_t)),
        stages_(stages),
        logits_(p),
        lane_(threadIdx.x % 32),
        first_tile_(split.first + threadIdx.x / 32 * kTokens),
        q_(queries) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        max_[f][i] = -INFINITY;
        factor_[f][i] = Queries::step(queries, f * 8 + lane_ % 4 * 2 + i) * p.scale;
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
      float s[kFragments][4] = {};
      wait_for_copies<2 * kAhead + 1>();  // K of this tile and the words
      __syncwarp();
      multiply_keys(stage, s);
      const float2 scales[2] = {scales_of(stage.words[lane_ / 4]),
                                scales_of(stage.words[lane_ / 4 + 8])};
      mask(stage, position(tile), scales, s);
      const float grown = grow(fmaxf(scales[0].y, scales[1].y));
      float decay[kFragments][2];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        advance_softmax(s[f], decay[f], max_[f], sum_[f]);
#pragma unroll
        for (int i = 0; i < 2; ++i) decay[f][i] *= grown;
      }
      wait_for_copies<2 * kAhead>();
      __syncwarp();
      accumulate_values(stage, scales, s, decay);
      __syncwarp();  // all lanes are done with the stage, which comes to be filled again
    }
    wait_for_copies<0>();
  }

  __device__ void leave(typename Tile::States& states) const {
    const int warp = threadIdx.x / 32;
    const float unit = unit_ / kHeadroom;
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
          float* out = states.out[warp][column] + step * 16 + lane_ / 4 * 2;
          out[0] = out_[f][step][i] * unit;
          out[1] = out_[f][step][i + 2] * unit;
        }
      }
    }
  }

 private:
  __device__ static bool is_aligned(const int8_t* base, int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(base) % 16 == 0 && stride % 16 == 0;
  }
  __device__ int position(int tile) const { return first_tile_ + tile * Tile::kWarps * kTokens; }

  // Of the page of the lane's token. Nothing is made of it before the tile is fetched.
  __device__ int load_id(int tile) const {
    return lane_ < kTokens ? split_.load_id(position(tile) + lane_) : kSkipped;
  }

  // Asks for a tile's rows; its page ids have been asked for a tile earlier. Rows and words of
  // tokens that are not attended become zeros.
  __device__ void fetch(int tile) {
    Stage& stage = stages_[tile % Tile::kStages];
    const int slot = lane_ < kTokens ? split_.slot(position(tile) + lane_, next_id_) : kSkipped;
    if (lane_ < kTokens) {
      stage.slot[lane_] = slot;
      copy_word_async(stage.words + lane_, words_ + max(slot, 0), slot >= 0);
    }
    int slots[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) slots[i] = __shfl_sync(kFullMask, slot, row_of(i));
    copy_rows(stage.k, k_, stride_k_, slots);
    end_copy_group();
    copy_rows(stage.v, v_, stride_v_, slots);
    end_copy_group();
    next_id_ = load_id(tile + 1);
  }

  // Of the lane's pieces of a tile.
  __device__ int row_of(int i) const { return min((i * 32 + lane_) / kPerRow, kTokens - 1); }
  __device__ int column_of(int i) const { return (i * 32 + lane_) % kPerRow * 16; }

  __device__ void copy_rows(int8_t* rows, const int8_t* base, int64_t stride,
                            const int (&slots)[kPieces]) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (kTotal % 32 && i * 32 + lane_ >= kTotal) break;
      const auto row = static_cast<uint32_t>(max(slots[i], 0));  // 32 x 64 bits are two products
      int8_t* to = rows + row_of(i) * Tile::kPitch + column_of(i);
      const int8_t* from = base + row * stride + column_of(i);
      if (aligned_) {
        copy_async(to, from, slots[i] >= 0);
      } else {
        for (int j = 0; j < 16; ++j) to[j] = slots[i] >= 0 ? from[j] : 0;
      }
    }
  }

  // Of two steps of 16 columns, or of the last one by itself: the row that the lane names.
  __device__ int named(int step) const {
    return lane_ % 16 * Tile::kPitch + step * 16 + (step + 1 < kSteps ? lane_ / 16 * 16 : 0);
  }

  __device__ void multiply_keys(const Stage& stage, float (&s)[kFragments][4]) const {
    // A second chain, so that a product waits for every other one only.
    float odd[kFragments][4] = {};
#pragma unroll(kSteps <= 16 ? kSteps : 4)
    for (int step = 0; step < kSteps; step += 2) {
      unsigned codes[4];
      load_matrices(codes, stage.k + named(step));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (step + half >= kSteps) break;
        const unsigned upper = codes[2 * half], lower = codes[2 * half + 1];
        const unsigned keys[4] = {widen_codes<0, 1>(upper), widen_codes<0, 1>(lower),
                                  widen_codes<2, 3>(upper), widen_codes<2, 3>(lower)};
        unsigned q[kFragments][2];
        q_.get(step + half, q);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          multiply_add(half ? odd[f] : s[f], keys, q[f], __half{});
        }
      }
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[f][i] += odd[f][i];
    }
  }

  // s becomes logits; -inf where a token is not attended.
  __device__ void mask(const Stage& stage, int first, const float2 (&scales)[2],
                       float (&s)[kFragments][4]) const {
    const int token = lane_ / 4;
    const int slots[2] = {stage.slot[token], stage.slot[token + 8]};
    const bool all = columns_.see_all(first + kTokens);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = f * 8 + lane_ % 4 * 2 + i % 2, at = first + token + i / 2 * 8;
        const float poison = slots[i / 2] == kSkipped ? -INFINITY : NAN;
        s[f][i] = slots[i / 2] < 0 ? poison : s[f][i] * factor_[f][i % 2] * scales[i / 2].x;
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

  // What the output so far is to be multiplied by, since a scale of V may be the largest yet. NaN
  // is no larger than anything.
  __device__ float grow(float scale) {
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      scale = fmaxf(scale, __shfl_xor_sync(kFullMask, scale, lanes));
    }
    if (!(scale > unit_)) return 1.0f;
    const float before = unit_;
    unit_ = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0xff800000u);  // a power of two
    return before / unit_;
  }

  __device__ void accumulate_values(const Stage& stage, const float2 (&scales)[2],
                                    const float (&s)[kFragments][4],
                                    const float (&decay)[kFragments][2]) {
    const float to_unit = kHeadroom / unit_;
    const float weights[2] = {scales[0].y * to_unit, scales[1].y * to_unit};
    unsigned probs[kFragments][2];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float weight = weights[i];
        probs[f][i] =
            transpose_matrix(pack(s[f][2 * i] * weight, s[f][2 * i + 1] * weight, __half{}));
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      unsigned codes[4];
      load_matrices_transposed(codes, stage.v + named(step));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (step + half >= kSteps) break;
        const unsigned early = codes[2 * half], late = codes[2 * half + 1];  // tokens
        const unsigned values[4] = {widen_codes<0, 2>(early), widen_codes<1, 3>(early),
                                    widen_codes<0, 2>(late), widen_codes<1, 3>(late)};
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          float (&out)[4] = out_[f][step + half];
#pragma unroll
          for (int i = 0; i < 4; ++i) out[i] *= decay[f][i % 2];
          multiply_add(out, values, probs[f], __half{});
        }
      }
    }
  }

  const DecodeSplit& split_;
  const Columns& columns_;
  const int8_t *k_, *v_;
  const uint32_t* words_;
  const int64_t stride_k_, stride_v_;
  const bool aligned_;  // rows can be copied 16 bytes at a time
  Stage* stages_;
  const LogitsOut logits_;
  const int lane_, first_tile_;
  int next_id_;  // of the tile to be fetched next, lane's token
  const Queries q_;
  float unit_ = 0x1p-24f;  // at least every scale of V so far, a power of two
  float factor_[kFragments][2];
  float max_[kFragments][2], sum_[kFragments][2] = {};  // of the lane's columns; sums by lane
  float out_[kFragments][kSteps][4] = {};
};

}  // namespace kvcomp
