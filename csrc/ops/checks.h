// Checks that several ops make.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "tensor.h"

namespace kvcomp {

inline void check_head_dim(const Boundary& at, const char* argument, std::int64_t head_dim) {
  constexpr std::int64_t kSupported[] = {32, 64, 80, 96, 128, 256};
  if (std::ranges::find(kSupported, head_dim) != std::end(kSupported)) return;
  at.fail(argument, "a head size of 32, 64, 80, 96, 128 or 256", head_dim);
}

// Reads the tensor, so only on the CPU. `limit_name` is what the largest value is called: "T".
inline void check_seq_lens(const Boundary& at, const std::int32_t* seq_lens, std::int64_t batch,
                           const char* limit_name, std::int64_t limit) {
  for (std::int64_t b = 0; b < batch; ++b) {
    if (seq_lens[b] >= 0 && seq_lens[b] <= limit) continue;
    at.fail("seq_lens",
            std::string("values in [0, ") + limit_name + "=" + std::to_string(limit) + "]",
            std::to_string(seq_lens[b]) + " in row " + std::to_string(b));
  }
}

}  // namespace kvcomp
