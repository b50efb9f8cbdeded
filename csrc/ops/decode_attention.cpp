// Native entry of decode_attention: checks, params, implementation.
#include "ops/attention.h"
#include "ops/checks.h"
#include "ops/run.h"
#include "ops/selection.h"

namespace kvcomp {

DecodeAttentionParams decode_attention_params(
    const Boundary& at, Backend backend, py::handle q, py::handle k, py::handle v,
    py::handle seq_lens, py::handle page_ids, py::handle logits, py::handle out, py::handle lse,
    std::int64_t page_size, double scale, py::handle partial_out, py::handle partial_lse,
    std::int64_t split_size, py::handle words, double softcap, std::int64_t max_len, bool checked) {
  return attention_params(at, backend, Queries::one,
                          {q, k, v, seq_lens, page_ids, logits, out, lse, page_size, scale,
                           partial_out, partial_lse, split_size, words, softcap, max_len, checked})
      .attention;
}

void decode_attention(Backend backend, py::handle q, py::handle k, py::handle v,
                      py::handle seq_lens, py::handle page_ids, py::handle logits, py::handle out,
                      py::handle lse, std::int64_t page_size, double scale, py::handle partial_out,
                      py::handle partial_lse, std::int64_t split_size, py::handle words,
                      double softcap, std::int64_t max_len, bool checked, std::uintptr_t stream) {
  const Boundary at{"decode_attention"};
  const DecodeAttentionParams params = decode_attention_params(
      at, backend, q, k, v, seq_lens, page_ids, logits, out, lse, page_size, scale, partial_out,
      partial_lse, split_size, words, softcap, max_len, checked);
  run<cpu::decode_attention, cuda::decode_attention>(at, backend, params, at.tensor("q", q).device,
                                                     stream);
}

// How many blocks of the kernel for k's dtype and both head sizes a multiprocessor of its GPU
// takes.
int decode_attention_blocks(py::handle k_, py::handle v_) {
  const Boundary at{"decode_attention"};
  const TensorView k = at.tensor("k", k_), v = at.tensor("v", v_);
  at.device(Backend::cuda, {&k, &v});
  const std::int64_t head_dim = k.shape[k.ndim - 1], value_dim = v.shape[v.ndim - 1];
  check_head_dims(at, head_dim, value_dim);
  if constexpr (kWithCuda) {
    const ScalarType dtype = k.dtype == DType::i8 ? ScalarType::i8 : at.scalar_type(k);
    return cuda::decode_attention_blocks(dtype, static_cast<int>(head_dim),
                                         static_cast<int>(value_dim), k.device.index);
  }
  return 0;
}

KVCOMP_OP(decode_attention);
KVCOMP_OP(decode_attention_blocks);

}  // namespace kvcomp
