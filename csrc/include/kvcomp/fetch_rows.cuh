// fetch_rows: slots give up rows that are no longer wanted and take from the host pool those that
// are and that no slot holds.
//
// Grid (heads, sequences), 1024 threads. Two sets of bits in shared memory, one after the other:
// the slots that are free, and the wanted rows that are missing; a slot finds its row among the
// wanted ones, which ascend, by binary search. One scan counts both sets, so the i-th missing row
// finds the i-th free slot. What is left of the free slots lies behind all those: survivors of the
// tail fill it, and as no copy reads a slot that another one writes, these and the fetches are one
// list of moves, with no barrier in it. A warp has every 32nd move, in the order of pool rows: its
// lanes plan 32, then copy them in vectors of up to 16 bytes, K and V of a pool row lying side by
// side.
//
// Bytes: k_bytes + v_bytes per missing row over the link, which is what takes the time: up to 64 KB
// are on their way in each block, so two heads suffice for a link of 50 GB/s and 2 us. Before the
// first of them 4 per slot and per wanted row, a chain of some twenty latencies, most of them of L1
// and shared memory. Inactive rows return at once.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"
#include "kvcomp/pool_rows.cuh"

namespace kvcomp {

// K and V of one row; null where nothing is to be copied.
struct FetchMove {
  const char* from[2];
  char* to[2];
};

// The word of such a row, on its way in the lane that has planned the move.
struct FetchWord {
  uint32_t value = 0;
  uint32_t* to = nullptr;  // null where there is none

  __device__ void load(const void* from, uint32_t* where) {
    to = where;
    if (reinterpret_cast<std::uintptr_t>(from) % 4 == 0) {
      value = __ldcs(static_cast<const uint32_t*>(from));
    } else {
      for (int i = 0; i < 4; ++i) value |= static_cast<const uint8_t*>(from)[i] << 8 * i;
    }
  }
  __device__ void store() const {
    if (to) *to = value;
  }
};

struct FetchRowsTile {
  static constexpr int kWarps = 32, kThreads = kWarps * 32;
  static constexpr int kLoads = 4;  // vectors in flight per thread

  // Shared memory: this, then num_words() words of bits and as many counts.
  FetchMove moves[kWarps][32];
  int warp_counts[kWarps];
  int length_and_turn;

  static int num_words(const FetchRowsParams& p) {
    return (p.num_slots + 31) / 32 + (p.num_wanted + 31) / 32;
  }
};

// A set of bits that knows how many are in the words before each.
struct RankedBits {
  const unsigned* words;
  const int* before;
  int num_words;

  __device__ bool has(int i) const { return words[i / 32] >> i % 32 & 1; }
  // How many are below i, which lies in one of the words.
  __device__ int rank(int i) const {
    return before[i / 32] + __popc(words[i / 32] & ((1u << i % 32) - 1));
  }
  // The one that `rank` others precede.
  __device__ int find(int rank) const {
    int low = 0, high = num_words;  // before[low] <= rank < before[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before[middle] <= rank ? low : high) = middle;
    }
    unsigned word = words[low];
    for (int skip = rank - before[low]; skip > 0; --skip) word &= word - 1;
    return low * 32 + __ffs(word) - 1;
  }
};

// Counts the bits before each word, by the whole block; returns how many there are.
__device__ inline int count_before(const unsigned* words, int num_words, int* before,
                                   int* warp_counts) {
  constexpr int kWarps = FetchRowsTile::kWarps, kThreads = FetchRowsTile::kThreads;
  static_assert(kWarps == 32, "a lane per warp when each warp adds up what all found");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int total = 0;
  for (int first = 0; first < num_words; first += kThreads) {
    const int word = first + static_cast<int>(threadIdx.x);
    const int own = word < num_words ? __popc(words[word]) : 0;
    const int through = sum_through(own);
    if (lane == 31) warp_counts[warp] = through;
    __syncthreads();
    const int count = warp_counts[lane];
    const int lower = __reduce_add_sync(kFullMask, lane < warp ? count : 0);
    if (word < num_words) before[word] = total + lower + through - own;
    total += __reduce_add_sync(kFullMask, count);
    __syncthreads();
  }
  return total;
}

