// Native entry of recurrence_update: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void recurrence_update(Backend backend, py::handle hits_, py::handle last_hit_, py::handle longest_,
                       py::handle seq_lens_, py::handle born_, std::int64_t first_step,
                       std::uintptr_t stream) {
  const Boundary at{"recurrence_update"};
  const TensorView hits = at.tensor("hits", hits_);
  const TensorView last_hit = at.tensor("last_hit", last_hit_);
  const TensorView longest = at.tensor("longest", longest_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);
  const TensorView born = at.tensor("born", born_);
  at.device(backend, {&hits, &last_hit, &longest, &seq_lens, &born});
  for (const TensorView* view : {&hits, &last_hit, &longest, &seq_lens, &born}) {
    at.dtype(*view, {DType::i32});
  }
  check_inner_contiguous(at, hits);
  at.contiguous(last_hit);
  at.contiguous(longest);
  at.contiguous(seq_lens);
  at.contiguous(born);
  Dim B{"B"}, R{"R"}, U{"U"}, W{"W"}, N{"N"};
  at.shape(hits, {B, R, U, W});
  at.shape(last_hit, {B, U, N});
  at.shape(longest, {B, U, N});
  at.shape(seq_lens, {B});
  at.shape(born, {B});
  if (B.size < 1) at.fail("hits", "at least one sequence", B.size);
  if (R.size < 1 || R.size > 32) at.fail("hits", "R from 1 to 32 steps", R.size);
  if (U.size < 1) at.fail("hits", "at least one unit", U.size);
  check_size(at, last_hit, "tokens", N.size);
  check_size(at, hits, "tokens", W.size * 32);
  if (W.size * 32 < N.size) {
    at.fail("hits", "W words of 32 tokens for N=" + std::to_string(N.size), W.size);
  }
  constexpr std::int64_t kLastStep = std::numeric_limits<std::int32_t>::max() - 32;
  if (first_step < 0 || first_step > kLastStep) {
    at.fail("first_step", "a step from 0 to " + std::to_string(kLastStep), first_step);
  }

  const RecurrenceUpdateParams params{
      .hits = hits.as<std::uint32_t>(),
      .last_hit = last_hit.as<std::int32_t>(),
      .longest = longest.as<std::int32_t>(),
      .seq_lens = seq_lens.as<std::int32_t>(),
      .born = born.as<std::int32_t>(),
      .stride_hits_b = hits.strides[0],
      .stride_hits_r = hits.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_units = static_cast<std::int32_t>(U.size),
      .num_steps = static_cast<std::int32_t>(R.size),
      .num_slots = static_cast<std::int32_t>(N.size),
      .num_words = static_cast<std::int32_t>(W.size),
      .first_step = static_cast<std::int32_t>(first_step),
  };
  if (readable(backend)) {
    check_seq_lens(at, params.seq_lens, B.size, "N", N.size);
    for (int b = 0; b < params.batch; ++b) {
      if (params.born[b] >= 0) continue;
      at.fail("born", "at least 0",
              std::to_string(params.born[b]) + " in row " + std::to_string(b));
    }
  }
  run<cpu::recurrence_update, cuda::recurrence_update>(at, backend, params, hits.device, stream);
}

KVCOMP_OP(recurrence_update);

}  // namespace kvcomp
