// Native entry of decode_attention: checks, params, implementation.
#include <algorithm>
#include <limits>

#include "ops/checks.h"
#include "ops/run.h"
#include "ops/selection.h"

namespace kvcomp {
namespace {

constexpr int kMaxTokens = std::numeric_limits<std::int32_t>::max() - 64;  // a tile beyond fits

// seq_lens and page_ids hold what they may; readable tensors only.
void check_values(const Boundary& at, const DecodeAttentionParams& p) {
  const std::int64_t limit =
      p.page_ids ? std::int64_t{p.num_listed} * p.page_size : std::int64_t{p.num_slots};
  check_seq_lens(at, p.seq_lens, p.batch, p.page_ids ? "K * page_size" : "T", limit);
  if (!p.page_ids) return;
  const int num_sets = p.stride_ids_h == 0 ? 1 : p.num_kv_heads;
  const std::int32_t num_pages = p.num_slots / p.page_size;  // that lie in the cache whole
  for (int b = 0; b < p.batch; ++b) {
    const int full = p.seq_lens[b] / p.page_size, rest = p.seq_lens[b] % p.page_size;
    for (int set = 0; set < num_sets; ++set) {
      const std::int32_t* ids = p.page_ids + b * p.stride_ids_b + set * p.stride_ids_h;
      std::int32_t low = 0, high = -1;
      for (int i = 0; i < full; ++i) {
        low = std::min(low, ids[i]);
        high = std::max(high, ids[i]);
      }
      bool good = low >= -1 && high < num_pages;
      if (rest > 0) {  // of the last page only the attended tokens must exist
        const std::int64_t id = ids[full];
        good = good && id >= -1 && id * p.page_size + rest <= p.num_slots;
        if (id >= 0 && id * p.page_size + rest > p.num_slots) high = ids[full];
        low = std::min(low, ids[full]);
      }
      if (good) continue;
      at.fail("page_ids",
              "-1 or pages of " + std::to_string(p.page_size) +
                  " within T=" + std::to_string(p.num_slots),
              std::to_string(low < -1 ? low : high) + " in row " + std::to_string(b));
    }
  }
}

}  // namespace

DecodeAttentionParams decode_attention_params(const Boundary& at, Backend backend, py::handle q_,
                                              py::handle k_, py::handle v_, py::handle seq_lens_,
                                              py::handle page_ids_, py::handle logits_,
                                              py::handle out_, py::handle lse_,
                                              std::int64_t page_size, double scale,
                                              py::handle partial_out_, py::handle partial_lse_,
                                              std::int64_t split_size) {
  const TensorView q = at.tensor("q", q_), k = at.tensor("k", k_), v = at.tensor("v", v_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);
  const std::optional<TensorView> page_ids = at.optional("page_ids", page_ids_);
  const std::optional<TensorView> logits = at.optional("logits", logits_);

  at.device(backend, {&q, &k, &v, &seq_lens, page_ids ? &*page_ids : &q, logits ? &*logits : &q});
  at.dtype(q, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(k, q);
  at.same_dtype(v, q);
  at.dtype(seq_lens, {DType::i32});
  for (const TensorView* view : {&q, &k, &v, &seq_lens}) at.last_contiguous(*view);

  Dim B{"B"}, Hq{"Hq"}, Hkv{"Hkv"}, T{"T"}, D{"D"}, K{"K"};
  at.shape(q, {B, Hq, D});
  at.shape(k, {B, Hkv, T, D});
  at.shape(v, {B, Hkv, T, D});
  at.shape(seq_lens, {B});
  if (B.size < 1) at.fail("q", "at least one sequence", B.size);
  if (Hkv.size < 1 || Hq.size < 1 || Hq.size % Hkv.size != 0) {
    at.fail("q", "Hq a multiple of Hkv=" + std::to_string(Hkv.size), Hq.size);
  }
  check_head_dim(at, "q", D.size);
  if (page_size < 1) at.fail("page_size", "at least 1", page_size);
  std::int64_t positions = T.size;
  if (page_ids) {
    at.dtype(*page_ids, {DType::i32});
    at.last_contiguous(*page_ids);
    if (page_ids->ndim == 3 && page_ids->shape[1] == 1) {
      at.shape(*page_ids, {B, 1, K});
    } else {
      at.shape(*page_ids, {B, Hkv, K});
    }
    if (K.size > 0 && page_size > kMaxTokens / K.size) {
      at.fail("page_size", "K * page_size within " + std::to_string(kMaxTokens), page_size);
    }
    positions = K.size * page_size;
  }
  if (positions > kMaxTokens || T.size > kMaxTokens) {
    at.fail("k", "at most " + std::to_string(kMaxTokens) + " tokens", std::max(positions, T.size));
  }
  if (logits) {
    check_logits_dtype(at, backend, *logits);
    at.last_contiguous(*logits);
    at.shape(*logits, {B, Hq, kAny});
    if (logits->shape[2] < positions) {
      at.fail("logits", "room for " + std::to_string(positions) + " tokens", logits->shape[2]);
    }
  }

  const TensorView out = at.tensor("out", out_), lse = at.tensor("lse", lse_);
  at.device(backend, {&q, &out, &lse});
  at.same_dtype(out, q);
  at.dtype(lse, {DType::f32});
  at.shape(out, {B, Hq, D});
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
    at.shape(*partial_out, {B, Hq, S, D});
    at.shape(*partial_lse, {B, Hq, S});
    at.contiguous(*partial_out);
    at.contiguous(*partial_lse);
  }
  const bool in_splits = backend == Backend::cuda || backend == Backend::cuda_host;
  if (in_splits && S.size * split_size < positions) {
    at.fail("split_size", "splits of all " + std::to_string(positions) + " positions", split_size);
  }

  const DecodeAttentionParams params{
      .dtype = at.scalar_type(q),
      .q = q.data,
      .k = k.data,
      .v = v.data,
      .seq_lens = seq_lens.as<std::int32_t>(),
      .page_ids = page_ids ? page_ids->as<std::int32_t>() : nullptr,
      .out = out.data,
      .lse = lse.as<float>(),
      .logits_dtype = logits ? at.scalar_type(*logits) : ScalarType::f32,
      .logits = logits ? logits->data : nullptr,
      .partial_out = partial_out ? partial_out->as<float>() : nullptr,
      .partial_lse = partial_lse ? partial_lse->as<float>() : nullptr,
      .arrived = nullptr,
      .stride_q_b = q.strides[0],
      .stride_q_h = q.strides[1],
      .stride_k_b = k.strides[0],
      .stride_k_h = k.strides[1],
      .stride_k_t = k.strides[2],
      .stride_v_b = v.strides[0],
      .stride_v_h = v.strides[1],
      .stride_v_t = v.strides[2],
      .stride_ids_b = page_ids ? page_ids->strides[0] : 0,
      .stride_ids_h = page_ids && page_ids->shape[1] > 1 ? page_ids->strides[1] : 0,
      .stride_logits_b = logits ? logits->strides[0] : 0,
      .stride_logits_h = logits ? logits->strides[1] : 0,
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(Hq.size),
      .num_kv_heads = static_cast<std::int32_t>(Hkv.size),
      .head_dim = static_cast<std::int32_t>(D.size),
      .num_slots = static_cast<std::int32_t>(T.size),
      .num_listed = page_ids ? static_cast<std::int32_t>(K.size) : 0,
      .page_size = static_cast<std::int32_t>(page_size),
      .num_splits = static_cast<std::int32_t>(S.size),
      .split_size = static_cast<std::int32_t>(split_size),
      .scale = static_cast<float>(scale),
  };
  if (!readable(backend)) return params;
  // An empty list has no memory, so it would pass for no list; with lengths of 0 that is the same.
  if (page_ids && K.size == 0) check_seq_lens(at, params.seq_lens, B.size, "K * page_size", 0);
  check_values(at, params);
  return params;
}

void decode_attention(Backend backend, py::handle q, py::handle k, py::handle v,
                      py::handle seq_lens, py::handle page_ids, py::handle logits, py::handle out,
                      py::handle lse, std::int64_t page_size, double scale, py::handle partial_out,
                      py::handle partial_lse, std::int64_t split_size, std::uintptr_t stream) {
  const Boundary at{"decode_attention"};
  const DecodeAttentionParams params =
      decode_attention_params(at, backend, q, k, v, seq_lens, page_ids, logits, out, lse, page_size,
                              scale, partial_out, partial_lse, split_size);
  run<cpu::decode_attention, cuda::decode_attention, cuda_host::decode_attention>(
      at, backend, params, at.tensor("q", q).device, stream);
}

// How many blocks of the kernel for q's dtype and head size a multiprocessor of its GPU takes.
int decode_attention_blocks(py::handle q_) {
  const Boundary at{"decode_attention"};
  const TensorView q = at.tensor("q", q_);
  at.device(Backend::cuda, {&q});
  check_head_dim(at, "q", q.shape[q.ndim - 1]);
  if constexpr (kWithCuda) {
    return cuda::decode_attention_blocks(at.scalar_type(q), static_cast<int>(q.shape[q.ndim - 1]),
                                         q.device.index);
  }
  return 0;
}

KVCOMP_OP(decode_attention);

}  // namespace kvcomp
