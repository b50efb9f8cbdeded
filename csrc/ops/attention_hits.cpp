// Native entry of attention_hits: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void attention_hits(Backend backend, py::handle logits_, py::handle lse_, py::handle seq_lens_,
                    py::handle hits_, double log_threshold, std::uintptr_t stream) {
  const Boundary at{"attention_hits"};
  const TensorView logits = at.tensor("logits", logits_);
  const TensorView lse = at.tensor("lse", lse_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);
  const TensorView hits = at.tensor("hits", hits_);
  at.device(backend, {&logits, &lse, &seq_lens, &hits});
  check_logits_dtype(at, backend, logits);
  at.dtype(lse, {DType::f32});
  at.dtype(seq_lens, {DType::i32});
  at.dtype(hits, {DType::i32});
  at.last_contiguous(logits);
  at.contiguous(lse);
  at.contiguous(seq_lens);
  check_inner_contiguous(at, hits);
  Dim B{"B"}, Hq{"Hq"}, N{"N"}, U{"U"}, W{"W"};
  at.shape(logits, {B, Hq, N});
  at.shape(lse, {B, Hq});
  at.shape(seq_lens, {B});
  at.shape(hits, {B, U, W});
  if (B.size < 1) at.fail("logits", "at least one sequence", B.size);
  if (Hq.size < 1) at.fail("logits", "at least one head", Hq.size);
  if (U.size < 1 || Hq.size % U.size != 0) {
    at.fail("hits", "U a divisor of Hq=" + std::to_string(Hq.size), U.size);
  }
  check_size(at, logits, "tokens", N.size);
  check_size(at, hits, "tokens", W.size * 32);
  if (W.size * 32 < N.size) {
    at.fail("hits", "W words of 32 tokens for N=" + std::to_string(N.size), W.size);
  }

  const AttentionHitsParams params{
      .logits_dtype = at.scalar_type(logits),
      .logits = logits.data,
      .lse = lse.as<float>(),
      .seq_lens = seq_lens.as<std::int32_t>(),
      .hits = hits.as<std::uint32_t>(),
      .stride_logits_b = logits.strides[0],
      .stride_logits_h = logits.strides[1],
      .stride_hits_b = hits.strides[0],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(Hq.size),
      .num_units = static_cast<std::int32_t>(U.size),
      .num_slots = static_cast<std::int32_t>(N.size),
      .num_words = static_cast<std::int32_t>(W.size),
      .log_threshold = static_cast<float>(log_threshold),
  };
  if (readable(backend)) check_seq_lens(at, params.seq_lens, B.size, "N", N.size);
  run<cpu::attention_hits, cuda::attention_hits>(at, backend, params, logits.device, stream);
}

KVCOMP_OP(attention_hits);

}  // namespace kvcomp
