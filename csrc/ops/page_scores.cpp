// Native entry of page_scores: checks, params, implementation.
#include <algorithm>
#include <limits>

#include "ops/checks.h"
#include "ops/run.h"
#include "ops/selection.h"

namespace kvcomp {

PageScoresParams page_scores_params(const Boundary& at, Backend backend, const TensorView& logits,
                                    const TensorView& lse, const TensorView& seq_lens,
                                    const TensorView& out, std::int64_t page_size,
                                    std::int64_t num_groups, bool use_max) {
  at.device(backend, {&logits, &lse, &seq_lens, &out});
  check_logits_dtype(at, backend, logits);
  at.dtype(lse, {DType::f32});
  at.dtype(seq_lens, {DType::i32});
  at.dtype(out, {DType::f32});
  at.last_contiguous(logits);
  at.contiguous(lse);
  at.contiguous(seq_lens);
  at.contiguous(out);
  Dim B{"B"}, Hq{"Hq"}, N{"N"};
  at.shape(logits, {B, Hq, N});
  at.shape(lse, {B, Hq});
  at.shape(seq_lens, {B});
  if (B.size < 1) at.fail("logits", "at least one sequence", B.size);
  if (Hq.size < 1) at.fail("logits", "at least one head", Hq.size);
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max() / 2;
  if (N.size > kMax) at.fail("logits", "at most " + std::to_string(kMax) + " tokens", N.size);
  if (page_size < 1) at.fail("page_size", "at least 1", page_size);
  if (num_groups < 1 || Hq.size % num_groups != 0) {
    at.fail("num_groups", "a divisor of Hq=" + std::to_string(Hq.size), num_groups);
  }
  page_size = std::min(page_size, std::max<std::int64_t>(N.size, 1));  // one page is one page
  const std::int64_t num_pages = (N.size + page_size - 1) / page_size;
  at.shape(out, {B, num_groups, num_pages});

  if (readable(backend)) {
    check_seq_lens(at, seq_lens.as<std::int32_t>(), B.size, "N", N.size);
  }
  return PageScoresParams{
      .logits_dtype = at.scalar_type(logits),
      .logits = logits.data,
      .lse = lse.as<float>(),
      .seq_lens = seq_lens.as<std::int32_t>(),
      .scores = out.as<float>(),
      .stride_logits_b = logits.strides[0],
      .stride_logits_h = logits.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(Hq.size),
      .num_groups = static_cast<std::int32_t>(num_groups),
      .num_slots = static_cast<std::int32_t>(N.size),
      .num_pages = static_cast<std::int32_t>(num_pages),
      .page_size = static_cast<std::int32_t>(page_size),
      .use_max = use_max,
  };
}

void page_scores(Backend backend, py::handle logits_, py::handle lse, py::handle seq_lens,
                 py::handle out, std::int64_t page_size, std::int64_t num_groups, bool use_max,
                 std::uintptr_t stream) {
  const Boundary at{"page_scores"};
  const TensorView logits = at.tensor("logits", logits_);
  const PageScoresParams params = page_scores_params(
      at, backend, logits, at.tensor("lse", lse), at.tensor("seq_lens", seq_lens),
      at.tensor("out", out), page_size, num_groups, use_max);
  run<cpu::page_scores, cuda::page_scores>(at, backend, params, logits.device, stream);
}

KVCOMP_OP(page_scores);

}  // namespace kvcomp
