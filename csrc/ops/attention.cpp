#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/checks.h"

namespace kvcomp {
namespace {

// How a pool of pages [pages, Hkv, P, D] lies in memory: in slots, of which page u has P from
// u * pitch on.
struct Pool {
  std::int64_t stride_h, stride_t, pitch, num_slots;
};

Pool pool_of(const Boundary& at, const TensorView& view) {
  const std::int64_t pages = view.shape[0], size = view.shape[2];
  const std::int64_t stride_p = view.strides[0], stride_t = view.strides[2];
  if (size == 1) return {view.strides[1], stride_p, 1, pages};
  if (pages <= 1) return {view.strides[1], stride_t, size, pages * size};
  if (stride_t <= 0 || stride_p % stride_t != 0 || stride_p / stride_t < size) {
    at.fail(view.name, "pages that are a multiple of the stride of tokens apart, and at least P",
            "strides of " + std::to_string(stride_p) + " and " + std::to_string(stride_t));
  }
  const std::int64_t pitch = stride_p / stride_t;
  return {view.strides[1], stride_t, pitch, (pages - 1) * pitch + size};
}

}  // namespace

void check_lengths(const Boundary& at, const DecodeAttentionParams& p) {
  const std::int64_t room =
      p.page_ids ? std::int64_t{p.num_listed} * p.page_size : std::int64_t{p.num_slots};
  const char* const of_room = p.page_ids ? "K * page_size" : "T";
  check_seq_lens(at, p.seq_lens, p.batch, p.num_positions < room ? "max_len" : of_room,
                 p.num_positions);
}

void check_listed_tokens(const Boundary& at, const DecodeAttentionParams& p) {
  if (!p.page_ids) return;
  const int num_sets = p.stride_ids_h == 0 ? 1 : p.num_kv_heads;
  const std::int32_t num_pages =  // that lie in the cache whole
      p.num_slots < p.page_size ? 0 : (p.num_slots - p.page_size) / p.page_pitch + 1;
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
        good = good && id >= -1 && id * p.page_pitch + rest <= p.num_slots;
        if (id >= 0 && id * p.page_pitch + rest > p.num_slots) high = ids[full];
        low = std::min(low, ids[full]);
      }
      if (good) continue;
      at.fail("page_ids",
              p.page_pitch == p.page_size ? "-1 or pages of " + std::to_string(p.page_size) +
                                                " within T=" + std::to_string(p.num_slots)
                                          : "-1 or one of " + std::to_string(num_pages) + " pages",
              std::to_string(low < -1 ? low : high) + " in row " + std::to_string(b));
    }
  }
}

