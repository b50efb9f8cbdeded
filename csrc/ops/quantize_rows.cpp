// Native entry of quantize_rows: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void quantize_rows(Backend backend, py::handle k_, py::handle v_, py::handle k_codes_,
                   py::handle v_codes_, py::handle words_, bool turn, std::uintptr_t stream) {
  const Boundary at{"quantize_rows"};
  const TensorView k = at.tensor("k", k_), v = at.tensor("v", v_);
  const TensorView k_codes = at.tensor("k_codes", k_codes_);
  const TensorView v_codes = at.tensor("v_codes", v_codes_);
  const TensorView words = at.tensor("words", words_);
  at.device(backend, {&k, &v, &k_codes, &v_codes, &words});
  at.dtype(k, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(v, k);
  at.dtype(k_codes, {DType::i8});
  at.dtype(v_codes, {DType::i8});
  at.dtype(words, {DType::i32});
  Dim B{"B"}, H{"H"}, T{"T"}, D{"D"};
  for (const TensorView* view : {&k, &v, &k_codes, &v_codes}) {
    at.last_contiguous(*view);
    at.shape(*view, {B, H, T, D});
  }
  at.last_contiguous(words);
  at.shape(words, {B, H, T});
  check_row_dim(at, "k", D.size, kMostTurned);
  if (turn) check_turn(at, "turn", D.size);
  check_size(at, k, "tokens", T.size);
  const QuantizeRowsParams params{
      .dtype = at.scalar_type(k),
      .k = k.data,
      .v = v.data,
      .k_codes = k_codes.as<std::int8_t>(),
      .v_codes = v_codes.as<std::int8_t>(),
      .words = words.as<std::uint32_t>(),
      .stride_k_b = k.strides[0],
      .stride_k_h = k.strides[1],
      .stride_k_t = k.strides[2],
      .stride_v_b = v.strides[0],
      .stride_v_h = v.strides[1],
      .stride_v_t = v.strides[2],
      .stride_k_codes_b = k_codes.strides[0],
      .stride_k_codes_h = k_codes.strides[1],
      .stride_k_codes_t = k_codes.strides[2],
      .stride_v_codes_b = v_codes.strides[0],
      .stride_v_codes_h = v_codes.strides[1],
      .stride_v_codes_t = v_codes.strides[2],
      .stride_words_b = words.strides[0],
      .stride_words_h = words.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(H.size),
      .num_tokens = static_cast<std::int32_t>(T.size),
      .head_dim = static_cast<std::int32_t>(D.size),
      .turn = turn,
  };
  run<cpu::quantize_rows, cuda::quantize_rows>(at, backend, params, k.device, stream);
}

KVCOMP_OP(quantize_rows);

}  // namespace kvcomp
