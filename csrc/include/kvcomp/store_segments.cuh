// store_segments: a closed segment's rows go to the host pool, their mean key into the index.
//
// Grid (heads, sequences), 256 threads. The block looks for the segment's rows in all slots and
// notes where each lies, a tile of rows at a time. Its threads copy them in vectors of up to 16
// bytes, K and V of a row to one place of the pool, then read K once more, from L1 or L2, and add
// it up, a thread per channel, in the order of the rows: the mean is the same wherever they lie.
//
// Bytes: 4 per slot and, of a row, its K and V read and as many written over the link; the writes
// are posted, nobody waits for them. 16 tokens of a head are 8 KB: the time is a chain of some six
// latencies, in the steps that close a segment.
#pragma once

#include <cstdint>

#include "kvcomp/codes.cuh"
#include "kvcomp/device.cuh"
#include "kvcomp/params.h"
#include "kvcomp/pool_rows.cuh"

namespace kvcomp {

struct StoreSegmentsTile {
  static constexpr int kThreads = 256;
  static constexpr int kRows = 64;  // of a segment at a time
  static constexpr int kLoads = 4;  // vectors in flight per thread
};

// A row's word, and zeros up to the next row.
template <typename Vector>
__device__ void store_word(uint32_t word, char* to) {
  if constexpr (sizeof(Vector) == 16) {
    *reinterpret_cast<uint4*>(to) = make_uint4(word, 0, 0, 0);
  } else {
    for (int i = 0; i < 16; ++i) to[i] = static_cast<char>(i < 4 ? word >> 8 * i : 0);
  }
}

// A row in shared memory times the Hadamard matrix, by the whole block; back to the threads that
// have its elements.
__device__ inline void turn_shared(float* row, int head_dim) {
  for (int half = 1; half < head_dim; half *= 2) {
    __syncthreads();
    for (int i = threadIdx.x; i < head_dim / 2; i += StoreSegmentsTile::kThreads) {
      const int at = i / half * 2 * half + i % half;
      const float a = row[at], b = row[at + half];
      row[at] = a + b;
      row[at + half] = a - b;
    }
  }
  __syncthreads();
  const float factor = 1.0f / sqrtf(static_cast<float>(head_dim));
  for (int d = threadIdx.x; d < head_dim; d += StoreSegmentsTile::kThreads) row[d] *= factor;
}

template <typename T, typename Vector>
__global__ void __launch_bounds__(StoreSegmentsTile::kThreads, sizeof(T) == 1 ? 4 : 5)
    store_segments_kernel(const __grid_constant__ StoreSegmentsParams p) {
  constexpr int kThreads = StoreSegmentsTile::kThreads, kRows = StoreSegmentsTile::kRows;
  constexpr int kLoads = StoreSegmentsTile::kLoads;
  __shared__ int slots[kRows];            // of the tile's rows; -1 for one that no slot holds
  float* sums = dynamic_shared<float>();  // [D], each touched by one thread only

  const int head = blockIdx.x, sequence = blockIdx.y, thread = threadIdx.x;
  if (p.closed[sequence] <= 0) return;
  // On a GPU nobody has checked any of these.
  const int unit = p.num_units[sequence] - 1;
  if (unit < 0 || unit >= p.max_units) return;
  const int32_t* starts = p.starts + sequence * p.stride_starts_b + head * p.stride_starts_h + unit;
  const int num_rows = p.pool.first_row[p.pool.num_blocks];
  const int begin = max(starts[0], 0), end = min(starts[1], num_rows);
  const int length = min(p.seq_lens[sequence], p.num_slots);

  const int32_t* held = p.slot_rows + sequence * p.stride_rows_b + head * p.stride_rows_h;
  const T* k = static_cast<const T*>(p.k) + sequence * p.stride_k_b + head * p.stride_k_h;
  const T* v = static_cast<const T*>(p.v) + sequence * p.stride_v_b + head * p.stride_v_h;
  const int64_t pool_head = static_cast<int64_t>(sequence) * p.num_heads + head;
  constexpr int kPerVector = sizeof(Vector) / sizeof(T);
  const int vectors = p.head_dim / kPerVector;  // of K of a row
  const int both = vectors + p.value_dim / kPerVector;
  const uint32_t* words =
      p.words ? p.words + sequence * p.stride_words_b + head * p.stride_words_h : nullptr;

  for (int d = thread; d < p.head_dim; d += kThreads) sums[d] = 0;
  int stored = 0;
  for (int first = begin; first < end; first += kRows) {
    const int rows = min(kRows, end - first);
    if (thread < kRows) slots[thread] = -1;
    __syncthreads();
    for (int slot = thread; slot < length; slot += kThreads) {
      const unsigned row = static_cast<unsigned>(held[slot]) - static_cast<unsigned>(first);
      if (row < static_cast<unsigned>(rows)) slots[row] = slot;
    }
    __syncthreads();
    const int total = rows * both;
    for (int base = thread; base < total; base += kThreads * kLoads) {
      Vector data[kLoads] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int index = base + i * kThreads, at = index % both;
        const int64_t slot = index < total ? slots[index / both] : -1;
        if (slot < 0) continue;
        const T* from = at < vectors ? k + slot * p.stride_k_t : v + slot * p.stride_v_t;
        data[i] = reinterpret_cast<const Vector*>(from)[at < vectors ? at : at - vectors];
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int index = base + i * kThreads, row = index / both;
        if (index >= total || slots[row] < 0) continue;
        char* to = pool_row(p.pool, pool_head, first + row);
        reinterpret_cast<Vector*>(to)[index % both] = data[i];
      }
    }
    if constexpr (std::is_same_v<T, int8_t>) {
      for (int row = thread; row < rows; row += kThreads) {
        if (slots[row] < 0) continue;
        char* to = pool_row(p.pool, pool_head, first + row) + 2 * p.head_dim;
        store_word<Vector>(words[slots[row]], to);
      }
    }
    for (int d = thread; d < p.head_dim; d += kThreads) {
      float sum = sums[d];
#pragma unroll 8
      for (int row = 0; row < rows; ++row) {
        const int64_t slot = slots[row];
        if (slot < 0) continue;
        if constexpr (std::is_same_v<T, int8_t>) {
          sum += k[slot * p.stride_k_t + d] * scales_of(words[slot]).x;
        } else {
          sum += to_float(k[slot * p.stride_k_t + d]);
        }
      }
      sums[d] = sum;
    }
    for (int row = 0; row < rows; ++row) stored += slots[row] >= 0;
    __syncthreads();
  }

