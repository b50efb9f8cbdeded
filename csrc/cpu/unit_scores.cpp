// Softmax of each head's queries over its units, averaged over the group, centroids read once.
//
// The units of a head are cut into tiles of 64. First every tile by itself: the logits of the
// group's queries, less their largest one in the tile, exponentiated, and their sum. Then every
// head: its tiles' maxima and sums make a factor for each tile and query, and the scores are the
// sums of the exponentials times these. No tile waits for another, so few long heads employ all
// threads, and the result does not depend on how many there are. Bytes: num_indexed * Hkv * D
// elements per sequence, and 4 (2 Hq + Hkv) U.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

using simd::kTile;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr std::size_t lines(std::size_t floats) { return (floats + 15) / 16 * 16; }

// A tile's units that have tokens.
struct TileUnits {
  int count;
  int position[kTile];      // in the tile
  const void* rows[kTile];  // centroids
};

class Kernel {
 public:
  explicit Kernel(const UnitScoresParams& params)
      : p_(params),
        rows_(simd::rows()),
        typed_(typed(rows_, params.dtype)),
        group_(p_.num_heads / p_.num_kv_heads),
        num_heads_(p_.batch * p_.num_kv_heads) {
    static thread_local std::vector<int> first_tile;
    first_tile.assign(1, 0);
    for (int head = 0; head < num_heads_; ++head) {
      first_tile.push_back(first_tile.back() + (num_units(head) + kTile - 1) / kTile);
    }
    first_tile_ = first_tile.data();
  }

  void run() {
    constexpr std::int64_t kGrain = 1 << 18;  // multiply-adds that are worth a thread
    const int tiles = first_tile_[num_heads_];
    const std::int64_t work = std::int64_t{tiles} * kTile * group_ * p_.head_dim;
    const int threads = num_threads(work, kGrain);
    tile_size_ = group_ * kTile + lines(2 * group_);
    const std::size_t scratch_size = lines(group_ * p_.head_dim) + lines(group_);
    static thread_local Workspace workspace;
    exponentials_ = workspace.get(tiles * tile_size_ + threads * scratch_size);
    float* scratch = exponentials_ + tiles * tile_size_;
    if (threads == 1) {
      exponentiate(0, tiles, scratch);
      for (int head = 0; head < num_heads_; ++head) add_up(head);
      return;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
      for (int part = 0; part < threads; ++part) {
        exponentiate(std::int64_t{tiles} * part / threads,
                     std::int64_t{tiles} * (part + 1) / threads, scratch + part * scratch_size);
      }
#pragma omp for
      for (int head = 0; head < num_heads_; ++head) add_up(head);
    }
  }

 private:
  // `head` counts KV heads over the batch.
  int num_units(int head) const {
    const int batch = head / p_.num_kv_heads;
    return p_.active[batch] ? p_.num_indexed[batch] : 0;
  }

  void gather(int head, int index, TileUnits& units) const {
    const int batch = head / p_.num_kv_heads, kv_head = head % p_.num_kv_heads;
    const int first = index * kTile, count = std::min(kTile, num_units(head) - first);
    const std::int64_t row_bytes = p_.head_dim * size_of(p_.dtype);
    const std::int64_t offset = batch * p_.stride_centroids_b + kv_head * p_.stride_centroids_h;
    const char* row =
        static_cast<const char*>(p_.centroids) + offset * size_of(p_.dtype) + first * row_bytes;
    const std::int32_t* starts =
        p_.starts + batch * p_.stride_starts_b + kv_head * p_.stride_starts_h + first;
    units.count = 0;
    for (int u = 0; u < count; ++u) {
      units.position[units.count] = u;
      units.rows[units.count] = row + u * row_bytes;
      units.count += starts[u] < starts[u + 1];
    }
    for (int u = units.count; u < kTile; ++u) {  // full lists, as rows.h wants them
      units.rows[u] = units.count ? units.rows[0] : row;
    }
  }

