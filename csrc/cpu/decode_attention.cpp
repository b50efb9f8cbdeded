// Attention of one query per sequence, K and V read once.
//
// A sequence is cut into tiles of at most 64 tokens, and the tiles of the batch, in the order of
// sequence, KV head and token, into four ranges per thread, so that ragged lengths balance. A
// thread walks its range with an online softmax: qk and pv of a tile while the rows it needs next
// are fetched, across the borders of sequences too. What the border of a range cuts is merged at
// the end. The cuts depend on the number of threads alone: the result is the same from run to run.
// Bytes: 2 * seq_len * Hkv * D elements per sequence, and 4 * Hq * seq_len with logits.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

using simd::kTile;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Where the memory holds the heads of one token together, they are walked together as well.
int heads_per_walk(const DecodeAttentionParams& p) {
  return p.stride_k_h < p.stride_k_t && p.num_kv_heads > 1 ? p.num_kv_heads : 1;
}

// Whether a head's rows lie about in pieces under 2 KiB.
bool is_scattered(const DecodeAttentionParams& p) {
  const bool adjacent = p.stride_k_t == p.head_dim;
  return !adjacent ||
         (p.page_ids && std::int64_t{p.page_size} * p.head_dim * size_of(p.dtype) < 2048);
}

struct Tile {
  int batch;
  int walk;   // heads [walk, walk + 1) * heads_per_walk
  int index;  // tokens [index, index + 1) * tile_size
};

// A tile's rows of one KV head.
struct TileRows {
  int count;  // tokens attended; holes are left out
  int position[kTile];
  const void *k[kTile], *v[kTile];

  void gather(const DecodeAttentionParams& p, const Tile& tile, int head, int tile_size) {
    const int first = tile.index * tile_size;
    const int end = std::min(first + tile_size, p.seq_lens[tile.batch]);
    const int size = size_of(p.dtype);
    const char* k_base =
        static_cast<const char*>(p.k) + (tile.batch * p.stride_k_b + head * p.stride_k_h) * size;
    const char* v_base =
        static_cast<const char*>(p.v) + (tile.batch * p.stride_v_b + head * p.stride_v_h) * size;
    const std::int64_t step_k = p.stride_k_t * size, step_v = p.stride_v_t * size;
    count = 0;
    const auto add = [&](int position_, std::int64_t slot, int length) {
      for (int i = 0; i < length; ++i, ++count) {
        position[count] = position_ + i;
        k[count] = k_base + (slot + i) * step_k;
        v[count] = v_base + (slot + i) * step_v;
      }
    };
    if (!p.page_ids) {
      add(first, first, end - first);
    } else {
      const std::int32_t* ids = p.page_ids + tile.batch * p.stride_ids_b + head * p.stride_ids_h;
      for (int at = first, page = first / p.page_size; at < end; ++page) {
        const int length = std::min((page + 1) * p.page_size, end) - at;
        const std::int64_t offset = at - page * p.page_size;
        if (ids[page] >= 0) add(at, ids[page] * std::int64_t{p.page_size} + offset, length);
        at += length;
      }
    }
    for (int i = count; i < tile_size; ++i) {  // full lists, as rows.h wants them
      k[i] = count ? k[count - 1] : k_base;
      v[i] = count ? v[count - 1] : v_base;
    }
  }
};

constexpr std::size_t lines(std::size_t floats) { return (floats + 15) / 16 * 16; }

// The running softmax of the heads of a walk.
struct State {
  float *max, *sum, *acc;  // [heads], [heads], [heads, D]

  State(float* memory, int heads)
      : max(memory), sum(memory + heads), acc(memory + lines(2 * heads)) {}

  static std::size_t size(int heads, int head_dim) {
    return lines(2 * heads) + lines(heads * head_dim);
  }
};

// What a part works with besides the states of the walks that its borders cut.
struct Scratch {
  State state;
  float *q, *logits, *rescale;  // prepared q [heads, D], [G, kTile], [G]

  Scratch(float* memory, int heads, int group, int head_dim)
      : state(memory, heads),
        q(memory + State::size(heads, head_dim)),
        logits(q + lines(heads * head_dim)),
        rescale(logits + group * kTile) {}

  static std::size_t size(int heads, int group, int head_dim) {
    return State::size(heads, head_dim) + lines(heads * head_dim) + group * kTile + lines(group);
  }
};

class Kernel {
 public:
  explicit Kernel(const DecodeAttentionParams& params)
      : p_(params),
        rows_(simd::rows()),
        typed_(typed(rows_, params.dtype)),
        scattered_(is_scattered(p_)),
        walk_heads_(heads_per_walk(p_)),
        tile_size_(tile_size(p_.head_dim)),
        group_(p_.num_heads / p_.num_kv_heads),
        num_walks_(p_.num_kv_heads / walk_heads_),
        heads_(group_ * walk_heads_) {
    static thread_local std::vector<std::int64_t> first_tile;
    first_tile.assign(1, 0);
    for (int b = 0; b < p_.batch; ++b) {
      first_tile.push_back(first_tile.back() + std::int64_t{num_walks_} * num_tiles(b));
    }
    first_tile_ = first_tile.data();
  }

