// Native entry of append_rows: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

std::int64_t bytes_of(DType dtype) {
  return dtype == DType::i8 ? 1 : dtype == DType::f16 || dtype == DType::bf16 ? 2 : 4;
}

// Rows of `from` and where they go; a view of three dimensions has one element in a row.
AppendedPart part(const TensorView& from, const TensorView& into) {
  const std::int64_t size = bytes_of(from.dtype);
  const bool rows = from.ndim == 4;
  return {
      .from = from.data,
      .into = into.data,
      .stride_from_b = from.strides[0] * size,
      .stride_from_h = from.strides[1] * size,
      .stride_from_t = from.strides[2] * size,
      .stride_from_d = rows ? from.strides[3] * size : size,
      .stride_into_b = into.strides[0] * size,
      .stride_into_h = into.strides[1] * size,
      .stride_into_t = into.strides[2] * size,
      .width = static_cast<std::int32_t>(rows ? from.shape[3] : 1),
      .element = static_cast<std::int32_t>(size),
  };
}

}  // namespace

void append_rows(Backend backend, py::handle k_, py::handle v_, py::handle k_cache_,
                 py::handle v_cache_, py::handle seq_lens_, py::handle logical_lens_,
                 py::handle words_, py::handle words_cache_, py::handle added_, std::uintptr_t) {
  const Boundary at{"append_rows"};
  const TensorView k = at.tensor("k", k_), v = at.tensor("v", v_);
  const TensorView k_cache = at.tensor("k_cache", k_cache_);
  const TensorView v_cache = at.tensor("v_cache", v_cache_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);
  const auto logical_lens = at.optional("logical_lens", logical_lens_);
  const auto words = at.optional("words", words_);
  const auto words_cache = at.optional("words_cache", words_cache_);
  const auto added = at.optional("added", added_);
  at.device(backend, {&k, &v, &k_cache, &v_cache, &seq_lens});
  at.dtype(k, {DType::f32, DType::f16, DType::bf16, DType::i8});
  for (const TensorView* view : {&v, &k_cache, &v_cache}) at.same_dtype(*view, k);
  at.last_contiguous(k_cache);
  at.last_contiguous(v_cache);
  Dim B{"B"}, H{"H"}, m{"m"}, D{"D"}, Dv{"Dv"}, T{"T"};
  at.shape(k, {B, H, m, D});
  at.shape(v, {B, H, m, Dv});
  at.shape(k_cache, {B, H, T, D});
  at.shape(v_cache, {B, H, T, Dv});
  check_per_row(at, seq_lens, B);
  for (const auto& lens : {logical_lens, added}) {
    if (!lens) continue;
    at.device(backend, {&k, &*lens});
    check_per_row(at, *lens, B);
  }
  if (words.has_value() != words_cache.has_value()) {
    at.fail(words ? "words_cache" : "words", words ? "the words of the cache" : "words", "None");
  }
  if (words) {
    at.device(backend, {&k, &*words, &*words_cache});
    at.dtype(*words, {DType::i32});
    at.dtype(*words_cache, {DType::i32});
    at.shape(*words, {B, H, m});
    at.shape(*words_cache, {B, H, T});
  }
  check_size(at, k, "sequences", B.size);
  check_size(at, k, "heads", H.size);
  check_size(at, k, "elements of a head", D.size);
  check_size(at, v, "elements of a head", Dv.size);
  check_size(at, k_cache, "slots", T.size);

  AppendRowsParams params{
      .parts = {part(k, k_cache), part(v, v_cache)},
      .seq_lens = seq_lens.as<std::int32_t>(),
      .logical_lens = logical_lens ? logical_lens->as<std::int32_t>() : nullptr,
      .added = added ? added->as<std::int32_t>() : nullptr,
      .num_parts = words ? 3 : 2,
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(H.size),
      .num_tokens = static_cast<std::int32_t>(m.size),
  };
  if (words) params.parts[2] = part(*words, *words_cache);
  if (readable(backend)) {
    if (added) check_counts(at, "added", params.added, B.size, "m", m.size);
    for (std::int64_t b = 0; b < B.size; ++b) {
      const std::int64_t count = added ? params.added[b] : m.size, len = params.seq_lens[b];
      if (len >= 0 && len <= T.size - count) continue;
      at.fail("seq_lens",
              "values in [0, " + std::to_string(T.size - count) + "], with room for " +
                  std::to_string(count) + " of T=" + std::to_string(T.size),
              std::to_string(len) + " in row " + std::to_string(b));
    }
  }
  run<cpu::append_rows>(at, backend, params);
}

KVCOMP_OP(append_rows);

}  // namespace kvcomp
