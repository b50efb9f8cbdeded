// hadamard: rows times the Walsh-Hadamard matrix over sqrt(D).
//
// A warp has a row, a lane every 32nd element of it: the first five rounds exchange between lanes,
// the others within one. Every element is the same sum of pairs as on the CPU.
//
// Bytes: each row, read and written once.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

struct WarpRowTile {
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
};

// Element i * 32 + lane in row[i]; 0 behind the last one.
template <typename T, int kParts>
__device__ void load_row(const T* from, int head_dim, float (&row)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int at = i * 32 + static_cast<int>(threadIdx.x % 32);
    row[i] = at < head_dim ? to_float(from[at]) : 0.0f;
  }
}

// By a whole warp; head_dim is a power of two.
template <int kParts>
__device__ void turn_row(float (&row)[kParts], int head_dim) {
  for (int half = 1; half < 32 && half < head_dim; half *= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const float other = __shfl_xor_sync(kFullMask, row[i], half);
      row[i] = upper ? other - row[i] : row[i] + other;
    }
  }
#pragma unroll
  for (int half = 1; half < kParts; half *= 2) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (i & half) continue;
      const float a = row[i], b = row[i + half];
      row[i] = a + b;
      row[i + half] = a - b;
    }
  }
  const float factor = 1.0f / sqrtf(static_cast<float>(head_dim));
#pragma unroll
  for (int i = 0; i < kParts; ++i) row[i] *= factor;
}

// start(std::integral_constant<int, kParts>{}) with the power of two that has room for head_dim.
template <typename Start>
void with_row_parts(int head_dim, const Start& start) {
  if (head_dim <= 32) return start(std::integral_constant<int, 1>{});
  if (head_dim <= 64) return start(std::integral_constant<int, 2>{});
  if (head_dim <= 128) return start(std::integral_constant<int, 4>{});
  if (head_dim <= 256) return start(std::integral_constant<int, 8>{});
  return start(std::integral_constant<int, 16>{});
}

template <typename T, int kParts>
__global__ void __launch_bounds__(WarpRowTile::kThreads)
    hadamard_kernel(const __grid_constant__ HadamardParams p) {
  const int64_t index = int64_t{blockIdx.x} * WarpRowTile::kWarps + threadIdx.x / 32;
  if (index >= p.num_rows) return;
  float row[kParts];
  load_row(static_cast<const T*>(p.x) + index * p.head_dim, p.head_dim, row);
  turn_row(row, p.head_dim);
  T* out = static_cast<T*>(p.out) + index * p.head_dim;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int at = i * 32 + static_cast<int>(threadIdx.x % 32);
    if (at < p.head_dim) from_float(row[i], out[at]);
  }
}

// Starts the kernel through `launch(kernel, grid, block, shared_bytes, args...)`.
template <typename Launch>
void launch_hadamard(const HadamardParams& p, const Launch& launch) {
  using Tile = WarpRowTile;
  if (p.num_rows == 0) return;
  with_float_type(p.dtype, [&](auto type) {
    with_row_parts(p.head_dim, [&](auto parts) {
      launch(hadamard_kernel<decltype(type), parts()>,
             dim3(static_cast<unsigned>((p.num_rows + Tile::kWarps - 1) / Tile::kWarps)),
             dim3(Tile::kThreads), 0, p);
    });
  });
}

}  // namespace kvcomp
