// latent_attention in fp32, on the CUDA cores: for tests and small jobs.
#pragma once

#include <cstdint>

#include "kvcomp/decode_split.cuh"

namespace kvcomp {

inline constexpr int kLatentWarps = 4;

// A warp has a head and takes one token at a time, a lane every 32nd column of its row.
template <int kParts>
__global__ void __launch_bounds__(kLatentWarps * 32)
    latent_attention_fp32_kernel(const __grid_constant__ DecodeAttentionParams p) {
  const int64_t sequence = blockIdx.y;
  const int head = blockIdx.x * kLatentWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (head >= p.num_heads) return;
  const auto load = [&](const float* row, float (&to)[kParts]) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      to[i] = i * 32 + lane < p.head_dim ? row[i * 32 + lane] : 0.0f;
    }
  };
  const DecodeSplit split(p, sequence, 0, blockIdx.z);
  const LogitsOut logits(p);
  const float* rows = static_cast<const float*>(p.k) + sequence * p.stride_k_b;
  float q[kParts], out[kParts] = {}, max = -INFINITY, sum = 0;
  load(static_cast<const float*>(p.q) + sequence * p.stride_q_b + head * p.stride_q_h, q);
  for (int at = split.first; at < split.end; ++at) {
    const int slot = split.slot(at);
    float row[kParts] = {}, s = 0;
    if (slot >= 0) load(rows + slot * p.stride_k_t, row);
#pragma unroll
    for (int i = 0; i < kParts; ++i) s += q[i] * row[i];
    s = group_sum(s, 32) * p.scale;
    s = slot == kSkipped ? -INFINITY : slot == kWild ? NAN : s;
    if (logits && lane == 0) {
      logits.store(sequence * p.stride_logits_b + head * p.stride_logits_h, at, s);
    }
    const float top = fmaxf(max, s), base = top == -INFINITY ? 0.0f : top;
    const float decay = exp2f((max - base) * kLog2e), prob = exp2f((s - base) * kLog2e);
    max = top;
    sum = sum * decay + prob;
#pragma unroll
    for (int i = 0; i < kParts; ++i) out[i] = out[i] * decay + prob * row[i];
  }
  if (split.wrong) sum = NAN;
  const int64_t place = (sequence * p.num_heads + head) * p.num_splits + blockIdx.z;
  float* const outs = p.num_splits == 1 ? static_cast<float*>(p.out) : p.partial_out;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int column = i * 32 + lane;
    if (column < p.value_dim) {
      outs[place * p.value_dim + column] = sum == 0 ? 0.0f : out[i] / sum;
    }
  }
  if (lane == 0) {
    (p.num_splits == 1 ? p.lse : p.partial_lse)[place] = sum == 0 ? -INFINITY : max + logf(sum);
  }
}

template <typename Launch>
void launch_latent_fp32(const DecodeAttentionParams& p, const Launch& launch) {
  const dim3 grid((p.num_heads + kLatentWarps - 1) / kLatentWarps, p.batch, p.num_splits);
  const auto kernel =
      p.head_dim <= 576 ? latent_attention_fp32_kernel<18> : latent_attention_fp32_kernel<32>;
  launch(kernel, grid, dim3(kLatentWarps * 32), 0, p);
}

}  // namespace kvcomp
