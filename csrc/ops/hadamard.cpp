// Native entry of hadamard: checks, params, implementation.
#include <bit>

#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void hadamard(Backend backend, py::handle x_, py::handle out_, std::uintptr_t stream) {
  const Boundary at{"hadamard"};
  const TensorView x = at.tensor("x", x_), out = at.tensor("out", out_);
  at.device(backend, {&x, &out});
  at.dtype(x, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(out, x);
  if (x.ndim < 1) at.fail("x", "at least one dimension", x.ndim);
  at.contiguous(x);
  at.contiguous(out);
  const std::int64_t head_dim = x.shape[x.ndim - 1];
  check_row_dim(at, "x", head_dim, kMostTurned);
  if (!std::has_single_bit(static_cast<std::uint64_t>(head_dim))) {
    at.fail("x", "a head size that is a power of two", head_dim);
  }
  std::int64_t num_rows = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) num_rows *= x.shape[i];
  const HadamardParams params{
      .dtype = at.scalar_type(x),
      .x = x.data,
      .out = out.data,
      .num_rows = num_rows,
      .head_dim = static_cast<std::int32_t>(head_dim),
  };
  run<cpu::hadamard, cuda::hadamard>(at, backend, params, x.device, stream);
}

KVCOMP_OP(hadamard);

}  // namespace kvcomp
