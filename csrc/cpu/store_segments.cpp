// The rows of each closed segment, found among the slots, copied to the pool, and their mean key.
// One task is a head. Bytes: the segment's K and V, read and written once, and slot_rows.
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "pool.h"

namespace kvcomp::cpu {
namespace {

using simd::kTile;

void store_head(const StoreSegmentsParams& p, int batch, int head) {
  const simd::Rows& all = simd::rows();
  const simd::TypedRows& rows = typed(all, p.dtype);
  const int unit = p.num_units[batch] - 1, count = p.closed[batch];
  const std::int64_t size = p.words ? 1 : size_of(p.dtype);
  const std::int64_t k_bytes = p.head_dim * size, v_bytes = p.value_dim * size;
  const std::uint32_t* words =
      p.words ? p.words + batch * p.stride_words_b + head * p.stride_words_h : nullptr;
  const char* k =
      static_cast<const char*>(p.k) + (batch * p.stride_k_b + head * p.stride_k_h) * size;
  const char* v =
      static_cast<const char*>(p.v) + (batch * p.stride_v_b + head * p.stride_v_h) * size;
  const std::int32_t* held = p.slot_rows + batch * p.stride_rows_b + head * p.stride_rows_h;
  const std::int32_t begin = p.starts[batch * p.stride_starts_b + head * p.stride_starts_h + unit];
  PoolHead pool(p.pool, std::int64_t{batch} * p.num_heads + head);

  static thread_local Workspace workspace;
  float* sum = workspace.get(p.head_dim);  // in the order of pv
  std::fill_n(sum, p.head_dim, 0.0f);
  float ones[kTile], scales[kTile], unused[kTile];  // scales of codes are their weights
  std::fill_n(ones, kTile, 1.0f);
  const void* keys[kTile];
  std::uint32_t key_words[kTile];
  int num_keys = 0;
  const auto add_keys = [&] {
    if (num_keys && words) {
      all.codes.split_words(key_words, num_keys, scales, unused);
      all.codes.add(scales, p.head_dim, keys, num_keys, sum);
    } else if (num_keys) {
      rows.pv(ones, 1, p.head_dim, keys, num_keys, nullptr, ones, sum);
    }
    num_keys = 0;
  };
  for (int slot = 0, found = 0; found < count; ++slot) {
    const std::int32_t row = held[slot];
    if (static_cast<std::uint32_t>(row) - static_cast<std::uint32_t>(begin) >=
        static_cast<std::uint32_t>(count)) {
      continue;
    }
    ++found;
    const char* key = k + slot * p.stride_k_t * size;
    char* place = pool[row];
    std::memcpy(place, key, k_bytes);
    std::memcpy(place + k_bytes, v + slot * p.stride_v_t * size, v_bytes);
    if (words) {
      const std::uint32_t behind[] = {words[slot], 0, 0, 0};  // zeros up to the next row
      std::memcpy(place + k_bytes + v_bytes, behind, sizeof behind);
      key_words[num_keys] = words[slot];
    }
    keys[num_keys++] = key;
    if (num_keys == kTile) add_keys();
  }
  add_keys();
  const std::int64_t centroid =
      batch * p.stride_centroids_b + head * p.stride_centroids_h + std::int64_t{unit} * p.head_dim;
  if (words && p.turned) all.codes.turn(sum, p.head_dim);
  (words ? rows.narrow : rows.store)(sum, 1.0f / static_cast<float>(count), p.head_dim,
                                     static_cast<char*>(p.centroids) + centroid * size_of(p.dtype));
}

}  // namespace

void store_segments(const StoreSegmentsParams& p) {
  constexpr std::int64_t kGrain = 1 << 16;  // elements that are worth a thread
  std::int64_t work = 0;
  for (int b = 0; b < p.batch; ++b) {
    work += std::int64_t{p.closed[b]} * (p.head_dim + p.value_dim) * p.num_heads;
  }
  const int num_heads = p.batch * p.num_heads;
  const int threads = std::min(num_heads, num_threads(work, kGrain));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int head = 0; head < num_heads; ++head) {
    const int batch = head / p.num_heads;
    if (p.closed[batch]) store_head(p, batch, head % p.num_heads);
  }
}

}  // namespace kvcomp::cpu