  void run() {
    constexpr std::int64_t kGrain = 1 << 18;  // multiply-adds that are worth a thread
    constexpr int kPartsPerThread = 4;        // so that a thread that falls behind takes fewer
    const std::int64_t total = first_tile_[p_.batch];
    const std::int64_t work = total * tile_size_ * heads_ * p_.head_dim;
    const int threads = num_threads(work, kGrain);
    const int parts = threads == 1
                          ? 1
                          : static_cast<int>(std::min<std::int64_t>(
                                {std::int64_t{threads} * kPartsPerThread, work / kGrain, total}));
    state_size_ = State::size(heads_, p_.head_dim);
    scratch_size_ = Scratch::size(heads_, group_, p_.head_dim);
    static thread_local Workspace workspace;
    scratches_ = workspace.get(parts * (scratch_size_ + 2 * state_size_));
    partials_ = scratches_ + parts * scratch_size_;

    if (threads == 1) {
      run_part(0, 1);
    } else {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int part = 0; part < parts; ++part) run_part(part, parts);
    }
    finish_rest(parts);
  }

 private:
  // Elements of a head that make a tile: several heads of a token are many bytes as it is.
  int tile_size(int head_dim) const {
    const int elements = walk_heads_ > 1 ? 2048 : scattered_ ? 8192 : 4096;
    return std::clamp(elements / head_dim / 16 * 16, 16, kTile);
  }

  int num_tiles(int batch) const { return (p_.seq_lens[batch] + tile_size_ - 1) / tile_size_; }

  std::int64_t part_begin(int part, int parts) const {
    return first_tile_[p_.batch] * part / parts;
  }

  Tile tile_at(std::int64_t number) const {
    const std::int64_t* after = std::upper_bound(first_tile_, first_tile_ + p_.batch + 1, number);
    const int batch = static_cast<int>(after - first_tile_) - 1;
    const std::int64_t rest = number - first_tile_[batch];
    return {batch, static_cast<int>(rest / num_tiles(batch)),
            static_cast<int>(rest % num_tiles(batch))};
  }

  void advance(Tile& tile) const {
    if (++tile.index < num_tiles(tile.batch)) return;
    tile.index = 0;
    if (++tile.walk < num_walks_) return;
    tile.walk = 0;
    do {
      ++tile.batch;
    } while (tile.batch < p_.batch && num_tiles(tile.batch) == 0);
  }

  Scratch scratch(int part) const {
    return Scratch(scratches_ + part * scratch_size_, heads_, group_, p_.head_dim);
  }

  // A part's first walk may have begun in an earlier part, its last may go on in a later one.
  State partial(int part, bool begun_before) const {
    return State(partials_ + (2 * part + begun_before) * state_size_, heads_);
  }

  void run_part(int part, int parts) const {
    const std::int64_t begin = part_begin(part, parts), end = part_begin(part + 1, parts);
    if (begin == end) return;
    const Scratch scratch = this->scratch(part);
    TileRows rows[2];
    TileRows *current = &rows[0], *next = &rows[1];
    Tile tile = tile_at(begin), following = tile;
    current->gather(p_, tile, tile.walk * walk_heads_, tile_size_);
    State state = scratch.state;
    for (std::int64_t number = begin; number < end; ++number, tile = following) {
      if (number == begin || tile.index == 0) {
        const bool begun_before = tile.index > 0;
        const bool whole = !begun_before && number + num_tiles(tile.batch) <= end;
        state = whole ? scratch.state : partial(part, begun_before);
        start(tile, state, scratch.q);
      }
      advance(following);
      for (int i = 0; i < walk_heads_; ++i) {
        const int head = tile.walk * walk_heads_ + i;
        if (i + 1 < walk_heads_) {
          next->gather(p_, tile, head + 1, tile_size_);
        } else if (number + 1 < end) {
          next->gather(p_, following, following.walk * walk_heads_, tile_size_);
        } else {
          next = current;
        }
        attend(*current, *next, tile.batch, head, i * group_, state, scratch);
        std::swap(current, next);
      }
      const bool whole = state.acc == scratch.state.acc;
      if (whole && tile.index + 1 == num_tiles(tile.batch)) store(tile, state);
    }
  }

  void start(const Tile& tile, const State& state, float* prepared_q) const {
    const int size = size_of(p_.dtype), first_head = tile.walk * heads_;
    const char* q = static_cast<const char*>(p_.q) + tile.batch * p_.stride_q_b * size;
    for (int h = 0; h < heads_; ++h) {
      typed_.prepare_q(q + (first_head + h) * p_.stride_q_h * size, p_.head_dim,
                       prepared_q + h * p_.head_dim);
    }
    std::fill_n(state.max, heads_, -kInfinity);
    std::fill_n(state.sum, heads_, 0.0f);
    std::fill_n(state.acc, heads_ * p_.head_dim, 0.0f);
  }

  // One tile of one KV head; its query heads are [h, h + G) of the walk.
  void attend(const TileRows& rows, const TileRows& next, int batch, int head, int h,
              const State& state, const Scratch& scratch) const {
    if (rows.count == 0) return;
    typed_.qk(scratch.q + h * p_.head_dim, group_, p_.head_dim, rows.k, rows.count,
              scattered_ ? next.k : rows.v, p_.scale, scratch.logits);
    if (p_.logits) write_logits(rows, batch, head, scratch.logits);
    rows_.softmax(scratch.logits, group_, rows.count, state.max + h, state.sum + h,
                  scratch.rescale);
    typed_.pv(scratch.logits, group_, p_.head_dim, rows.v, rows.count, scattered_ ? next.v : next.k,
              scratch.rescale, state.acc + h * p_.head_dim);
  }

  void write_logits(const TileRows& rows, int batch, int head, const float* logits) const {
    const bool whole = rows.position[rows.count - 1] - rows.position[0] == rows.count - 1;
    for (int g = 0; g < group_; ++g, logits += kTile) {
      float* out = static_cast<float*>(p_.logits) + batch * p_.stride_logits_b +
                   (head * group_ + g) * p_.stride_logits_h;
      if (whole) {
        std::copy_n(logits, rows.count, out + rows.position[0]);
      } else {
        for (int t = 0; t < rows.count; ++t) out[rows.position[t]] = logits[t];
      }
    }
  }

  void store(const Tile& tile, const State& state) const {
    for (int h = 0; h < heads_; ++h) {
      const std::int64_t row = std::int64_t{tile.batch} * p_.num_heads + tile.walk * heads_ + h;
      const float sum = state.sum[h];
      typed_.store(state.acc + h * p_.head_dim, sum == 0.0f ? 0.0f : 1.0f / sum, p_.head_dim,
                   static_cast<char*>(p_.out) + row * p_.head_dim * size_of(p_.dtype));
      p_.lse[row] = sum == 0.0f ? -kInfinity : state.max[h] + std::log(sum);
    }
  }

  // The walks that no part finished: those of empty rows, and those cut by borders between parts.
  void finish_rest(int parts) const {
    for (int b = 0; b < p_.batch; ++b) {
      for (int walk = 0; walk < num_walks_ && num_tiles(b) == 0; ++walk) {
        start({b, walk, 0}, scratch(0).state, scratch(0).q);
        store({b, walk, 0}, scratch(0).state);
      }
    }
    State state = partial(0, false);
    for (int part = 1; part < parts; ++part) {
      const std::int64_t border = part_begin(part, parts);
      const Tile cut = tile_at(border);
      if (cut.index == 0) continue;
      const std::int64_t walk_begin = border - cut.index;
      if (part_begin(part - 1, parts) <= walk_begin) state = partial(part - 1, false);
      merge(state, partial(part, true));
      if (part_begin(part + 1, parts) >= walk_begin + num_tiles(cut.batch)) store(cut, state);
    }
  }

  void merge(const State& into, const State& from) const {
    for (int h = 0; h < heads_; ++h) {
      if (from.sum[h] == 0.0f) continue;  // nothing attended
      const float max = std::max(into.max[h], from.max[h]);
      const float a = std::exp(into.max[h] - max), b = std::exp(from.max[h] - max);
      rows_.accumulate(into.acc + h * p_.head_dim, a, from.acc + h * p_.head_dim, b, p_.head_dim);
      into.sum[h] = into.sum[h] * a + from.sum[h] * b;
      into.max[h] = max;
    }
  }

  const DecodeAttentionParams& p_;
  const simd::Rows& rows_;
  const simd::TypedRows& typed_;
  // Memory delivers rows in sequence best when K and V are fetched by turns, 8 to 16 KiB each, and
  // each while the other is in work; scattered rows take longer and are fetched a tile ahead.
  const bool scattered_;
  const int walk_heads_;  // KV heads walked together
  const int tile_size_;   // tokens
  const int group_;       // G
  const int num_walks_;
  const int heads_;                 // query heads of a walk
  const std::int64_t* first_tile_;  // [B + 1] tiles of all walks before a row
  std::size_t state_size_, scratch_size_;
  float *scratches_, *partials_;
};

}  // namespace

void decode_attention(const DecodeAttentionParams& params) { Kernel(params).run(); }

}  // namespace kvcomp::cpu
