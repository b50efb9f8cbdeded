// select_pages: the best pages of every row, with forced sink and recent pages, in ascending order.
//
// Grid (sets, sequences), 1024 threads. Pages are taken in the order of a 32-bit key, which is
// lower for a higher score and lowest where a page is forced, then of their number. The block finds
// the key of the last page that is taken, see radix_select.cuh. Then each warp counts what is taken
// in its stretch of pages, which says where its ids begin, and writes them.
//
// Bytes: 4 per page, read once per pass (about six) and from L1 after the first: a context of 128K
// in pages of 16 is 32 KB. The time is latency and barriers, so one block per set will do. A row
// whose pages all fit is listed without a look at the scores.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"
#include "kvcomp/radix_select.cuh"

namespace kvcomp {

struct SelectPagesTile {
  static constexpr int kWarps = 32, kThreads = kWarps * 32;  // of select_pages by itself
  static constexpr int kLoads = 4;                           // pages in flight per thread
};

struct PageOrder {
  static constexpr unsigned kForced = 0, kAbsent = ~0u;  // no score has these keys

  const float* scores;
  int first, last;  // pages [first, last) compete

  // Of pages from, from + step, ... below end. All loads are under way at once.
  __device__ void load_keys(int from, int step, int end,
                            unsigned (&keys)[SelectPagesTile::kLoads]) const {
#pragma unroll
    for (int i = 0; i < SelectPagesTile::kLoads; ++i) {
      const int page = from + i * step;
      const bool competes = page >= first && page < last;
      keys[i] = page >= end ? kAbsent : competes ? ~ordered_bits(scores[page]) : kForced;
    }
  }
};

// What a block of kWarps needs of shared memory.
template <int kWarps>
struct SelectPagesShared {
  CutSearch search;
  int ahead[kWarps], tied[kWarps];
};

// Where the columns of a set go, and with a table their pages.
class SelectedPages {
 public:
  __device__ SelectedPages(const SelectPagesParams& p, int set, int sequence)
      : table_(p.table ? p.table + sequence * p.stride_table_b + set * p.stride_table_h : nullptr) {
    const int64_t row = (static_cast<int64_t>(sequence) * p.num_sets + set) * p.num_selected;
    ids_ = p.page_ids + row;
    pages_ = p.pages + (table_ ? row : 0);
  }

  __device__ void put(int place, int column) const {
    ids_[place] = column;
    if (table_) pages_[place] = column < 0 ? -1 : table_[column];
  }

 private:
  const int32_t* table_;
  int32_t *ids_, *pages_;
};

// One set of one sequence, by a block of kWarps.
template <int kWarps>
__device__ inline void select_set(const SelectPagesParams& p, int set, int sequence,
                                  SelectPagesShared<kWarps>& shared) {
  constexpr int kThreads = kWarps * 32, kLoads = SelectPagesTile::kLoads;
  static_assert(kWarps <= 32, "a lane per warp when each warp adds up what all found");
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const SelectedPages selected(p, set, sequence);
  // On a GPU nobody has checked it.
  const int64_t room = static_cast<int64_t>(p.num_pages) * p.page_size;
  const int64_t length = max(min(static_cast<int64_t>(p.seq_lens[sequence]), room), int64_t{0});
  const int used = static_cast<int>((length + p.page_size - 1) / p.page_size);
  if (set == 0 && thread == 0) {
    const int64_t dropped = max(used - p.num_selected, 0);
    p.selected_lens[sequence] = static_cast<int32_t>(length - dropped * p.page_size);
  }
  if (used <= p.num_selected) {
    for (int i = thread; i < p.num_selected; i += kThreads) selected.put(i, i < used ? i : -1);
    return;
  }
  const PageOrder order{
      p.scores + sequence * p.stride_scores_b + set * p.stride_scores_h,
      p.num_sink,
      used - p.num_recent,
  };
  unsigned keys[kLoads];
  const auto cut = find_cut<unsigned>(shared.search, p.num_selected, [&](const auto& use) {
    for (int first = 0; first < used; first += kLoads * kThreads) {
      order.load_keys(first + thread, kThreads, used, keys);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) use(keys[i], keys[i] != PageOrder::kAbsent);
    }
  });

  // Each warp has a stretch of pages. Where what is absent ties, it does so behind the last place.
  const int stretch = (used + kThreads - 1) / kThreads * 32;
  const int begin = min(warp * stretch, used), end = min(begin + stretch, used);
  int ahead = 0, tied = 0;
  for (int first = begin; first < end; first += 32 * kLoads) {
    order.load_keys(first + lane, 32, end, keys);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      ahead += cut.ahead(keys[i]);
      tied += cut.ties(keys[i]);
    }
  }
  ahead = __reduce_add_sync(kFullMask, ahead);
  tied = __reduce_add_sync(kFullMask, tied);
  if (lane == 0) shared.ahead[warp] = ahead, shared.tied[warp] = tied;
  __syncthreads();
  ahead = __reduce_add_sync(kFullMask, lane < warp ? shared.ahead[lane] : 0);  // of warps before
  tied = __reduce_add_sync(kFullMask, lane < warp ? shared.tied[lane] : 0);
  const unsigned before = (1u << lane) - 1;
  for (int first = begin; first < end; first += 32 * kLoads) {
    order.load_keys(first + lane, 32, end, keys);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool is_ahead = cut.ahead(keys[i]), ties = cut.ties(keys[i]);
      const unsigned all_ahead = __ballot_sync(kFullMask, is_ahead);
      const unsigned all_tied = __ballot_sync(kFullMask, ties);
      const int rank = tied + __popc(all_tied & before);
      const int place = ahead + __popc(all_ahead & before) + min(rank, cut.places);
      if (is_ahead || (ties && rank < cut.places)) selected.put(place, first + 32 * i + lane);
      ahead += __popc(all_ahead);
      tied += __popc(all_tied);
    }
  }
}

template <int kWarps>
__global__ void __launch_bounds__(kWarps * 32)
    select_pages_kernel(const __grid_constant__ SelectPagesParams p) {
  __shared__ SelectPagesShared<kWarps> shared;
  select_set<kWarps>(p, blockIdx.x, blockIdx.y, shared);
}

// Starts the kernel through `launch(kernel, grid, block, shared_bytes, args...)`.
template <typename Launch>
void launch_select_pages(const SelectPagesParams& p, const Launch& launch) {
  if (p.batch == 0 || p.num_sets == 0) return;
  using Tile = SelectPagesTile;
  launch(select_pages_kernel<Tile::kWarps>, dim3(p.num_sets, p.batch), dim3(Tile::kThreads), 0, p);
}

}  // namespace kvcomp
