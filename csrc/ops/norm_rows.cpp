// Native entry of norm_rows: checks, params, implementation.
#include <cmath>

#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void norm_rows(Backend backend, py::handle x_, py::handle weight_, py::handle out_, double eps,
               std::uintptr_t) {
  const Boundary at{"norm_rows"};
  const TensorView x = at.tensor("x", x_), weight = at.tensor("weight", weight_);
  const TensorView out = at.tensor("out", out_);
  at.device(backend, {&x, &weight, &out});
  at.dtype(x, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(weight, x);
  at.same_dtype(out, x);
  for (const TensorView* view : {&x, &weight, &out}) at.contiguous(*view);
  Dim D{"D"};
  at.shape(weight, {D});
  if (x.ndim < 1) at.fail("x", "shape [..., D]", "a number");
  const std::int64_t width = x.shape[x.ndim - 1];
  if (width != D.size) at.fail("x", "D=" + std::to_string(D.size) + " elements a row", width);
  if (D.size < 1) at.fail("weight", "at least one element", D.size);
  check_size(at, weight, "elements a row", D.size);
  if (!(eps >= 0.0 && std::isfinite(eps))) {
    at.fail("eps", "a finite number of at least 0", std::to_string(eps));
  }
  std::int64_t num_rows = 1, elements = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) num_rows *= x.shape[i];
  for (int i = 0; i < out.ndim; ++i) elements *= out.shape[i];
  if (elements != num_rows * width) {
    at.fail("out", std::to_string(num_rows * width) + " elements", elements);
  }
  const NormRowsParams params{
      .dtype = at.scalar_type(x),
      .x = x.data,
      .weight = weight.data,
      .out = out.data,
      .num_rows = num_rows,
      .width = static_cast<std::int32_t>(width),
      .eps = static_cast<float>(eps),
  };
  run<cpu::norm_rows>(at, backend, params);
}

KVCOMP_OP(norm_rows);

}  // namespace kvcomp
