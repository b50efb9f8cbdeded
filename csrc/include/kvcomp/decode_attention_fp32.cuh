// A warp of decode_attention and append_attention in fp32, on the CUDA cores: for tests and small
// jobs.
#pragma once

#include <cstdint>

#include "kvcomp/decode_split.cuh"

namespace kvcomp {

// A warp takes one token at a time, a lane every 32nd element of its row.
template <int D, typename Columns>
class DecodeWarp<float, D, 1, Columns> {
  using Tile = DecodeTile<D>;
  static constexpr int kParts = (D + 31) / 32;
  static constexpr bool kHoldsQueries = kParts <= 8;  // in registers, else read for every token

 public:
  __device__ DecodeWarp(const DecodeAttentionParams& p, const DecodeSplit& split,
                        const Columns& columns, int sequence, int kv_head, typename Tile::Stage*,
                        const uint16_t*)
      : p_(p),
        split_(split),
        columns_(columns),
        k_(static_cast<const float*>(p.k) + sequence * p.stride_k_b + kv_head * p.stride_k_h),
        v_(static_cast<const float*>(p.v) + sequence * p.stride_v_b + kv_head * p.stride_v_h),
        logits_(p) {
#pragma unroll
    for (int column = 0; column < Tile::kColumns; ++column) {
      max_[column] = -INFINITY;
      if (column >= columns.count()) continue;
      if constexpr (kHoldsQueries) load(query(column), q_[column]);
    }
  }

  __device__ void run() {
    for (int at = split_.first + threadIdx.x / 32; at < split_.end; at += Tile::kWarps) {
      const int slot = split_.slot(at);
      float k[kParts] = {}, v[kParts] = {};
      if (slot >= 0) load(k_ + slot * p_.stride_k_t, k), load(v_ + slot * p_.stride_v_t, v);
#pragma unroll
      for (int column = 0; column < Tile::kColumns; ++column) {
        if (column >= columns_.count()) break;
        float s = 0;
        if constexpr (kHoldsQueries) {
          for (int i = 0; i < kParts; ++i) s += q_[column][i] * k[i];
        } else {
          const float* q = query(column);
          for (int i = 0; i < kParts; ++i) s += q[i * 32 + threadIdx.x % 32] * k[i];
        }
        s = group_sum(s, 32) * p_.scale;
        s = slot == kSkipped ? -INFINITY : slot == kWild ? NAN : s;
        if (!columns_.see_all(at + 1) && !columns_.sees(column, at)) s = -INFINITY;
        if (logits_ && threadIdx.x % 32 == 0) logits_.store(columns_.logits(column), at, s);
        const float top = fmaxf(max_[column], s);
        const float base = top == -INFINITY ? 0.0f : top;
        const float decay = exp2f((max_[column] - base) * kLog2e);
        const float prob = exp2f((s - base) * kLog2e);
        max_[column] = top;
        sum_[column] = sum_[column] * decay + prob;
        for (int i = 0; i < kParts; ++i) out_[column][i] = out_[column][i] * decay + prob * v[i];
      }
    }
  }

  __device__ void leave(typename Tile::States& states) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int column = 0; column < Tile::kColumns; ++column) {
      if (lane == 0)
        states.max[warp][column] = max_[column], states.sum[warp][column] = sum_[column];
      for (int i = 0; i < kParts; ++i) {
        if (i * 32 + lane < D) states.out[warp][column][i * 32 + lane] = out_[column][i];
      }
    }
  }

 private:
  __device__ const float* query(int column) const {
    return static_cast<const float*>(p_.q) + columns_.q(column);
  }

  __device__ static void load(const float* row, float (&to)[kParts]) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int at = i * 32 + static_cast<int>(threadIdx.x % 32);
      to[i] = at < D ? row[at] : 0.0f;
    }
  }

  const DecodeAttentionParams& p_;
  const DecodeSplit& split_;
  const Columns& columns_;
  const float *k_, *v_;
  const LogitsOut logits_;
  float q_[Tile::kColumns][kHoldsQueries ? kParts : 1] = {};
  float max_[Tile::kColumns], sum_[Tile::kColumns] = {}, out_[Tile::kColumns][kParts] = {};
};

}  // namespace kvcomp