  // Tile `tile` of all: exponentials [G, kTile], maxima [G] and sums [G].
  float* exponentials(int tile) const { return exponentials_ + tile * tile_size_; }
  float* maxima(int tile) const { return exponentials(tile) + group_ * kTile; }
  float* sums(int tile) const { return maxima(tile) + group_; }

  // Tiles [begin, end) of all.
  void exponentiate(int begin, int end, float* scratch) const {
    if (begin == end) return;
    int head = static_cast<int>(std::upper_bound(first_tile_, first_tile_ + num_heads_ + 1, begin) -
                                first_tile_ - 1);
    TileUnits units[2];
    TileUnits *current = &units[0], *next = &units[1];
    float *q = scratch, *rescale = scratch + lines(group_ * p_.head_dim);
    gather(head, begin - first_tile_[head], *current);
    prepare(head, q);
    for (int tile = begin; tile < end; ++tile) {
      int following = head;
      while (tile + 1 < end && tile + 1 == first_tile_[following + 1]) ++following;
      if (tile + 1 < end) {
        gather(following, tile + 1 - first_tile_[following], *next);
      } else {
        next = current;
      }
      float* logits = exponentials(tile);
      std::fill_n(maxima(tile), group_, -kInfinity);
      std::fill_n(sums(tile), group_, 0.0f);
      if (current->count) {
        typed_.qk(q, group_, p_.head_dim, current->rows, current->count, next->rows, p_.scale,
                  logits);
        rows_.softmax(logits, group_, current->count, maxima(tile), sums(tile), rescale);
      }
      if (following != head) prepare(following, q);
      head = following;
      std::swap(current, next);
    }
  }

  void prepare(int head, float* prepared) const {
    const int batch = head / p_.num_kv_heads, kv_head = head % p_.num_kv_heads;
    for (int g = 0; g < group_; ++g) {
      const std::int64_t offset = batch * p_.stride_q_b + (kv_head * group_ + g) * p_.stride_q_h;
      typed_.prepare_q(static_cast<const char*>(p_.q) + offset * size_of(p_.dtype), p_.head_dim,
                       prepared + g * p_.head_dim);
    }
  }

  // The scores of one head. Its tiles' maxima become their factors.
  void add_up(int head) const {
    const int begin = first_tile_[head], end = first_tile_[head + 1];
    for (int g = 0; g < group_; ++g) {
      float max = -kInfinity, sum = 0.0f;
      for (int tile = begin; tile < end; ++tile) max = std::max(max, maxima(tile)[g]);
      for (int tile = begin; tile < end; ++tile) {
        float& factor = maxima(tile)[g];
        factor = sums(tile)[g] > 0.0f ? std::exp(factor - max) : 0.0f;
        sum += sums(tile)[g] * factor;
      }
      const float share = 1.0f / (sum * static_cast<float>(group_));
      for (int tile = begin; tile < end; ++tile) maxima(tile)[g] *= share;
    }
    float* scores = p_.scores + std::int64_t{head} * p_.num_units;
    std::fill_n(scores, p_.num_units, 0.0f);
    TileUnits units;
    for (int tile = begin; tile < end; ++tile, scores += kTile) {
      gather(head, tile - begin, units);
      alignas(64) float total[kTile] = {};
      for (int g = 0; g < group_; ++g) {
        rows_.accumulate(total, 1.0f, exponentials(tile) + g * kTile, maxima(tile)[g],
                         (units.count + 15) / 16 * 16);
      }
      for (int i = 0; i < units.count; ++i) scores[units.position[i]] = total[i];
    }
  }

  const UnitScoresParams& p_;
  const simd::Rows& rows_;
  const simd::TypedRows& typed_;
  const int group_;        // G
  const int num_heads_;    // KV heads of all sequences
  const int* first_tile_;  // [num_heads + 1] tiles before a head
  std::size_t tile_size_;  // floats
  float* exponentials_;
};

}  // namespace

void unit_scores(const UnitScoresParams& params) { Kernel(params).run(); }

}  // namespace kvcomp::cpu