  if (stored == 0) return;
  if (p.turned) turn_shared(sums, p.head_dim);
  const int64_t centroid = sequence * p.stride_centroids_b + head * p.stride_centroids_h +
                           static_cast<int64_t>(unit) * p.head_dim;
  for (int d = thread; d < p.head_dim; d += kThreads) {
    store_as(p.dtype, sums[d] / stored, p.centroids, centroid + d);
  }
}

// Chooses types and vectors and starts the kernel through `launch(kernel, grid, block,
// shared_bytes, args...)`.
template <typename Launch>
void launch_store_segments(const StoreSegmentsParams& p, const Launch& launch) {
  if (p.batch == 0 || p.num_heads == 0) return;
  const int size = p.words ? 1 : p.dtype == ScalarType::f32 ? 4 : 2;
  // 16-byte vectors where every row of K and V and of the pool begins and ends with one.
  std::uint64_t bits =
      reinterpret_cast<std::uintptr_t>(p.k) | reinterpret_cast<std::uintptr_t>(p.v);
  for (int i = 0; i < p.pool.num_blocks; ++i) {
    bits |= reinterpret_cast<std::uintptr_t>(p.pool.data[i]);
  }
  bits |= (p.stride_k_b | p.stride_k_h | p.stride_k_t | p.stride_v_b | p.stride_v_h | p.stride_v_t |
           p.head_dim | p.value_dim) *
          size;
  const bool aligned = bits % 16 == 0;
  const auto kernel = [&]<typename T>(T) {
    return aligned ? store_segments_kernel<T, uint4> : store_segments_kernel<T, T>;
  };
  launch(p.words                      ? kernel(int8_t{})
         : p.dtype == ScalarType::f32 ? kernel(float{})
         : p.dtype == ScalarType::f16 ? kernel(__half{})
                                      : kernel(__nv_bfloat16{}),
         dim3(p.num_heads, p.batch), dim3(StoreSegmentsTile::kThreads), p.head_dim * sizeof(float),
         p);
}

}  // namespace kvcomp
