// Native entry of rotate_rows: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

RotatedRows rows(const TensorView& from, const TensorView& into) {
  return {
      .x = from.data,
      .out = into.data,
      .stride_x_b = from.strides[0],
      .stride_x_h = from.strides[1],
      .stride_x_t = from.strides[2],
      .stride_out_b = into.strides[0],
      .stride_out_h = into.strides[1],
      .stride_out_t = into.strides[2],
      .num_heads = static_cast<std::int32_t>(from.shape[1]),
  };
}

}  // namespace

void rotate_rows(Backend backend, py::handle q_, py::handle k_, py::handle cos_, py::handle sin_,
                 py::handle out_q_, py::handle out_k_, std::uintptr_t) {
  const Boundary at{"rotate_rows"};
  const TensorView q = at.tensor("q", q_), k = at.tensor("k", k_);
  const TensorView cos = at.tensor("cos", cos_), sin = at.tensor("sin", sin_);
  const TensorView out_q = at.tensor("out_q", out_q_), out_k = at.tensor("out_k", out_k_);
  at.device(backend, {&q, &k, &cos, &sin, &out_q, &out_k});
  at.dtype(q, {DType::f32, DType::f16, DType::bf16});
  for (const TensorView* view : {&k, &cos, &sin, &out_q, &out_k}) at.same_dtype(*view, q);
  Dim B{"B"}, Hq{"Hq"}, Hkv{"Hkv"}, n{"n"}, D{"D"};
  at.shape(q, {B, Hq, n, D});
  at.shape(k, {B, Hkv, n, D});
  at.shape(cos, {kAny, n, D});
  Dim angles{"B of cos", cos.shape[0]};
  if (angles.size != 1 && angles.size != B.size) {
    at.fail("cos", "1 or B=" + std::to_string(B.size) + " sequences", angles.size);
  }
  at.shape(sin, {angles, n, D});
  at.shape(out_q, {B, Hq, n, D});
  at.shape(out_k, {B, Hkv, n, D});
  for (const TensorView* view : {&q, &k, &cos, &sin, &out_q, &out_k}) at.last_contiguous(*view);
  check_row_dim(at, "q", D.size);
  check_size(at, q, "sequences", B.size);
  check_size(at, q, "tokens", n.size);
  check_size(at, q, "heads", Hq.size);
  check_size(at, k, "heads", Hkv.size);
  const bool shared = angles.size == 1;
  const RotateRowsParams params{
      .dtype = at.scalar_type(q),
      .rows = {rows(q, out_q), rows(k, out_k)},
      .cos = cos.data,
      .sin = sin.data,
      .stride_cos_b = shared ? 0 : cos.strides[0],
      .stride_cos_t = cos.strides[1],
      .stride_sin_b = shared ? 0 : sin.strides[0],
      .stride_sin_t = sin.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_tokens = static_cast<std::int32_t>(n.size),
      .head_dim = static_cast<std::int32_t>(D.size),
  };
  run<cpu::rotate_rows>(at, backend, params);
}

KVCOMP_OP(rotate_rows);

}  // namespace kvcomp
