// compact_kv: fills the holes that victims leave with the last surviving tokens, in place.
//
// Grid (slices of moves, heads, sequences), 128 threads. The victims of a row are ascending, so the
// i-th one is the i-th hole, and where the i-th mover lies follows from a search among the victims
// of the tail: no scan, no workspace. What is read, [kept, length), and what is written, [0, kept),
// never meet. A block finds 16 moves at a time, then its threads copy their rows of K and V in
// vectors of up to 16 bytes, eight under way in each thread.
//
// Bytes: 2 (k_bytes + v_bytes) per hole and head. Few moves are a chain of some six latencies
// (length, two searches of two probes each, rows) on as many multiprocessors as there are slices
// and heads; a block of a long list does its searches once and walks over several slices.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

struct CompactKvTile {
  static constexpr int kThreads = 128;
  static constexpr int kMoves = 16;         // of a block at a time
  static constexpr int kLoads = 4;          // in flight per thread, of K and of V
  static constexpr int kManyBlocks = 1024;  // about as many as run at once
};

template <typename Vector>
__global__ void __launch_bounds__(CompactKvTile::kThreads)
    compact_kv_kernel(const __grid_constant__ CompactKvParams p) {
  constexpr int kThreads = CompactKvTile::kThreads, kMoves = CompactKvTile::kMoves;
  constexpr int kLoads = CompactKvTile::kLoads;
  static_assert(kMoves * CompactKvParams::kMaxState <= kThreads);
  __shared__ int2 moves[kMoves];  // x: the hole, y: the mover

  const int head = blockIdx.y, sequence = blockIdx.z, thread = threadIdx.x;
  const int unit = p.num_units == 1 ? 0 : head;
  const int32_t* victims =
      p.victims + (static_cast<int64_t>(sequence) * p.num_units + unit) * p.num_victims;
  // On a GPU nobody has checked lengths and victims: whatever they hold, rows outside [0, length)
  // are left alone.
  const int length = max(min(p.seq_lens[sequence], p.num_slots), 0);
  const int listed = count_leading(p.num_victims, [&](int i) { return victims[i] >= 0; });
  const int count = min(listed, length), kept = length - count;
  const int holes = count_leading(count, [&](int i) { return victims[i] < kept; });

  char* k = static_cast<char*>(p.k) + sequence * p.stride_k_b + head * p.stride_k_h;
  char* v = static_cast<char*>(p.v) + sequence * p.stride_v_b + head * p.stride_v_h;
  constexpr int kSize = sizeof(Vector);
  const int vectors_k = p.k_bytes / kSize, vectors_v = p.v_bytes / kSize;
  const int vectors = max(vectors_k, vectors_v);

  for (int first = blockIdx.x * kMoves; first < holes; first += gridDim.x * kMoves) {
    const int num_moves = min(kMoves, holes - first);
    if (thread < num_moves) {
      const int i = first + thread, hole = victims[i];
      int low = holes, high = count;  // the mover passes the victims of the tail before `low`
      while (low < high) {
        const int middle = low + (high - low) / 2;
        if (victims[middle] <= kept + i + (middle - holes)) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      const int mover = kept + i + (low - holes);
      moves[thread] = make_int2(hole >= 0 && hole < kept ? hole : mover, mover);
    }
    __syncthreads();
    // State that heads share moves once, with the first one: at most one value per thread, on its
    // way while the rows are copied.
    int32_t *state = nullptr, value = 0;
    const int which = thread / num_moves;
    if (which < p.num_state && head < p.state_units[which]) {
      const int2 move = moves[thread % num_moves];
      auto* row = reinterpret_cast<int32_t*>(static_cast<char*>(p.state[which]) +
                                             sequence * p.stride_state_b[which] +
                                             head * p.stride_state_u[which]);
      value = row[move.y];
      state = row + move.x;
    }
    const int total = num_moves * vectors;
    for (int base = thread; base < total; base += kThreads * kLoads) {
      Vector rows_k[kLoads] = {}, rows_v[kLoads] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int index = base + i * kThreads;
        if (index >= total) break;
        const int64_t mover = moves[index / vectors].y;
        const int at = index % vectors;
        if (at < vectors_k)
          rows_k[i] = reinterpret_cast<const Vector*>(k + mover * p.stride_k_t)[at];
        if (at < vectors_v)
          rows_v[i] = reinterpret_cast<const Vector*>(v + mover * p.stride_v_t)[at];
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int index = base + i * kThreads;
        if (index >= total) break;
        const int64_t hole = moves[index / vectors].x;
        const int at = index % vectors;
        if (at < vectors_k) reinterpret_cast<Vector*>(k + hole * p.stride_k_t)[at] = rows_k[i];
        if (at < vectors_v) reinterpret_cast<Vector*>(v + hole * p.stride_v_t)[at] = rows_v[i];
      }
    }
    if (state) *state = value;
    __syncthreads();
  }
}

// Chooses the vectors and starts the kernel through `launch(kernel, grid, block, shared_bytes,
// args...)`.
template <typename Launch>
void launch_compact_kv(const CompactKvParams& p, const Launch& launch) {
  using Tile = CompactKvTile;
  if (p.batch == 0 || p.num_heads == 0 || p.num_victims == 0) return;
  // The widest vector that every row of K and V begins and ends with.
  const std::uint64_t bits = reinterpret_cast<std::uintptr_t>(p.k) |
                             reinterpret_cast<std::uintptr_t>(p.v) | p.k_bytes | p.v_bytes |
                             p.stride_k_b | p.stride_k_h | p.stride_k_t | p.stride_v_b |
                             p.stride_v_h | p.stride_v_t;
  const auto kernel = bits % 16 == 0  ? compact_kv_kernel<uint4>
                      : bits % 4 == 0 ? compact_kv_kernel<uint32_t>
                      : bits % 2 == 0 ? compact_kv_kernel<uint16_t>
                                      : compact_kv_kernel<uint8_t>;
  const int rows = p.num_heads * p.batch;
  const int slices = (p.num_victims + Tile::kMoves - 1) / Tile::kMoves;
  const int most = (Tile::kManyBlocks + rows - 1) / rows;
  launch(kernel, dim3(slices < most ? slices : most, p.num_heads, p.batch), dim3(Tile::kThreads), 0,
         p);
}

}  // namespace kvcomp
