// Checks that several ops make.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <string>

#include "kvcomp/head_sizes.h"
#include "tensor.h"

namespace kvcomp {

inline void check_head_dim(const Boundary& at, const char* argument, std::int64_t head_dim) {
  if (std::ranges::find(kHeadSizes, head_dim) != std::end(kHeadSizes)) return;
  std::string sizes;
  for (const int size : kHeadSizes) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  at.fail(argument, "a head size of " + sizes, head_dim);
}

// Columns of q and k, and of v.
inline void check_head_dims(const Boundary& at, std::int64_t head_dim, std::int64_t value_dim) {
  const bool unlike = std::ranges::any_of(kUnlikeSizes, [=](const UnlikeSizes& sizes) {
    return sizes.key == head_dim && sizes.value == value_dim;
  });
  if (unlike) return;
  check_head_dim(at, "q", head_dim);
  if (value_dim != head_dim) at.fail("v", std::to_string(head_dim) + " columns, as k", value_dim);
}

// What the loops of cpu/simd/rows.h take.
inline void check_row_dim(const Boundary& at, const char* argument, std::int64_t head_dim,
                          std::int64_t most = 1024) {
  if (head_dim >= 16 && head_dim <= most && head_dim % 16 == 0) return;
  at.fail(argument, "a head size that is a multiple of 16, at most " + std::to_string(most),
          head_dim);
}

// V of rows that are moved: of any size that K may have, or of none; codes are alike.
inline void check_moved(const Boundary& at, bool coded, std::int64_t head_dim,
                        std::int64_t value_dim) {
  if (value_dim == head_dim) return;
  if (coded) at.fail("v", "as many columns as k, in eight bits", value_dim);
  if (value_dim) check_row_dim(at, "v", value_dim);
}

inline constexpr std::int64_t kMostTurned = 512;   // columns of a row that is made into codes
inline constexpr std::int64_t kMostLatent = 1024;  // columns of a row that all heads share

// One int32 per sequence.
inline void check_per_row(const Boundary& at, const TensorView& view, Dim& batch) {
  at.dtype(view, {DType::i32});
  at.contiguous(view);
  at.shape(view, {batch});
}

// Whether the values in tensors can be looked at: on the CPU, by what computes there.
inline bool readable(Backend backend) {
  return backend == Backend::cpu || (kEmulated && backend == Backend::cuda);
}

// What logits may be stored in: half the bytes are worth having where they cross a GPU's memory.
inline void check_logits_dtype(const Boundary& at, Backend backend, const TensorView& logits) {
  if (backend == Backend::cpu) return at.dtype(logits, {DType::f32});
  at.dtype(logits, {DType::f32, DType::f16});
}

// The last two dimensions without gaps; those before have any strides.
inline void check_inner_contiguous(const Boundary& at, const TensorView& view) {
  at.last_contiguous(view);
  const int last = view.ndim - 1;
  if (last < 1 || view.shape[last - 1] <= 1 || view.strides[last - 1] == view.shape[last] ||
      view.shape[last] == 0) {
    return;
  }
  at.fail(view.name, "the last two dimensions contiguous",
          "a stride of " + std::to_string(view.strides[last - 1]) + " between rows of " +
              std::to_string(view.shape[last]));
}

// Turned by a Hadamard matrix: where there is one.
inline void check_turn(const Boundary& at, const char* argument, std::int64_t head_dim) {
  if (std::has_single_bit(static_cast<std::uint64_t>(head_dim))) return;
  at.fail(argument, "False where the head size is no power of two", head_dim);
}

// The scales of codes k: [B, H, T] int32.
inline void check_words(const Boundary& at, Backend backend, const TensorView& words,
                        const TensorView& k, std::initializer_list<Size> shape) {
  at.device(backend, {&k, &words});
  at.dtype(words, {DType::i32});
  at.last_contiguous(words);
  at.shape(words, shape);
}

// Sizes that int32 arithmetic in the kernels stands.
inline void check_size(const Boundary& at, const TensorView& view, const char* what,
                       std::int64_t size) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max() / 2;
  if (size > kMax) at.fail(view.name, "at most " + std::to_string(kMax) + " " + what, size);
}

inline std::string in_head(int row, int head) {
  std::string text = " in row ";
  text += std::to_string(row);
  text += ", head ";
  return text += std::to_string(head);
}

// A count per row within [0, limit]. Reads the tensor, so only on the CPU. `limit_name` is what the
// largest value is called: "T".
inline void check_counts(const Boundary& at, const char* argument, const std::int32_t* counts,
                         std::int64_t batch, const char* limit_name, std::int64_t limit) {
  for (std::int64_t b = 0; b < batch; ++b) {
    if (counts[b] >= 0 && counts[b] <= limit) continue;
    at.fail(argument,
            std::string("values in [0, ") + limit_name + "=" + std::to_string(limit) + "]",
            std::to_string(counts[b]) + " in row " + std::to_string(b));
  }
}

inline void check_seq_lens(const Boundary& at, const std::int32_t* seq_lens, std::int64_t batch,
                           const char* limit_name, std::int64_t limit) {
  check_counts(at, "seq_lens", seq_lens, batch, limit_name, limit);
}

}  // namespace kvcomp
