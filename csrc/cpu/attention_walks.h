// How the CPU attention divides its work: walks over a KV head's tokens, spans of them, and parts
// of the whole that threads take one after another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_tile.h"

namespace kvcomp::cpu {

constexpr int kMostRows = 64;  // of a KV head in a walk: their states stay in L2

// The rows [first_row, first_row + rows) of each KV head [head, head + heads_together).
struct Walk {
  int batch, head, first_row, rows;
};

// A token of a walk, the first of a tile.
struct Place {
  int batch, walk, token;
};

class Walks {
 public:
  explicit Walks(const AppendAttentionParams& params)
      : m_(params),
        p_(params.attention),
        layout_(p_),
        group_(p_.num_heads / p_.num_kv_heads),
        state_rows_(layout_.heads_together * std::min(group_ * m_.num_queries, kMostRows)) {
    static thread_local std::vector<std::int64_t> first_span;
    first_span.assign(1, 0);
    for (int b = 0; b < p_.batch; ++b) {
      first_span.push_back(first_span.back() + std::int64_t{num_walks(b)} * num_spans(b));
      work_ += std::int64_t{p_.seq_lens[b]} * queries(b) * p_.num_heads * p_.head_dim;
      tokens_ += p_.seq_lens[b];
    }
    first_span_ = first_span.data();
  }

  const Layout& layout() const { return layout_; }
  int group() const { return group_; }            // G
  int state_rows() const { return state_rows_; }  // of the largest walk
  std::int64_t work() const { return work_; }     // multiply-adds of qk
  std::int64_t kv_bytes() const {
    return tokens_ * p_.num_kv_heads * (p_.head_dim + p_.value_dim) * size_of(p_.kv_dtype);
  }
  std::int64_t total() const { return first_span_[p_.batch]; }  // spans

  // Of a sequence.
  int queries(int batch) const { return m_.q_lens ? m_.q_lens[batch] : m_.num_queries; }
  int num_spans(int batch) const {
    return (p_.seq_lens[batch] + layout_.span_size - 1) / layout_.span_size;
  }

  Walk walk_at(const Place& place) const {
    const int blocks = num_blocks(place.batch), block = place.walk % blocks;
    const int rows = queries(place.batch) * group_;
    const int first = rows * block / blocks;
    return {place.batch, place.walk / blocks * layout_.heads_together, first,
            rows * (block + 1) / blocks - first};
  }

  std::int64_t part_begin(int part, int parts) const { return total() * part / parts; }

  Place place_at(std::int64_t span) const {
    const std::int64_t* after = std::upper_bound(first_span_, first_span_ + p_.batch + 1, span);
    const int batch = static_cast<int>(after - first_span_) - 1;
    const std::int64_t rest = span - first_span_[batch];
    const int spans = num_spans(batch);
    return {batch, static_cast<int>(rest / spans),
            static_cast<int>(rest % spans) * layout_.span_size};
  }

  // Where the tile at a place ends.
  int tile_end(const Place& place) const {
    return std::min(place.token + layout_.tile_size, p_.seq_lens[place.batch]);
  }

  void advance(Place& place) const {
    place.token += layout_.tile_size;
    if (place.token < p_.seq_lens[place.batch]) return;
    place.token = 0;
    if (++place.walk < num_walks(place.batch)) return;
    place.walk = 0;
    do {
      ++place.batch;
    } while (place.batch < p_.batch && first_span_[place.batch] == first_span_[place.batch + 1]);
  }

 private:
  int num_blocks(int batch) const { return (queries(batch) * group_ + kMostRows - 1) / kMostRows; }
  int num_walks(int batch) const {
    return p_.num_kv_heads / layout_.heads_together * num_blocks(batch);
  }

  const AppendAttentionParams& m_;
  const DecodeAttentionParams& p_;
  const Layout layout_;
  const int group_, state_rows_;
  std::int64_t work_ = 0, tokens_ = 0;
  const std::int64_t* first_span_;  // [B + 1] spans of all walks before a sequence
};

}  // namespace kvcomp::cpu
