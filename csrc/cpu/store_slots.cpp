// K and V of new tokens into the pages of a pool. Bytes: the rows, read and written once.
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {

void store_slots(const StoreSlotsParams& p) {
  constexpr std::int64_t kGrain = 1 << 17;  // bytes to copy, worth a thread
  const std::int64_t bytes = std::int64_t{p.num_tokens} * p.num_heads * (p.k_bytes + p.v_bytes);
  const int threads = num_threads(bytes, kGrain);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t i = 0; i < p.num_tokens; ++i) {
    if (p.slots[i] < 0) continue;
    const std::int64_t page = p.slots[i] / p.page_size, place = p.slots[i] % p.page_size;
    const char* k = static_cast<const char*>(p.k) + i * p.stride_k_n;
    const char* v = static_cast<const char*>(p.v) + i * p.stride_v_n;
    char* k_pool =
        static_cast<char*>(p.k_pool) + page * p.stride_k_pool_p + place * p.stride_k_pool_t;
    char* v_pool =
        static_cast<char*>(p.v_pool) + page * p.stride_v_pool_p + place * p.stride_v_pool_t;
    for (std::int64_t head = 0; head < p.num_heads; ++head) {
      std::memcpy(k_pool + head * p.stride_k_pool_h, k + head * p.stride_k_h, p.k_bytes);
      std::memcpy(v_pool + head * p.stride_v_pool_h, v + head * p.stride_v_h, p.v_bytes);
    }
  }
}

}  // namespace kvcomp::cpu
