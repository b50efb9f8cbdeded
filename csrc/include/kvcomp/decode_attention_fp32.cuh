// A warp of decode_attention in fp32, on the CUDA cores: for tests and small jobs.
#pragma once

#include <cstdint>

#include "kvcomp/decode_split.cuh"

namespace kvcomp {

// A warp takes one token at a time, a lane every 32nd element of its row.
template <int D>
class DecodeWarp<float, D> {
  using Tile = DecodeTile<D>;
  static constexpr int kParts = (D + 31) / 32;

 public:
  __device__ DecodeWarp(const DecodeAttentionParams& p, const DecodeSplit& split, int sequence,
                        int kv_head, int first_head, typename Tile::Stage*)
      : p_(p),
        split_(split),
        k_(static_cast<const float*>(p.k) + sequence * p.stride_k_b + kv_head * p.stride_k_h),
        v_(static_cast<const float*>(p.v) + sequence * p.stride_v_b + kv_head * p.stride_v_h),
        logits_(p, sequence) {
    const int group = p.num_heads / p.num_kv_heads;
    num_heads_ = min(Tile::kHeads, group - first_head);
    head_ = kv_head * group + first_head;
    const float* q = static_cast<const float*>(p.q) + sequence * p.stride_q_b;
#pragma unroll
    for (int head = 0; head < Tile::kHeads; ++head) {
      max_[head] = -INFINITY;
      if (head < num_heads_) load(q + (head_ + head) * p.stride_q_h, q_[head]);
    }
  }

  __device__ void run() {
    for (int at = split_.first + threadIdx.x / 32; at < split_.end; at += Tile::kWarps) {
      const int slot = split_.slot(at);
      float k[kParts] = {}, v[kParts] = {};
      if (slot >= 0) load(k_ + slot * p_.stride_k_t, k), load(v_ + slot * p_.stride_v_t, v);
#pragma unroll
      for (int head = 0; head < Tile::kHeads; ++head) {
        if (head >= num_heads_) break;
        float s = 0;
        for (int i = 0; i < kParts; ++i) s += q_[head][i] * k[i];
        s = group_sum(s, 32) * p_.scale;
        s = slot == kSkipped ? -INFINITY : slot == kWild ? NAN : s;
        if (logits_ && threadIdx.x % 32 == 0) logits_.store(head_ + head, at, s);
        const float top = fmaxf(max_[head], s);
        const float base = top == -INFINITY ? 0.0f : top;
        const float decay = exp2f((max_[head] - base) * kLog2e);
        const float prob = exp2f((s - base) * kLog2e);
        max_[head] = top;
        sum_[head] = sum_[head] * decay + prob;
        for (int i = 0; i < kParts; ++i) out_[head][i] = out_[head][i] * decay + prob * v[i];
      }
    }
  }

  __device__ void leave(typename Tile::States& states) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int head = 0; head < Tile::kHeads; ++head) {
      if (lane == 0) states.max[warp][head] = max_[head], states.sum[warp][head] = sum_[head];
      for (int i = 0; i < kParts; ++i) {
        if (i * 32 + lane < D) states.out[warp][head][i * 32 + lane] = out_[head][i];
      }
    }
  }

 private:
  __device__ static void load(const float* row, float (&to)[kParts]) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int at = i * 32 + static_cast<int>(threadIdx.x % 32);
      to[i] = at < D ? row[at] : 0.0f;
    }
  }

  const DecodeAttentionParams& p_;
  const DecodeSplit& split_;
  const float *k_, *v_;
  const LogitsOut logits_;
  int num_heads_, head_;
  float q_[Tile::kHeads][kParts] = {};
  float max_[Tile::kHeads], sum_[Tile::kHeads] = {}, out_[Tile::kHeads][kParts] = {};
};

}  // namespace kvcomp
