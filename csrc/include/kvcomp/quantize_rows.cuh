// quantize_rows: K and V of new tokens as codes, every row with a scale of its own.
//
// Grid (tiles of tokens, heads, sequences). A warp has a token of a head: its K, turned or not, and
// its V, a lane every 32nd element of either. The arithmetic is that of the CPU and of the
// reference, operation by operation, so the codes are the same.
//
// Bytes: the rows, read once, and half of that (of fp32, a quarter) written.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/hadamard.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

// Writes the codes of a row, by a whole warp; returns its scale's bits.
template <int kParts>
__device__ uint32_t quantize_row(const float (&row)[kParts], int head_dim, int8_t* codes) {
  constexpr uint32_t kInfinite = 0x7f800000, kHalfInfinite = 0x7c00, kHalfNan = 0x7e00;
  uint32_t top = 0;  // magnitudes as bits, which order as the numbers do, infinities and NaN last
#pragma unroll
  for (int i = 0; i < kParts; ++i) top = max(top, __float_as_uint(row[i]) & 0x7fffffffu);
  top = __reduce_max_sync(kFullMask, top);
  const __half rounded = __float2half_rn(__uint_as_float(top) / 127.0f);
  uint16_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  const bool finite = top < kInfinite && bits < kHalfInfinite;
  const float inverse = finite && bits != 0 ? 1.0f / to_float(rounded) : 0.0f;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int at = i * 32 + static_cast<int>(threadIdx.x % 32);
    // The bound matters where the scale was rounded down, by much if it is subnormal.
    const float code = rintf(fminf(fmaxf(row[i] * inverse, -127.0f), 127.0f));
    if (at < head_dim) codes[at] = finite ? static_cast<int8_t>(code) : 0;
  }
  return finite ? bits : kHalfNan;
}

template <typename T, int kParts>
__global__ void __launch_bounds__(WarpRowTile::kThreads)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsParams p) {
  const int64_t token = int64_t{blockIdx.x} * WarpRowTile::kWarps + threadIdx.x / 32;
  if (token >= p.num_tokens) return;
  const int64_t head = blockIdx.y, sequence = blockIdx.z;
  float k[kParts], v[kParts];
  load_row(static_cast<const T*>(p.k) + sequence * p.stride_k_b + head * p.stride_k_h +
               token * p.stride_k_t,
           p.head_dim, k);
  load_row(static_cast<const T*>(p.v) + sequence * p.stride_v_b + head * p.stride_v_h +
               token * p.stride_v_t,
           p.head_dim, v);
  if (p.turn) turn_row(k, p.head_dim);
  const uint32_t low = quantize_row(k, p.head_dim,
                                    p.k_codes + sequence * p.stride_k_codes_b +
                                        head * p.stride_k_codes_h + token * p.stride_k_codes_t);
  const uint32_t high = quantize_row(v, p.head_dim,
                                     p.v_codes + sequence * p.stride_v_codes_b +
                                         head * p.stride_v_codes_h + token * p.stride_v_codes_t);
  if (threadIdx.x % 32 == 0) {
    p.words[sequence * p.stride_words_b + head * p.stride_words_h + token] = high << 16 | low;
  }
}

// Starts the kernel through `launch(kernel, grid, block, shared_bytes, args...)`.
template <typename Launch>
void launch_quantize_rows(const QuantizeRowsParams& p, const Launch& launch) {
  using Tile = WarpRowTile;
  if (p.batch == 0 || p.num_heads == 0 || p.num_tokens == 0) return;
  const int tiles = (p.num_tokens + Tile::kWarps - 1) / Tile::kWarps;
  with_float_type(p.dtype, [&](auto type) {
    with_row_parts(p.head_dim, [&](auto parts) {
      launch(quantize_rows_kernel<decltype(type), parts()>, dim3(tiles, p.num_heads, p.batch),
             dim3(Tile::kThreads), 0, p);
    });
  });
}

}  // namespace kvcomp
