// store_slots: K and V of new tokens into the pages of a pool.
//
// Grid (tokens). The threads of a block copy its token's rows, all heads of K and V, in vectors of
// up to 16 bytes. Bytes: the rows, read and written once, and 8 per token.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

struct StoreSlotsTile {
  static constexpr int kThreads = 128;
};

template <typename Vector>
__global__ void __launch_bounds__(StoreSlotsTile::kThreads)
    store_slots_kernel(const __grid_constant__ StoreSlotsParams p) {
  constexpr int kSize = sizeof(Vector);
  const int64_t token = blockIdx.x, slot = p.slots[token];
  if (slot < 0 || slot >= p.num_slots) return;  // on a GPU nobody has checked it
  const int64_t page = slot / p.page_size, place = slot % p.page_size;
  const char* k = static_cast<const char*>(p.k) + token * p.stride_k_n;
  const char* v = static_cast<const char*>(p.v) + token * p.stride_v_n;
  char* k_pool =
      static_cast<char*>(p.k_pool) + page * p.stride_k_pool_p + place * p.stride_k_pool_t;
  char* v_pool =
      static_cast<char*>(p.v_pool) + page * p.stride_v_pool_p + place * p.stride_v_pool_t;
  const int vectors_k = p.k_bytes / kSize, vectors = vectors_k + p.v_bytes / kSize;
  for (int i = threadIdx.x; i < p.num_heads * vectors; i += StoreSlotsTile::kThreads) {
    const int64_t head = i / vectors;
    const int at = i % vectors;
    const bool is_k = at < vectors_k;
    const char* from = is_k ? k + head * p.stride_k_h : v + head * p.stride_v_h;
    char* into = is_k ? k_pool + head * p.stride_k_pool_h : v_pool + head * p.stride_v_pool_h;
    const int64_t offset = is_k ? at : at - vectors_k;
    reinterpret_cast<Vector*>(into)[offset] = reinterpret_cast<const Vector*>(from)[offset];
  }
}

// Chooses the vectors and starts the kernel through `launch(kernel, grid, block, shared_bytes,
// args...)`.
template <typename Launch>
void launch_store_slots(const StoreSlotsParams& p, const Launch& launch) {
  if (p.num_tokens == 0) return;
  // The widest vector that every row begins and ends with.
  const std::uint64_t bits =
      reinterpret_cast<std::uintptr_t>(p.k) | reinterpret_cast<std::uintptr_t>(p.v) |
      reinterpret_cast<std::uintptr_t>(p.k_pool) | reinterpret_cast<std::uintptr_t>(p.v_pool) |
      p.k_bytes | p.v_bytes | p.stride_k_n | p.stride_k_h | p.stride_v_n | p.stride_v_h |
      p.stride_k_pool_p | p.stride_k_pool_h | p.stride_k_pool_t | p.stride_v_pool_p |
      p.stride_v_pool_h | p.stride_v_pool_t;
  const auto kernel = bits % 16 == 0  ? store_slots_kernel<uint4>
                      : bits % 4 == 0 ? store_slots_kernel<uint32_t>
                      : bits % 2 == 0 ? store_slots_kernel<uint16_t>
                                      : store_slots_kernel<uint8_t>;
  launch(kernel, dim3(p.num_tokens), dim3(StoreSlotsTile::kThreads), 0, p);
}

}  // namespace kvcomp
