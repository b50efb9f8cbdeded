// Native entry of select_victims: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

// The lengths of each row allow what is asked; readable tensors only.
void check_lens(const Boundary& at, const SelectVictimsParams& p) {
  check_seq_lens(at, p.seq_lens, p.batch, "N", p.num_slots);
  for (int b = 0; b < p.batch; ++b) {
    const std::int64_t kept = p.kept_lens[b], lost = p.seq_lens[b] - kept;
    const std::string in_row = " in row " + std::to_string(b);
    if (kept < 0) at.fail("kept_lens", "at least 0", std::to_string(kept) + in_row);
    if (lost > p.num_victims) {
      at.fail("num_victims", "room for the " + std::to_string(lost) + " victims" + in_row,
              p.num_victims);
    }
    if (lost > 0 && p.num_recent > kept) {
      at.fail("num_recent", "at most kept_lens=" + std::to_string(kept) + in_row, p.num_recent);
    }
  }
}

}  // namespace

void select_victims(Backend backend, py::handle scores_, py::handle positions_,
                    py::handle seq_lens_, py::handle kept_lens_, py::handle victims_,
                    std::int64_t num_victims, std::int64_t num_recent, std::uintptr_t stream) {
  const Boundary at{"select_victims"};
  const TensorView scores = at.tensor("scores", scores_);
  const TensorView positions = at.tensor("positions", positions_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);
  const TensorView kept_lens = at.tensor("kept_lens", kept_lens_);
  const TensorView victims = at.tensor("victims", victims_);
  at.device(backend, {&scores, &positions, &seq_lens, &kept_lens, &victims});
  at.dtype(scores, {DType::f32});
  at.dtype(positions, {DType::i32});
  at.dtype(seq_lens, {DType::i32});
  at.dtype(kept_lens, {DType::i32});
  at.dtype(victims, {DType::i32});
  at.last_contiguous(scores);
  at.last_contiguous(positions);
  at.contiguous(seq_lens);
  at.contiguous(kept_lens);
  at.contiguous(victims);
  Dim B{"B"}, U{"U"}, N{"N"};
  at.shape(scores, {B, U, N});
  at.shape(positions, {B, U, N});
  at.shape(seq_lens, {B});
  at.shape(kept_lens, {B});
  if (B.size < 1) at.fail("scores", "at least one sequence", B.size);
  if (U.size < 1) at.fail("scores", "at least one unit", U.size);
  check_size(at, scores, "tokens", N.size);
  if (num_victims < 0) at.fail("num_victims", "at least 0", num_victims);
  at.shape(victims, {B, U, num_victims});
  check_size(at, victims, "victims", num_victims);
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  if (num_recent < 0 || num_recent > kMax) {
    at.fail("num_recent", "from 0 to " + std::to_string(kMax), num_recent);
  }

  const SelectVictimsParams params{
      .scores = scores.as<float>(),
      .positions = positions.as<std::int32_t>(),
      .seq_lens = seq_lens.as<std::int32_t>(),
      .kept_lens = kept_lens.as<std::int32_t>(),
      .victims = victims.as<std::int32_t>(),
      .stride_scores_b = scores.strides[0],
      .stride_scores_u = scores.strides[1],
      .stride_positions_b = positions.strides[0],
      .stride_positions_u = positions.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_units = static_cast<std::int32_t>(U.size),
      .num_slots = static_cast<std::int32_t>(N.size),
      .num_victims = static_cast<std::int32_t>(num_victims),
      .num_recent = static_cast<std::int32_t>(num_recent),
  };
  if (readable(backend)) check_lens(at, params);
  run<cpu::select_victims, cuda::select_victims>(at, backend, params, scores.device, stream);
}

KVCOMP_OP(select_victims);

}  // namespace kvcomp
