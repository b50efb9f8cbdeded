// append_attention: the newest m tokens of each sequence over its cache, K and V read once.
//
// decode_attention with more columns: the m queries times the G query heads of a KV head are rows
// of q, up to 8, 16 or 32 of them in the 1, 2 or 4 fragments of a block, which multiply each
// fragment of K and V as it is loaded; of more rows, blocks that run side by side find K and V in
// L2. Only tiles that reach the new tokens look at a mask. The splits are those of one query, so
// that a column has the bits that decode_attention gives it.
//
// Bytes: T * (D + Dv) elements per KV head; 4 * Dv * m * Hq per split, written and read, for the
// merge; with logits 4 * T * m * Hq, or 2 in 16 bits.
#pragma once

#include <cstdint>

#include "kvcomp/decode_attention.cuh"

namespace kvcomp {

// The columns of a block: rows of q from `first` on, the heads of a query side by side.
class AppendColumns {
 public:
  __device__ AppendColumns(const AppendAttentionParams& params, int sequence, int kv_head,
                           int first, int most)
      : p_(params),
        sequence_(sequence),
        group_(params.attention.num_heads / params.attention.num_kv_heads),
        first_head_(kv_head * group_),
        first_(first),
        stored_(min(most, params.num_queries * group_ - first)) {
    const int asked = params.q_lens ? params.q_lens[sequence] : params.num_queries;
    const int queries = min(max(asked, 0), params.num_queries);
    const int length = params.attention.seq_lens[sequence];
    wrong_ = asked != queries || queries > length;
    count_ = max(min(stored_, queries * group_ - first), 0);
    first_new_ = length - queries;
  }

  __device__ int count() const { return count_; }
  __device__ int stored() const { return stored_; }
  __device__ bool wrong() const { return wrong_; }

  __device__ int64_t q(int column) const {
    const DecodeAttentionParams& p = p_.attention;
    return sequence_ * p.stride_q_b + query(column) * p_.stride_q_m + head(column) * p.stride_q_h;
  }
  __device__ int64_t logits(int column) const {
    const DecodeAttentionParams& p = p_.attention;
    return sequence_ * p.stride_logits_b + query(column) * p_.stride_logits_m +
           head(column) * p.stride_logits_h;
  }
  __device__ int64_t out(int column) const {
    return (sequence_ * p_.num_queries + query(column)) * p_.attention.num_heads + head(column);
  }

  __device__ bool see_all(int end) const { return end <= first_new_; }
  __device__ bool sees(int column, int position) const {
    if (position < first_new_ || column >= count_) return true;
    const int token = (position - first_new_) % 64;  // past the end: not attended anyway
    const int64_t at = query(column);
    if (!p_.tail) return token <= at;
    return p_.tail[sequence_ * p_.stride_tail_b + at] >> token & 1;
  }

 private:
  __device__ int64_t query(int column) const { return (first_ + column) / group_; }
  __device__ int64_t head(int column) const { return first_head_ + (first_ + column) % group_; }

  const AppendAttentionParams& p_;
  const int64_t sequence_;
  const int group_, first_head_, first_, stored_;
  int count_, first_new_;
  bool wrong_;
};

template <typename T, int D, int Dv, int kFragments>
__global__ void __launch_bounds__(TileOf<T, D, Dv, kFragments>::Type::kThreads,
                                  TileOf<T, D, Dv, kFragments>::Type::kBlocks)
    append_attention_kernel(const __grid_constant__ AppendAttentionParams p) {
  constexpr int kColumns = TileOf<T, D, Dv, kFragments>::Type::kColumns;
  const int rows = p.num_queries * (p.attention.num_heads / p.attention.num_kv_heads);
  const int tiles = (rows + kColumns - 1) / kColumns;
  const int sequence = blockIdx.y, kv_head = blockIdx.x / tiles;
  const AppendColumns columns(p, sequence, kv_head, blockIdx.x % tiles * kColumns, kColumns);
  attend_split<T, D, Dv, kFragments>(p.attention, columns, sequence, kv_head, blockIdx.z);
}

template <typename T, int D, int Dv, int kFragments, typename Launch>
void launch_append_attention(const AppendAttentionParams& p, int rows, const Launch& launch) {
  using Tile = typename TileOf<T, D, Dv, kFragments>::Type;
  const int tiles = (rows + Tile::kColumns - 1) / Tile::kColumns;
  const DecodeAttentionParams& attention = p.attention;
  launch(append_attention_kernel<T, D, Dv, kFragments>,
         dim3(attention.num_kv_heads * tiles, attention.batch, attention.num_splits),
         dim3(Tile::kThreads), Tile::kShared, p);
}

// As many fragments as the rows of a KV head fill. One in fp32, for tests and small jobs, and with
// heads of 256, of which a thread has registers for no more.
template <typename T, typename Launch>
void launch_append_attention(T, const AppendAttentionParams& p, const Launch& launch) {
  const DecodeAttentionParams& attention = p.attention;
  const int rows = p.num_queries * (attention.num_heads / attention.num_kv_heads);
  with_head_sizes<kMayDiffer<T>>(
      attention.head_dim, attention.value_dim, [&](auto key, auto value) {
        constexpr int D = key(), Dv = value();
        if constexpr (kQueriesInFull<T> || D > 128) {
          launch_append_attention<T, D, Dv, 1>(p, rows, launch);
        } else if (rows <= 8) {
          launch_append_attention<T, D, Dv, 1>(p, rows, launch);
        } else if (rows <= 16) {
          launch_append_attention<T, D, Dv, 2>(p, rows, launch);
        } else {
          launch_append_attention<T, D, Dv, 4>(p, rows, launch);
        }
        launch_merge_splits<Dv>(attention, attention.batch * p.num_queries * attention.num_heads,
                                launch);
      });
}

}  // namespace kvcomp