template <typename Vector>
__global__ void __launch_bounds__(FetchRowsTile::kThreads, 1)
    fetch_rows_kernel(const __grid_constant__ FetchRowsParams p, int capacity) {
  using Tile = FetchRowsTile;
  constexpr int kThreads = Tile::kThreads, kWarps = Tile::kWarps, kLoads = Tile::kLoads;
  Tile& shared = *dynamic_shared<Tile>();
  auto* words = reinterpret_cast<unsigned*>(&shared + 1);
  int* before = reinterpret_cast<int*>(words + capacity);

  const int head = blockIdx.x, sequence = blockIdx.y;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t pair = static_cast<int64_t>(sequence) * p.num_heads + head;
  if (p.active[sequence] == 0) {
    if (thread == 0) p.fetched[pair] = 0;
    return;
  }
  // All heads read the length and one writes the new one, but when? A head reads by adding
  // num_slots + 1, so that it also learns how many heads came before it; the last one writes.
  const int turn = p.num_slots + 1;
  if (thread == 0) shared.length_and_turn = atomicAdd(&p.seq_lens[sequence], turn);
  const int32_t* wanted = p.rows + pair * p.num_wanted;
  const int num_wanted = count_leading(p.num_wanted, [&](int i) { return wanted[i] >= 0; });
  __syncthreads();
  const int length = max(shared.length_and_turn % turn, 0);  // on a GPU nobody has checked it
  const bool last_head = shared.length_and_turn / turn == p.num_heads - 1;

  // A wanted row is missing until a slot is found to hold it.
  const int slot_words = (length + 31) / 32, num_words = slot_words + (num_wanted + 31) / 32;
  for (int word = slot_words + thread; word < num_words; word += kThreads) {
    const int rows = num_wanted - (word - slot_words) * 32;
    words[word] = rows < 32 ? (1u << rows) - 1 : kFullMask;
  }
  __syncthreads();
  int32_t* held = p.slot_rows + sequence * p.stride_rows_b + head * p.stride_rows_h;
  const int first_local = p.first_local[sequence];
  for (int word = warp; word < slot_words; word += kWarps) {
    const int slot = word * 32 + lane, row = slot < length ? held[slot] : -1;
    bool free = slot < length && row >= p.num_sinks && row < first_local;
    if (free) {
      int low = 0, high = num_wanted;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (wanted[middle] < row) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (low < num_wanted && wanted[low] == row) {
        free = false;
        atomicAnd(&words[slot_words + low / 32], ~(1u << low % 32));
      }
    }
    const unsigned bits = __ballot_sync(kFullMask, free);
    if (lane == 0) words[word] = bits;
  }
  __syncthreads();
  const int count = count_before(words, num_words, before, shared.warp_counts);
  const RankedBits bits{words, before, num_words};
  const int num_free = slot_words < num_words ? before[slot_words] : count;
  // On a GPU nobody has checked that there is room.
  const int num_missing = min(count - num_free, p.num_slots - length + num_free);
  const int new_length = length + num_missing - num_free;
  if (thread == 0) {
    p.fetched[pair] = num_missing;
    if (last_head) p.seq_lens[sequence] = new_length;
  }

  // The moves: first the missing rows, then the slots from new_length on.
  char* const k = static_cast<char*>(p.k) + sequence * p.stride_k_b + head * p.stride_k_h;
  char* const v = static_cast<char*>(p.v) + sequence * p.stride_v_b + head * p.stride_v_h;
  uint32_t* const scales =
      p.words ? p.words + sequence * p.stride_words_b + head * p.stride_words_h : nullptr;
  const int num_moves = num_missing + max(length - new_length, 0);
  const auto plan = [&](int i, FetchWord& word) -> FetchMove {
    const char *from_k = nullptr, *from_v = nullptr;
    int64_t to = 0;
    if (i < num_missing) {
      const int row = wanted[bits.find(num_free + i) - slot_words * 32];
      to = i < num_free ? bits.find(i) : length + i - num_free;
      held[to] = row;
      from_k = pool_row(p.pool, pair, row);
      from_v = from_k ? from_k + p.k_bytes : nullptr;
      if (from_k && scales) word.load(from_v + p.v_bytes, scales + to);
    } else if (i < num_moves) {
      const int64_t slot = new_length + i - num_missing;
      if (!bits.has(slot)) {
        const int skipped = bits.rank(slot) - bits.rank(new_length);
        to = bits.find(i - skipped);
        held[to] = held[slot];
        from_k = k + slot * p.stride_k_t;
        from_v = v + slot * p.stride_v_t;
        if (scales) word.load(scales + slot, scales + to);
      }
      held[slot] = 0;
    }
    return {{from_k, from_v}, {k + to * p.stride_k_t, v + to * p.stride_v_t}};
  };
  constexpr int kSize = sizeof(Vector);
  const int vectors = p.k_bytes / kSize, both = vectors + p.v_bytes / kSize;
  const FetchMove* const moves = shared.moves[warp];
  for (int first = warp; first < num_moves; first += kThreads) {
    __syncwarp();  // those before are done
    FetchWord word;
    shared.moves[warp][lane] = plan(first + lane * kWarps, word);
    __syncwarp();
    const int end = min((num_moves - first + kWarps - 1) / kWarps, 32);
    int move = lane / both, at = lane % both;  // of this lane; then 32 vectors on
    while (move < end) {
      Vector data[kLoads] = {}, *to[kLoads] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (move < end && moves[move].from[0]) {
          const bool part = at >= vectors;
          const int column = part ? at - vectors : at;
          data[i] = __ldcs(reinterpret_cast<const Vector*>(moves[move].from[part]) + column);
          to[i] = reinterpret_cast<Vector*>(moves[move].to[part]) + column;
        }
        move += 32 / both;
        at += 32 % both;
        if (at >= both) at -= both, ++move;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (to[i]) *to[i] = data[i];
      }
    }
    word.store();
  }
}

// Chooses the vectors and starts the kernel through `launch(kernel, grid, block, shared_bytes,
// args...)`.
template <typename Launch>
void launch_fetch_rows(const FetchRowsParams& p, const Launch& launch) {
  using Tile = FetchRowsTile;
  if (p.batch == 0 || p.num_heads == 0) return;
  // The widest vector that every row of K and V and of the pool begins and ends with.
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(p.k) |
                       reinterpret_cast<std::uintptr_t>(p.v) | p.k_bytes | p.v_bytes |
                       p.stride_k_b | p.stride_k_h | p.stride_k_t | p.stride_v_b | p.stride_v_h |
                       p.stride_v_t;
  for (int i = 0; i < p.pool.num_blocks; ++i) {
    bits |= reinterpret_cast<std::uintptr_t>(p.pool.data[i]);
  }
  const auto kernel = bits % 16 == 0  ? fetch_rows_kernel<uint4>
                      : bits % 4 == 0 ? fetch_rows_kernel<uint32_t>
                      : bits % 2 == 0 ? fetch_rows_kernel<uint16_t>
                                      : fetch_rows_kernel<uint8_t>;
  const int capacity = Tile::num_words(p);
  launch(kernel, dim3(p.num_heads, p.batch), dim3(Tile::kThreads),
         sizeof(Tile) + capacity * (sizeof(unsigned) + sizeof(int)), p, capacity);
}

}  // namespace kvcomp
