// Native entry of select_units: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

// The units of each active row; readable tensors only.
void check_values(const Boundary& at, const SelectUnitsParams& p) {
  check_counts(at, "num_indexed", p.num_indexed, p.batch, "U", p.num_units);
  for (int b = 0; b < p.batch; ++b) {
    const int count = p.active[b] ? p.num_indexed[b] : 0;
    for (int head = 0; head < p.num_heads && count > 0; ++head) {
      const std::int32_t* starts = p.starts + b * p.stride_starts_b + head * p.stride_starts_h;
      bool good = starts[0] >= 0;
      for (int u = 0; u < count; ++u) good &= starts[u] <= starts[u + 1];
      if (good) continue;
      int u = 0;
      while (starts[u] >= (u ? starts[u - 1] : 0)) ++u;
      at.fail("starts", "ascending from 0 on",
              std::to_string(starts[u]) + in_head(b, head) + ", unit " + std::to_string(u));
    }
  }
}

}  // namespace

void select_units(Backend backend, py::handle scores_, py::handle starts_, py::handle num_indexed_,
                  py::handle active_, py::handle rows_, std::int64_t budget,
                  std::uintptr_t stream) {
  const Boundary at{"select_units"};
  const TensorView scores = at.tensor("scores", scores_), starts = at.tensor("starts", starts_);
  const TensorView num_indexed = at.tensor("num_indexed", num_indexed_);
  const TensorView active = at.tensor("active", active_), rows = at.tensor("rows", rows_);
  at.device(backend, {&scores, &starts, &num_indexed, &active, &rows});
  at.dtype(scores, {DType::f32});
  at.dtype(starts, {DType::i32});
  at.dtype(rows, {DType::i32});
  at.last_contiguous(scores);
  at.last_contiguous(starts);
  at.contiguous(rows);
  Dim B{"B"}, H{"H"}, U{"U"};
  at.shape(scores, {B, H, U});
  at.shape(starts, {B, H, U.size + 1});
  check_per_row(at, num_indexed, B);
  check_per_row(at, active, B);
  if (B.size < 1) at.fail("scores", "at least one sequence", B.size);
  if (H.size < 1) at.fail("scores", "at least one head", H.size);
  check_size(at, scores, "units", U.size);
  if (budget < 1) at.fail("budget", "at least 1", budget);
  at.shape(rows, {B, H, budget});
  check_size(at, rows, "tokens", budget);

  const SelectUnitsParams params{
      .scores = scores.as<float>(),
      .starts = starts.as<std::int32_t>(),
      .num_indexed = num_indexed.as<std::int32_t>(),
      .active = active.as<std::int32_t>(),
      .rows = rows.as<std::int32_t>(),
      .stride_scores_b = scores.strides[0],
      .stride_scores_h = scores.strides[1],
      .stride_starts_b = starts.strides[0],
      .stride_starts_h = starts.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(H.size),
      .num_units = static_cast<std::int32_t>(U.size),
      .budget = static_cast<std::int32_t>(budget),
  };
  if (readable(backend)) check_values(at, params);
  run<cpu::select_units, cuda::select_units>(at, backend, params, scores.device, stream);
}

KVCOMP_OP(select_units);

}  // namespace kvcomp
