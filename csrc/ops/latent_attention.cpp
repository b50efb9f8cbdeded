// Native entry of latent_attention: checks, params, implementation.
#include <algorithm>
#include <cmath>

#include "ops/attention.h"
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void latent_attention(Backend backend, py::handle q_, py::handle latents_, py::handle seq_lens_,
                      py::handle page_ids_, py::handle logits_, py::handle out_, py::handle lse_,
                      std::int64_t page_size, std::int64_t value_dim, double scale,
                      py::handle partial_out_, py::handle partial_lse_, std::int64_t split_size,
                      std::uintptr_t stream) {
  const Boundary at{"latent_attention"};
  const TensorView q = at.tensor("q", q_), latents = at.tensor("latents", latents_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);
  const std::optional<TensorView> page_ids = at.optional("page_ids", page_ids_);
  const std::optional<TensorView> logits = at.optional("logits", logits_);
  const TensorView out = at.tensor("out", out_), lse = at.tensor("lse", lse_);
  at.device(backend, {&q, &latents, &seq_lens, page_ids ? &*page_ids : &q, logits ? &*logits : &q,
                      &out, &lse});
  at.dtype(q, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(latents, q);
  at.dtype(seq_lens, {DType::i32});
  for (const TensorView* view : {&q, &latents, &seq_lens}) at.last_contiguous(*view);

  Dim B{"B"}, Hq{"Hq"}, T{"T"}, D{"D"}, K{"K"};
  at.shape(q, {B, Hq, D});
  at.shape(latents, {B, T, D});
  at.shape(seq_lens, {B});
  if (B.size < 1) at.fail("q", "at least one sequence", B.size);
  if (Hq.size < 1) at.fail("q", "at least one head", Hq.size);
  check_row_dim(at, "q", D.size, kMostLatent);
  check_row_dim(at, "value_dim", value_dim, D.size);
  if (page_size < 1) at.fail("page_size", "at least 1", page_size);
  if (!std::isfinite(static_cast<float>(scale))) {
    at.fail("scale", "a finite number of 32 bits", std::to_string(scale));
  }
  std::int64_t positions = T.size;
  if (page_ids) {
    at.dtype(*page_ids, {DType::i32});
    at.last_contiguous(*page_ids);
    at.shape(*page_ids, {B, 1, K});
    if (K.size > 0 && page_size > kMaxTokens / K.size) {
      at.fail("page_size", "K * page_size within " + std::to_string(kMaxTokens), page_size);
    }
    positions = K.size * page_size;
  }
  if (positions > kMaxTokens || T.size > kMaxTokens) {
    at.fail("latents", "at most " + std::to_string(kMaxTokens) + " tokens",
            std::max(positions, T.size));
  }
  if (logits) {
    check_logits_dtype(at, backend, *logits);
    at.last_contiguous(*logits);
    at.shape(*logits, {B, Hq, kAny});
    if (const std::int64_t room = logits->shape[2]; room < positions) {
      at.fail("logits", "room for " + std::to_string(positions) + " tokens", room);
    }
  }
  at.same_dtype(out, q);
  at.dtype(lse, {DType::f32});
  at.shape(out, {B, Hq, value_dim});
  at.shape(lse, {B, Hq});
  at.contiguous(out);
  at.contiguous(lse);
  const std::optional<TensorView> partial_out = at.optional("partial_out", partial_out_);
  const std::optional<TensorView> partial_lse = at.optional("partial_lse", partial_lse_);
  Dim S{"S"};
  S.size = 1;
  if (partial_out && partial_lse) {
    S.size = -1;
    at.device(backend, {&q, &*partial_out, &*partial_lse});
    at.dtype(*partial_out, {DType::f32});
    at.dtype(*partial_lse, {DType::f32});
    at.shape(*partial_out, {B, Hq, S, value_dim});
    at.shape(*partial_lse, {B, Hq, S});
    at.contiguous(*partial_out);
    at.contiguous(*partial_lse);
  }
  if (backend == Backend::cuda && S.size * split_size < positions) {
    at.fail("split_size", "splits of all " + std::to_string(positions) + " positions", split_size);
  }

  DecodeAttentionParams attention{};
  attention.q_dtype = attention.kv_dtype = at.scalar_type(q);
  attention.q = q.data;
  attention.k = attention.v = latents.data;
  attention.seq_lens = seq_lens.as<std::int32_t>();
  attention.page_ids = page_ids ? page_ids->as<std::int32_t>() : nullptr;
  attention.out = out.data;
  attention.lse = lse.as<float>();
  attention.logits_dtype = logits ? at.scalar_type(*logits) : ScalarType::f32;
  attention.logits = logits ? logits->data : nullptr;
  attention.stride_q_b = q.strides[0];
  attention.stride_q_h = q.strides[1];
  attention.stride_k_b = attention.stride_v_b = latents.strides[0];
  attention.stride_k_t = attention.stride_v_t = latents.strides[1];
  attention.stride_ids_b = page_ids ? page_ids->strides[0] : 0;
  attention.stride_logits_b = logits ? logits->strides[0] : 0;
  attention.stride_logits_h = logits ? logits->strides[1] : 0;
  attention.batch = static_cast<std::int32_t>(B.size);
  attention.num_heads = static_cast<std::int32_t>(Hq.size);
  attention.num_kv_heads = 1;
  attention.head_dim = static_cast<std::int32_t>(D.size);
  attention.value_dim = static_cast<std::int32_t>(value_dim);
  attention.num_slots = static_cast<std::int32_t>(T.size);
  attention.num_listed = page_ids ? static_cast<std::int32_t>(K.size) : 0;
  attention.num_positions = static_cast<std::int32_t>(positions);
  attention.page_size = attention.page_pitch = static_cast<std::int32_t>(page_size);
  attention.partial_out = partial_out ? partial_out->as<float>() : nullptr;
  attention.partial_lse = partial_lse ? partial_lse->as<float>() : nullptr;
  attention.num_splits = static_cast<std::int32_t>(S.size);
  attention.split_size = static_cast<std::int32_t>(split_size);
  attention.scale = static_cast<float>(scale);
  if (readable(backend)) {
    // As in attention_params: an empty list has no memory.
    if (page_ids && K.size == 0) check_seq_lens(at, attention.seq_lens, B.size, "K * page_size", 0);
    check_lengths(at, attention);
    check_listed_tokens(at, attention);
  }
  run<cpu::latent_attention, cuda::latent_attention>(at, backend, attention, q.device, stream);
}

KVCOMP_OP(latent_attention);

}  // namespace kvcomp
