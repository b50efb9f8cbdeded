// A warp of decode_attention and append_attention with q in fp32, over rows in fp32 or codes, on
// the CUDA cores: for tests and small jobs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kvcomp/codes.cuh"
#include "kvcomp/decode_split.cuh"

namespace kvcomp {

struct CodesInFull {};  // the type of codes whose q is in fp32

template <>
inline constexpr bool kMayDiffer<CodesInFull> = false;

template <typename T>
inline constexpr bool kQueriesInFull = std::is_same_v<T, float> || std::is_same_v<T, CodesInFull>;

// What a lane has of rows of D elements: every 32nd.
template <int D>
inline constexpr int kLaneParts = (D + 31) / 32;

template <typename T, int D>
__device__ void load_parts(const T* row, float (&to)[kLaneParts<D>]) {
#pragma unroll
  for (int i = 0; i < kLaneParts<D>; ++i) {
    const int at = i * 32 + static_cast<int>(threadIdx.x % 32);
    to[i] = at < D ? static_cast<float>(row[at]) : 0.0f;
  }
}

// Rows of K and V of a sequence and head, and its queries as these rows want them.
template <typename T, int D, int Dv>
class LaneRows {
 public:
  template <typename Columns>
  __device__ LaneRows(const DecodeAttentionParams& p, const Columns&, int sequence, int kv_head)
      : p_(p),
        k_(static_cast<const T*>(p.k) + sequence * p.stride_k_b + kv_head * p.stride_k_h),
        v_(static_cast<const T*>(p.v) + sequence * p.stride_v_b + kv_head * p.stride_v_h) {}

  __device__ void load_key(int64_t slot, float (&k)[kLaneParts<D>]) const {
    load_parts<T, D>(k_ + slot * p_.stride_k_t, k);
  }
  __device__ void load_value(int64_t slot, float (&v)[kLaneParts<Dv>]) const {
    load_parts<T, Dv>(v_ + slot * p_.stride_v_t, v);
  }
  // What makes of an element of a query what these rows meet.
  __device__ auto rounding(int) const {
    return [](float element) { return element; };
  }

 private:
  const DecodeAttentionParams& p_;
  const T *k_, *v_;
};

// A code times its scale is exact in fp32.
template <int D>
class LaneRows<CodesInFull, D, D> {
  static constexpr int kColumns = DecodeTile<D, D, 1>::kColumns;

 public:
  template <typename Columns>
  __device__ LaneRows(const DecodeAttentionParams& p, const Columns& columns, int sequence,
                      int kv_head)
      : codes_(p, columns, sequence, kv_head),
        words_(p.words + sequence * p.stride_words_b + kv_head * p.stride_words_h) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (column >= columns.count()) continue;
      float q[kLaneParts<D>];
      load_parts<float, D>(static_cast<const float*>(p.q) + columns.q(column), q);
      uint32_t top = 0;
#pragma unroll
      for (int i = 0; i < kLaneParts<D>; ++i) top = max(top, magnitude(q[i]));
      top = __reduce_max_sync(kFullMask, top);
      if (static_cast<int>(threadIdx.x % 32) == column) top_ = top;
    }
  }

  __device__ void load_key(int64_t slot, float (&k)[kLaneParts<D>]) const {
    codes_.load_key(slot, k);
    multiply(k, scales_of(words_[slot]).x);
  }
  __device__ void load_value(int64_t slot, float (&v)[kLaneParts<D>]) const {
    codes_.load_value(slot, v);
    multiply(v, scales_of(words_[slot]).y);
  }
  __device__ auto rounding(int column) const {
    const QueryStep step(__shfl_sync(kFullMask, top_, column));
    return [step](float element) { return step.integer(element) * step.step(); };
  }

 private:
  __device__ static void multiply(float (&row)[kLaneParts<D>], float scale) {
#pragma unroll
    for (int i = 0; i < kLaneParts<D>; ++i) row[i] *= scale;
  }

  const LaneRows<int8_t, D, D> codes_;
  const uint32_t* words_;
  uint32_t top_ = 0;  // of the lane's query: the largest magnitude, as bits
};

// A warp takes one token at a time, a lane every 32nd element of its row.
template <typename T, int D, int Dv, typename Columns>
class LaneWarp {
  using Tile = DecodeTile<D, Dv, 1>;
  static constexpr int kParts = kLaneParts<D>, kValueParts = kLaneParts<Dv>;
  static constexpr bool kHoldsQueries = kParts <= 8;  // in registers, else read for every token

