// A warp of decode_attention and append_attention over K and V in eight bits, on the tensor cores.
//
// As the warp of 16-bit rows, but a tile has half the bytes. ldmatrix moves codes in pairs along D.
// Of K a lane gets four neighbours of a row, which are columns of two fragments once q's elements
// are dealt out alike. Of V, transposed, it gets two neighbours of each of two tokens, which become
// two rows of VT. Codes turn into fp16 there and nowhere else; K's scales come in at the logits,
// V's at the probabilities. These are kept in fp16, relative to the largest scale so far times
// 2^-15, so that none of them overflows and few lose bits.
#pragma once

#include <cstdint>

#include "kvcomp/codes.cuh"
#include "kvcomp/decode_split.cuh"
#include "kvcomp/matrix.cuh"
#include "kvcomp/tile_warp.cuh"

namespace kvcomp {

struct Codes {};  // the type of such rows, q in 16 bits

template <>
inline constexpr bool kMayDiffer<Codes> = false;

template <int D, int kFragments>
struct CodeTile : DecodeShape<D, D, kFragments> {
  using Shape = DecodeShape<D, D, kFragments>;
  using Shape::kColumns, Shape::kTokens, Shape::kWarps;
  static constexpr int kSteps = Shape::kKeySteps;
  // The 8 rows of a matrix lie in different banks.
  static constexpr int kKeyPitch = D % 32 ? D : D + 16, kValuePitch = kKeyPitch;

  struct Stage {
    alignas(16) int8_t k[kTokens * kKeyPitch];
    alignas(16) int8_t v[kTokens * kValuePitch];
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
struct TileOf<Codes, D, D, kFragments> {
  using Type = CodeTile<D, kFragments>;
};

// A block's q in shared memory, and of that a lane's B fragments: element 4 * (lane % 4) + i of
// every 16 is row 2 * (lane % 4) + i % 2 of the upper (i < 2) or lower half.
template <int D, int kFragments>
class CodeQueries {
  using Tile = CodeTile<D, kFragments>;
  static constexpr int kSteps = Tile::kKeySteps, kHeld = Tile::kHoldQueries ? kSteps : 1;

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
class DecodeWarp<Codes, D, D, kFragments, Columns>
    : public TileWarp<DecodeWarp<Codes, D, D, kFragments, Columns>, int8_t, CodeTile<D, kFragments>,
                      kFragments, Columns> {
  using Tile = CodeTile<D, kFragments>;
  using Stage = typename Tile::Stage;
  using Queries = CodeQueries<D, kFragments>;
  using Base = TileWarp<DecodeWarp, int8_t, Tile, kFragments, Columns>;
  friend Base;
  using Base::lane_, Base::out_;
  static constexpr int kSteps = Tile::kKeySteps;
  static constexpr float kHeadroom = 32768;  // below the largest fp16

 public:
  __device__ static void share(const DecodeAttentionParams& p, const Columns& columns,
                               uint16_t* queries) {
    Queries::share(p, columns, queries);
  }

  __device__ DecodeWarp(const DecodeAttentionParams& p, const DecodeSplit& split,
                        const Columns& columns, int sequence, int kv_head, Stage* stages,
                        const uint16_t* queries)
      : Base(p, split, columns, sequence, kv_head, stages),
        words_(p.words + sequence * p.stride_words_b + kv_head * p.stride_words_h),
        q_(queries) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        factor_[f][i] = Queries::step(queries, f * 8 + lane_ % 4 * 2 + i) * p.scale;
      }
    }
  }

 private:
  // Zeros, as the rows, for a token that is not attended.
  __device__ void copy_words(Stage& stage, int slot) const {
    copy_word_async(stage.words + lane_, words_ + max(slot, 0), slot >= 0);
  }
  __device__ int element(int step, int half) const { return step * 16 + lane_ / 4 * 2 + half; }
  __device__ float unit() const { return unit_ / kHeadroom; }

  // Of two steps of 16 columns, or of the last one by itself: the row that the lane names.
  __device__ int named(int step) const {
    return lane_ % 16 * Tile::kKeyPitch + step * 16 + (step + 1 < kSteps ? lane_ / 16 * 16 : 0);
  }

  __device__ void multiply_keys(const Stage& stage, float (&s)[kFragments][4]) {
    scales_[0] = scales_of(stage.words[lane_ / 4]);
    scales_[1] = scales_of(stage.words[lane_ / 4 + 8]);
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
      for (int i = 0; i < 4; ++i) {
        s[f][i] = (s[f][i] + odd[f][i]) * factor_[f][i % 2] * scales_[i / 2].x;
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

  __device__ void accumulate_values(const Stage& stage, const float (&s)[kFragments][4],
                                    float (&decay)[kFragments][2]) {
    const float grown = grow(fmaxf(scales_[0].y, scales_[1].y));
    const float to_unit = kHeadroom / unit_;
    const float weights[2] = {scales_[0].y * to_unit, scales_[1].y * to_unit};
    unsigned probs[kFragments][2];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        decay[f][i] *= grown;
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

  const uint32_t* words_;
  const Queries q_;
  float2 scales_[2];       // of the lane's tokens of this tile
  float unit_ = 0x1p-24f;  // at least every scale of V so far, a power of two
  float factor_[kFragments][2];
};

}  // namespace kvcomp