AppendAttentionParams attention_params(const Boundary& at, Backend backend, Queries queries,
                                       const AttentionArguments& given) {
  const std::int64_t page_size = given.page_size;
  const TensorView q = at.tensor("q", given.q), k = at.tensor("k", given.k);
  const TensorView v = at.tensor("v", given.v), seq_lens = at.tensor("seq_lens", given.seq_lens);
  const std::optional<TensorView> page_ids = at.optional("page_ids", given.page_ids);
  const std::optional<TensorView> logits = at.optional("logits", given.logits);
  const std::optional<TensorView> words = at.optional("words", given.words);

  at.device(backend, {&q, &k, &v, &seq_lens, page_ids ? &*page_ids : &q, logits ? &*logits : &q});
  at.dtype(q, {DType::f32, DType::f16, DType::bf16});
  words ? at.dtype(k, {DType::i8}) : at.same_dtype(k, q);
  at.same_dtype(v, k);
  at.dtype(seq_lens, {DType::i32});
  for (const TensorView* view : {&q, &k, &v, &seq_lens}) at.last_contiguous(*view);

  Dim B{"B"}, m{"m"}, Hq{"Hq"}, Hkv{"Hkv"}, T{"T"}, D{"D"}, Dv{"Dv"}, K{"K"};
  const bool several = queries == Queries::several;
  const auto shape_by_head = [&](const TensorView& view, auto&&... rest) {
    several ? at.shape(view, {B, m, Hq, rest...}) : at.shape(view, {B, Hq, rest...});
  };
  shape_by_head(q, D);
  const bool pooled = page_ids && page_ids->ndim == 2;
  Pool k_pool{}, v_pool{};
  if (pooled) {
    Dim pages{"pages"}, P{"P"};
    at.shape(k, {pages, Hkv, P, D});
    at.shape(v, {pages, Hkv, P, Dv});
    if (page_size != P.size) {
      at.fail("page_size", "P=" + std::to_string(P.size) + " of k, a pool of pages", page_size);
    }
    if (words) at.fail("words", "None with a pool of pages", "a tensor");
    k_pool = pool_of(at, k);
    v_pool = pool_of(at, v);
    if (v_pool.pitch != k_pool.pitch) {
      at.fail("v", "pages as far apart as those of k, " + std::to_string(k_pool.pitch) + " tokens",
              v_pool.pitch);
    }
    T.size = k_pool.num_slots;
  } else {
    at.shape(k, {B, Hkv, T, D});
    at.shape(v, {B, Hkv, T, Dv});
    k_pool = {k.strides[1], k.strides[2], page_size, T.size};
    v_pool = {v.strides[1], v.strides[2], page_size, T.size};
  }
  at.shape(seq_lens, {B});
  if (words) check_words(at, backend, *words, k, {B, Hkv, T});
  if (B.size < 1) at.fail("q", "at least one sequence", B.size);
  if (Hkv.size < 1 || Hq.size < 1 || Hq.size % Hkv.size != 0) {
    at.fail("q", "Hq a multiple of Hkv=" + std::to_string(Hkv.size), Hq.size);
  }
  if (several && (m.size < 1 || m.size > kMostQueries)) {
    at.fail("q", "m from 1 to " + std::to_string(kMostQueries), m.size);
  }
  check_head_dims(at, D.size, Dv.size);
  if (words && Dv.size != D.size) at.fail("words", "None where k and v differ in size", "a tensor");
  if (page_size < 1) at.fail("page_size", "at least 1", page_size);
  if (!std::isfinite(static_cast<float>(given.scale))) {
    at.fail("scale", "a finite number of 32 bits", std::to_string(given.scale));
  }
  const float softcap = static_cast<float>(given.softcap);  // which may be 0 or infinite
  if (!std::isfinite(softcap) || softcap < 0 || (softcap == 0) != (given.softcap == 0)) {
    at.fail("softcap", "a positive number or None", std::to_string(given.softcap));
  }
  std::int64_t positions = T.size;
  if (page_ids) {
    at.dtype(*page_ids, {DType::i32});
    at.last_contiguous(*page_ids);
    if (pooled) {
      at.shape(*page_ids, {B, K});
    } else if (page_ids->ndim == 3 && page_ids->shape[1] == 1) {
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
    shape_by_head(*logits, kAny);
    if (const std::int64_t room = logits->shape[logits->ndim - 1]; room < positions) {
      at.fail("logits", "room for " + std::to_string(positions) + " tokens", room);
    }
  }

  const TensorView out = at.tensor("out", given.out), lse = at.tensor("lse", given.lse);
  at.device(backend, {&q, &out, &lse});
  at.same_dtype(out, q);
  at.dtype(lse, {DType::f32});
  shape_by_head(out, Dv);
  shape_by_head(lse);
  at.contiguous(out);
  at.contiguous(lse);
  const std::optional<TensorView> partial_out = at.optional("partial_out", given.partial_out);
  const std::optional<TensorView> partial_lse = at.optional("partial_lse", given.partial_lse);
  Dim S{"S"};
  S.size = 1;
  if (partial_out && partial_lse) {
    S.size = -1;
    at.device(backend, {&q, &*partial_out, &*partial_lse});
    at.dtype(*partial_out, {DType::f32});
    at.dtype(*partial_lse, {DType::f32});
    shape_by_head(*partial_out, S, Dv);
    shape_by_head(*partial_lse, S);
    at.contiguous(*partial_out);
    at.contiguous(*partial_lse);
  }
  if (given.max_len < 0) at.fail("max_len", "at least 0", given.max_len);
  positions = std::min(positions, given.max_len);
  const bool in_splits = backend == Backend::cuda;
  if (in_splits && S.size * given.split_size < positions) {
    at.fail("split_size", "splits of all " + std::to_string(positions) + " positions",
            given.split_size);
  }

  const int head = several ? 2 : 1;  // the dimension
  const DecodeAttentionParams params{
      .q_dtype = at.scalar_type(q),
      .kv_dtype = words ? ScalarType::i8 : at.scalar_type(q),
      .q = q.data,
      .k = k.data,
      .v = v.data,
      .words = words ? words->as<std::uint32_t>() : nullptr,
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
      .stride_q_h = q.strides[head],
      .stride_k_b = pooled ? 0 : k.strides[0],
      .stride_k_h = k_pool.stride_h,
      .stride_k_t = k_pool.stride_t,
      .stride_v_b = pooled ? 0 : v.strides[0],
      .stride_v_h = v_pool.stride_h,
      .stride_v_t = v_pool.stride_t,
      .stride_words_b = words ? words->strides[0] : 0,
      .stride_words_h = words ? words->strides[1] : 0,
      .stride_ids_b = page_ids ? page_ids->strides[0] : 0,
      .stride_ids_h = page_ids && !pooled && page_ids->shape[1] > 1 ? page_ids->strides[1] : 0,
      .stride_logits_b = logits ? logits->strides[0] : 0,
      .stride_logits_h = logits ? logits->strides[head] : 0,
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(Hq.size),
      .num_kv_heads = static_cast<std::int32_t>(Hkv.size),
      .head_dim = static_cast<std::int32_t>(D.size),
      .value_dim = static_cast<std::int32_t>(Dv.size),
      .num_slots = static_cast<std::int32_t>(T.size),
      .num_listed = page_ids ? static_cast<std::int32_t>(K.size) : 0,
      .num_positions = static_cast<std::int32_t>(positions),
      .page_size = static_cast<std::int32_t>(page_size),
      .page_pitch = static_cast<std::int32_t>(k_pool.pitch),
      .num_splits = static_cast<std::int32_t>(S.size),
      .split_size = static_cast<std::int32_t>(given.split_size),
      .scale = static_cast<float>(given.scale),
      .softcap = softcap,
  };
  if (readable(backend)) {
    // An empty list has no memory, so it would pass for no list; with lengths of 0 that is the
    // same.
    if (page_ids && K.size == 0) check_seq_lens(at, params.seq_lens, B.size, "K * page_size", 0);
    check_lengths(at, params);
    if (!given.checked) check_listed_tokens(at, params);
  }
  return {
      .attention = params,
      .q_lens = nullptr,
      .tail = nullptr,
      .stride_q_m = several ? q.strides[1] : 0,
      .stride_logits_m = several && logits ? logits->strides[1] : 0,
      .stride_tail_b = 0,
      .num_queries = several ? static_cast<std::int32_t>(m.size) : 1,
  };
}

}  // namespace kvcomp
