// Native entry of attend_and_select: checks, params, implementation.
#include "ops/run.h"
#include "ops/selection.h"

namespace kvcomp {

void attend_and_select(Backend backend, py::handle q_, py::handle k, py::handle v,
                       py::handle seq_lens_, py::handle page_ids, py::handle logits_,
                       py::handle out, py::handle lse_, py::handle scores_, py::handle selected_ids,
                       py::handle selected_lens, std::int64_t page_size, double scale,
                       std::int64_t num_groups, bool use_max, std::int64_t num_recent,
                       std::int64_t num_sink, py::handle partial_out, py::handle partial_lse,
                       std::int64_t split_size, py::handle arrived_, py::handle words,
                       double softcap, std::int64_t max_len, bool checked, py::handle pages,
                       std::uintptr_t stream) {
  const Boundary at{"attend_and_select"};
  TensorView logits = at.tensor("logits", logits_);  // is not optional here
  const TensorView q = at.tensor("q", q_), lse = at.tensor("lse", lse_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);
  const TensorView scores = at.tensor("scores", scores_);
  AttendAndSelectParams params;
  DecodeAttentionParams& attention = params.attention;
  attention = decode_attention_params(at, backend, q_, k, v, seq_lens_, page_ids, logits_, out,
                                      lse_, page_size, scale, partial_out, partial_lse, split_size,
                                      words, softcap, max_len, checked);
  logits.shape[2] = page_ids.is_none() ? std::int64_t{attention.num_slots}
                                       : std::int64_t{attention.num_listed} * page_size;
  params.scoring = page_scores_params(at, backend, logits, lse, seq_lens, scores, page_size,
                                      num_groups, use_max);
  params.selection =
      select_pages_params(at, backend, scores, seq_lens, at.tensor("selected_ids", selected_ids),
                          at.tensor("selected_lens", selected_lens), page_size, num_recent,
                          num_sink, page_ids, "page_ids", pages);
  if (backend == Backend::cuda) {
    const TensorView arrived = at.tensor("arrived", arrived_);
    at.device(backend, {&q, &arrived});
    at.dtype(arrived, {DType::i32});
    at.shape(arrived, {attention.batch, attention.num_heads});
    at.contiguous(arrived);
    attention.arrived = arrived.as<std::uint32_t>();
  }
  run<cpu::attend_and_select, cuda::attend_and_select>(at, backend, params, q.device, stream);
}

KVCOMP_OP(attend_and_select);

}  // namespace kvcomp