 public:
  __device__ static void share(const DecodeAttentionParams&, const Columns&, uint16_t*) {}

  __device__ LaneWarp(const DecodeAttentionParams& p, const DecodeSplit& split,
                      const Columns& columns, int sequence, int kv_head, typename Tile::Stage*,
                      const uint16_t*)
      : p_(p), split_(split), columns_(columns), rows_(p, columns, sequence, kv_head), logits_(p) {
#pragma unroll
    for (int column = 0; column < Tile::kColumns; ++column) {
      max_[column] = -INFINITY;
      if (column >= columns.count()) continue;
      if constexpr (kHoldsQueries) {
        load_parts<float, D>(query(column), q_[column]);
        const auto rounded = rows_.rounding(column);
#pragma unroll
        for (int i = 0; i < kParts; ++i) q_[column][i] = rounded(q_[column][i]);
      }
    }
  }

  __device__ void run() {
    for (int at = split_.first + threadIdx.x / 32; at < split_.end; at += Tile::kWarps) {
      const int slot = split_.slot(at);
      float s[Tile::kColumns];
      multiply_key(at, slot, s);
      float v[kValueParts] = {};
      if (slot >= 0) rows_.load_value(slot, v);
#pragma unroll
      for (int column = 0; column < Tile::kColumns; ++column) {
        if (column >= columns_.count()) break;
        const float top = fmaxf(max_[column], s[column]);
        const float base = top == -INFINITY ? 0.0f : top;
        const float decay = exp2f((max_[column] - base) * kLog2e);
        const float prob = exp2f((s[column] - base) * kLog2e);
        max_[column] = top;
        sum_[column] = sum_[column] * decay + prob;
        for (int i = 0; i < kValueParts; ++i) {
          out_[column][i] = out_[column][i] * decay + prob * v[i];
        }
      }
    }
  }

  __device__ void leave(typename Tile::States& states) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int column = 0; column < Tile::kColumns; ++column) {
      if (lane == 0)
        states.max[warp][column] = max_[column], states.sum[warp][column] = sum_[column];
      for (int i = 0; i < kValueParts; ++i) {
        if (i * 32 + lane < Dv) states.out[warp][column][i * 32 + lane] = out_[column][i];
      }
    }
  }

 private:
  // The logits of a token.
  __device__ void multiply_key(int at, int slot, float (&logits)[Tile::kColumns]) const {
    float k[kParts] = {};
    if (slot >= 0) rows_.load_key(slot, k);
#pragma unroll
    for (int column = 0; column < Tile::kColumns; ++column) {
      if (column >= columns_.count()) break;
      float s = 0;
      if constexpr (kHoldsQueries) {
        for (int i = 0; i < kParts; ++i) s += q_[column][i] * k[i];
      } else {
        const float* q = query(column);
        const auto rounded = rows_.rounding(column);
        for (int i = 0; i < kParts; ++i) s += rounded(q[i * 32 + threadIdx.x % 32]) * k[i];
      }
      s = group_sum(s, 32) * p_.scale;
      if (p_.softcap > 0) s = cap_logit(s, p_.softcap);
      s = slot == kSkipped ? -INFINITY : slot == kWild ? NAN : s;
      if (!columns_.see_all(at + 1) && !columns_.sees(column, at)) s = -INFINITY;
      if (logits_ && threadIdx.x % 32 == 0) logits_.store(columns_.logits(column), at, s);
      logits[column] = s;
    }
  }

  __device__ const float* query(int column) const {
    return static_cast<const float*>(p_.q) + columns_.q(column);
  }

  const DecodeAttentionParams& p_;
  const DecodeSplit& split_;
  const Columns& columns_;
  const LaneRows<T, D, Dv> rows_;
  const LogitsOut logits_;
  float q_[Tile::kColumns][kHoldsQueries ? kParts : 1] = {};
  float max_[Tile::kColumns], sum_[Tile::kColumns] = {}, out_[Tile::kColumns][kValueParts] = {};
};

template <int D, int Dv, typename Columns>
class DecodeWarp<float, D, Dv, 1, Columns> : public LaneWarp<float, D, Dv, Columns> {
  using LaneWarp<float, D, Dv, Columns>::LaneWarp;
};
template <int D, typename Columns>
class DecodeWarp<CodesInFull, D, D, 1, Columns> : public LaneWarp<CodesInFull, D, D, Columns> {
  using LaneWarp<CodesInFull, D, D, Columns>::LaneWarp;
};

}  // namespace kvcomp
