// Native entry of merge_states: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void merge_states(Backend backend, py::handle out_a_, py::handle lse_a_, py::handle out_b_,
                  py::handle lse_b_, py::handle out_, py::handle lse_, std::uintptr_t) {
  const Boundary at{"merge_states"};
  const TensorView out_a = at.tensor("out_a", out_a_), lse_a = at.tensor("lse_a", lse_a_);
  const TensorView out_b = at.tensor("out_b", out_b_), lse_b = at.tensor("lse_b", lse_b_);
  at.device(backend, {&out_a, &lse_a, &out_b, &lse_b});
  at.dtype(out_a, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(out_b, out_a);
  at.dtype(lse_a, {DType::f32});
  at.dtype(lse_b, {DType::f32});
  Dim B{"B"}, Hq{"Hq"}, D{"D"};
  at.shape(out_a, {B, Hq, D});
  at.shape(lse_a, {B, Hq});
  at.shape(out_b, {B, Hq, D});
  at.shape(lse_b, {B, Hq});
  for (const TensorView* view : {&out_a, &lse_a, &out_b, &lse_b}) at.contiguous(*view);
  if (B.size < 1) at.fail("out_a", "at least one sequence", B.size);
  check_head_dim(at, "out_a", D.size);

  const TensorView out = at.tensor("out", out_), lse = at.tensor("lse", lse_);
  at.device(backend, {&out_a, &out, &lse});
  at.same_dtype(out, out_a);
  at.dtype(lse, {DType::f32});
  at.shape(out, {B, Hq, D});
  at.shape(lse, {B, Hq});
  at.contiguous(out);
  at.contiguous(lse);
  const MergeStatesParams params{
      .dtype = at.scalar_type(out_a),
      .out_a = out_a.data,
      .lse_a = lse_a.as<float>(),
      .out_b = out_b.data,
      .lse_b = lse_b.as<float>(),
      .out = out.data,
      .lse = lse.as<float>(),
      .num_rows = B.size * Hq.size,
      .head_dim = static_cast<std::int32_t>(D.size),
  };
  run<cpu::merge_states>(at, backend, params);
}

KVCOMP_OP(merge_states);

}  // namespace kvcomp
