// Native entry of linear_rows: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void linear_rows(Backend backend, py::handle x_, py::handle weight_, py::handle bias_,
                 py::handle out_, std::uintptr_t) {
  const Boundary at{"linear_rows"};
  const TensorView x = at.tensor("x", x_), weight = at.tensor("weight", weight_);
  const std::optional<TensorView> bias = at.optional("bias", bias_);
  at.device(backend, {&x, &weight});
  at.dtype(x, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(weight, x);
  at.last_contiguous(x);
  at.last_contiguous(weight);
  Dim O{"out"}, I{"in"};
  at.shape(weight, {O, I});
  if (x.ndim < 1) at.fail("x", "shape [..., in]", "a number");
  const std::int64_t width = x.shape[x.ndim - 1];
  if (width != I.size) at.fail("x", "in=" + std::to_string(I.size) + " elements a row", width);
  check_size(at, weight, "elements a row", I.size);
  if (bias) {
    at.device(backend, {&x, &*bias});
    at.same_dtype(*bias, x);
    at.contiguous(*bias);
    at.shape(*bias, {O});
  }
  std::int64_t num_rows = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) num_rows *= x.shape[i];
  if (num_rows > LinearRowsParams::kMaxRows) {
    at.fail("x", "at most " + std::to_string(LinearRowsParams::kMaxRows) + " rows", num_rows);
  }

  const TensorView out = at.tensor("out", out_);
  at.device(backend, {&x, &out});
  at.same_dtype(out, x);
  at.contiguous(out);
  std::int64_t elements = 1;
  for (int i = 0; i < out.ndim; ++i) elements *= out.shape[i];
  if (elements != num_rows * O.size) {
    at.fail("out", std::to_string(num_rows * O.size) + " elements", elements);
  }
  LinearRowsParams params{
      .dtype = at.scalar_type(x),
      .x = {},
      .weight = weight.data,
      .bias = bias ? bias->data : nullptr,
      .out = out.data,
      .stride_weight = weight.strides[0],
      .num_outputs = O.size,
      .num_rows = static_cast<std::int32_t>(num_rows),
      .width = static_cast<std::int32_t>(width),
  };
  const int size = x.dtype == DType::f32 ? 4 : 2;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    std::int64_t offset = 0, rest = row;
    for (int i = x.ndim - 2; i >= 0; rest /= x.shape[i--]) {
      offset += rest % x.shape[i] * x.strides[i];
    }
    params.x[row] = x.as<char>() + offset * size;
  }
  run<cpu::linear_rows>(at, backend, params);
}

KVCOMP_OP(linear_rows);

}  // namespace kvcomp
