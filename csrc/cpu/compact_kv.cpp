// The holes that victims leave are filled with the last surviving tokens, row copies in place. One
// task moves one head's tokens. Bytes: the moved rows of K and V, read and written once.
#include <cstring>

#include "kernels.h"
#include "moves.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

void compact_head(const CompactKvParams& p, int batch, int head) {
  const int unit = p.num_units == 1 ? 0 : head;
  const std::int32_t* victims =
      p.victims + (std::int64_t{batch} * p.num_units + unit) * p.num_victims;
  const std::int32_t* end = victims + p.num_victims;
  while (end > victims && end[-1] < 0) --end;
  const int length = p.seq_lens[batch];
  char* k = static_cast<char*>(p.k) + batch * p.stride_k_b + head * p.stride_k_h;
  char* v = static_cast<char*>(p.v) + batch * p.stride_v_b + head * p.stride_v_h;
  for_each_move(victims, end, length, [&](std::int64_t hole, std::int64_t survivor) {
    std::memcpy(k + hole * p.stride_k_t, k + survivor * p.stride_k_t, p.k_bytes);
    std::memcpy(v + hole * p.stride_v_t, v + survivor * p.stride_v_t, p.v_bytes);
  });
  for (int i = 0; i < p.num_state; ++i) {
    if (head >= p.state_units[i]) continue;  // what heads share moves with the first one
    char* row =
        static_cast<char*>(p.state[i]) + batch * p.stride_state_b[i] + head * p.stride_state_u[i];
    auto* state = reinterpret_cast<std::int32_t*>(row);
    for_each_move(victims, end, length,
                  [state](int hole, int survivor) { state[hole] = state[survivor]; });
  }
}

}  // namespace

void compact_kv(const CompactKvParams& p) {
  constexpr std::int64_t kGrain = 1 << 17;  // bytes that are worth a thread
  const int num_heads = p.batch * p.num_heads;
  const std::int64_t work = std::int64_t{num_heads} * p.num_victims * (p.k_bytes + p.v_bytes);
  const int threads = std::min(num_heads, num_threads(work, kGrain));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int head = 0; head < num_heads; ++head) {
    compact_head(p, head / p.num_heads, head % p.num_heads);
  }
}

}  // namespace kvcomp::cpu
