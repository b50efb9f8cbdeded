// Native entry of append_attention: checks, params, implementation.
#include "ops/attention.h"
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

// The new tokens are there, and in listed pages; readable tensors only.
void check_new_tokens(const Boundary& at, const AppendAttentionParams& params) {
  const DecodeAttentionParams& p = params.attention;
  if (params.q_lens) {
    check_counts(at, "q_lens", params.q_lens, p.batch, "m", params.num_queries);
  }
  for (int b = 0; b < p.batch; ++b) {
    const int count = params.q_lens ? params.q_lens[b] : params.num_queries;
    const int length = p.seq_lens[b], first = length - count;
    if (first < 0) {
      at.fail("seq_lens", "at least the " + std::to_string(count) + " new tokens",
              std::to_string(length) + " in row " + std::to_string(b));
    }
    if (!p.page_ids || count == 0) continue;
    for (int head = 0; head < (p.stride_ids_h == 0 ? 1 : p.num_kv_heads); ++head) {
      const std::int32_t* ids = p.page_ids + b * p.stride_ids_b + head * p.stride_ids_h;
      for (int page = first / p.page_size; page <= (length - 1) / p.page_size; ++page) {
        if (ids[page] < 0) at.fail("page_ids", "the pages of new tokens", "-1" + in_head(b, head));
      }
    }
  }
}

}  // namespace

void append_attention(Backend backend, py::handle q_, py::handle k, py::handle v,
                      py::handle seq_lens, py::handle q_lens_, py::handle tail_,
                      py::handle page_ids, py::handle logits, py::handle out, py::handle lse,
                      std::int64_t page_size, double scale, py::handle partial_out,
                      py::handle partial_lse, std::int64_t split_size, py::handle words,
                      double softcap, std::int64_t max_len, bool checked, std::uintptr_t stream) {
  const Boundary at{"append_attention"};
  AppendAttentionParams params =
      attention_params(at, backend, Queries::several,
                       {q_, k, v, seq_lens, page_ids, logits, out, lse, page_size, scale,
                        partial_out, partial_lse, split_size, words, softcap, max_len, checked});
  const TensorView q = at.tensor("q", q_);
  Dim B{"B", params.attention.batch}, m{"m", params.num_queries};
  if (const auto q_lens = at.optional("q_lens", q_lens_)) {
    at.device(backend, {&q, &*q_lens});
    check_per_row(at, *q_lens, B);
    params.q_lens = q_lens->as<std::int32_t>();
  }
  if (const auto tail = at.optional("tail", tail_)) {
    at.device(backend, {&q, &*tail});
    at.dtype(*tail, {DType::i64});
    at.last_contiguous(*tail);
    at.shape(*tail, {B, m});
    params.tail = tail->as<std::int64_t>();
    params.stride_tail_b = tail->strides[0];
  }
  if (readable(backend) && !checked) check_new_tokens(at, params);
  run<cpu::append_attention, cuda::append_attention>(at, backend, params, q.device, stream);
}

KVCOMP_OP(append_attention);

}  // namespace kvcomp
