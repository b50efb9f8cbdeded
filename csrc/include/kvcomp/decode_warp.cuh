// A warp of decode_attention and append_attention in 16-bit types, on the tensor cores.
//
// K and V are the tall operands, tokens in rows, S [16 tokens, 8 columns] = K qT and OT [Dv, 8
// columns] += VT P, for each of the block's fragments of 8 columns. What becomes of a column does
// not depend on how many there are.
#pragma once

#include <cstdint>

#include "kvcomp/decode_split.cuh"
#include "kvcomp/matrix.cuh"
#include "kvcomp/tile_warp.cuh"

namespace kvcomp {

// A block's q as B fragments. A lane of a fragment holds rows of B that are neighbours in its
// column of q: B's fragment is that of its transpose, q as it is.
template <typename T, typename Tile, int kFragments, bool kShared = Tile::kShareQueries>
class Queries {  // in registers
  static constexpr int kSteps = Tile::kKeySteps;

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
          q_[f][step][i] =
              used ? bits_of(from[0]) | static_cast<unsigned>(bits_of(from[1])) << 16 : 0;
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

template <typename T, typename Tile, int kFragments>
class Queries<T, Tile, kFragments, true> {  // in shared memory
  static_assert(kFragments % 2 == 0 || kFragments == 1);

 public:
  template <typename Columns>
  __device__ Queries(const DecodeAttentionParams&, const Columns&, const uint16_t* queries)
      : row_(kFragments == 1
                 ? queries + threadIdx.x % 32 / 4 * Tile::kKeyPitch + threadIdx.x % 4 * 2
                 : queries + (threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8) * Tile::kKeyPitch +
                       threadIdx.x / 8 % 2 * 8) {}

  template <typename Columns>
  __device__ static void share(const DecodeAttentionParams& p, const Columns& columns,
                               uint16_t* queries) {
    constexpr int D = Tile::kKeyDim;
    for (int i = threadIdx.x; i < Tile::kColumns * D; i += Tile::kThreads) {
      const int column = i / D, element = i % D;
      const bool used = column < columns.count();
      const T* q = static_cast<const T*>(p.q) + (used ? columns.q(column) : 0);
      queries[column * Tile::kKeyPitch + element] = used ? bits_of(q[element]) : uint16_t{0};
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
        load_matrices(two, row_ + f * 8 * Tile::kKeyPitch + step * 16);
        q[f][0] = two[0], q[f][1] = two[1], q[f + 1][0] = two[2], q[f + 1][1] = two[3];
      }
    }
  }

 private:
  // Of one fragment the lane's own elements, else the row that it names of two fragments' matrices
  const uint16_t* row_;
};

template <typename T, int D, int Dv, int kFragments, typename Columns>
class DecodeWarp : public TileWarp<DecodeWarp<T, D, Dv, kFragments, Columns>, T,
                                   DecodeTile<D, Dv, kFragments>, kFragments, Columns> {
  using Tile = DecodeTile<D, Dv, kFragments>;
  using Stage = typename Tile::Stage;
  using Base = TileWarp<DecodeWarp, T, Tile, kFragments, Columns>;
  friend Base;
  using Base::lane_, Base::out_, Base::p_;

 public:
  // By the whole block, before its warps are made.
  __device__ static void share(const DecodeAttentionParams& p, const Columns& columns,
                               uint16_t* queries) {
    if constexpr (Tile::kShareQueries) Queries<T, Tile, kFragments>::share(p, columns, queries);
  }

  // `queries` is read with kShareQueries.
  __device__ DecodeWarp(const DecodeAttentionParams& p, const DecodeSplit& split,
                        const Columns& columns, int sequence, int kv_head, Stage* stages,
                        const uint16_t* queries)
      : Base(p, split, columns, sequence, kv_head, stages), q_(p, columns, queries) {}

 private:
  __device__ void copy_words(Stage&, int) const {}
  __device__ int element(int step, int half) const { return step * 16 + half * 8 + lane_ / 4; }
  __device__ static constexpr float unit() { return 1; }

  __device__ void multiply_keys(const Stage& stage, float (&s)[kFragments][4]) const {
    constexpr int kSteps = Tile::kKeySteps;
    const uint16_t* row = stage.k + lane_ % 16 * Tile::kKeyPitch + lane_ / 16 * 8;
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
      for (int i = 0; i < 4; ++i) s[f][i] = (s[f][i] + odd[f][i]) * p_.scale;
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
    const uint16_t* row =
        stage.v + (lane_ % 8 + lane_ / 16 * 8) * Tile::kValuePitch + lane_ / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < Tile::kValueSteps; ++step) {
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

  const Queries<T, Tile, kFragments> q_;
};

}  // namespace kvcomp
