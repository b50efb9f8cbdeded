// Native entry of rotate_keys: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void rotate_keys(Backend backend, py::handle k_, py::handle cos_, py::handle sin_, std::uintptr_t) {
  const Boundary at{"rotate_keys"};
  const TensorView k = at.tensor("k", k_), cos = at.tensor("cos", cos_);
  const TensorView sin = at.tensor("sin", sin_);
  at.device(backend, {&k, &cos, &sin});
  at.dtype(k, {DType::f32, DType::f16, DType::bf16});
  at.dtype(cos, {DType::f32});
  at.dtype(sin, {DType::f32});
  at.last_contiguous(k);
  at.contiguous(cos);
  at.contiguous(sin);
  Dim B{"B"}, H{"H"}, T{"T"}, D{"D"}, half{"R / 2"};
  at.shape(k, {B, H, T, D});
  at.shape(cos, {B, half});
  at.shape(sin, {B, half});
  if (B.size < 1) at.fail("k", "at least one sequence", B.size);
  if (H.size < 1) at.fail("k", "at least one head", H.size);
  check_size(at, k, "tokens", T.size);
  check_size(at, k, "elements of a head", D.size);
  if (half.size < 1 || half.size * 2 > D.size) {
    at.fail("cos", "from 1 to D / 2 = " + std::to_string(D.size / 2) + " frequencies", half.size);
  }

  const RotateKeysParams params{
      .dtype = at.scalar_type(k),
      .k = k.data,
      .cos = cos.as<float>(),
      .sin = sin.as<float>(),
      .stride_k_b = k.strides[0],
      .stride_k_h = k.strides[1],
      .stride_k_t = k.strides[2],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(H.size),
      .num_tokens = static_cast<std::int32_t>(T.size),
      .half = static_cast<std::int32_t>(half.size),
  };
  run<cpu::rotate_keys>(at, backend, params);
}

KVCOMP_OP(rotate_keys);

}  // namespace kvcomp
