// Native entry of fetch_rows: checks, params, implementation.
#include "ops/checks.h"
#include "ops/pool.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

// The wanted rows of an active row and head, after a look at each: how many.
int check_wanted(const Boundary& at, const FetchRowsParams& p, int batch, int head) {
  const std::int32_t* wanted = p.rows + (std::int64_t{batch} * p.num_heads + head) * p.num_wanted;
  const std::int32_t sinks = p.num_sinks, end = p.first_local[batch];
  const auto inside = [=](int i) {
    return (wanted[i] == -1) | ((wanted[i] >= sinks) & (wanted[i] < end));
  };
  const auto follows = [=](int i) {
    return (wanted[i] == -1) | ((wanted[i - 1] != -1) & (wanted[i - 1] < wanted[i]));
  };
  std::int32_t count = 0, good = 1;  // without branches: several rows at once
  for (int i = 0; i < p.num_wanted; ++i) {
    good &= inside(i);
    count += wanted[i] != -1;
  }
  for (int i = 1; i < p.num_wanted; ++i) good &= follows(i);
  if (good) return count;
  int i = 0;
  while (inside(i) && (i == 0 || follows(i))) ++i;
  at.fail("rows",
          "rows of [" + std::to_string(p.num_sinks) + ", " + std::to_string(end) +
              "), ascending, then -1",
          std::to_string(wanted[i]) + in_head(batch, head));
}

// What each active row will hold fits; readable tensors only. As a slot's row is a sink, local,
// wanted or given up, and no two are the same, all wanted ones end up beside the sinks and the
// local ones.
void check_values(const Boundary& at, const FetchRowsParams& p) {
  check_seq_lens(at, p.seq_lens, p.batch, "T", p.num_slots);
  for (int b = 0; b < p.batch; ++b) {
    if (!p.active[b]) continue;
    if (p.first_local[b] < 0 || p.first_local[b] > num_rows(p.pool)) {
      at.fail("first_local", "a row of the pool's " + std::to_string(num_rows(p.pool)),
              std::to_string(p.first_local[b]) + " in row " + std::to_string(b));
    }
    std::int64_t length = 0;
    for (int head = 0; head < p.num_heads; ++head) {
      const std::int32_t* held = p.slot_rows + b * p.stride_rows_b + head * p.stride_rows_h;
      std::int32_t stay = 0;
      for (int t = 0; t < p.seq_lens[b]; ++t) {
        stay += held[t] < p.num_sinks || held[t] >= p.first_local[b];
      }
      const std::int64_t own = std::int64_t{stay} + check_wanted(at, p, b, head);
      if (head == 0) length = own;
      if (own != length) {
        at.fail("rows", "as many in every head, " + std::to_string(length) + " with what stays",
                std::to_string(own) + in_head(b, head));
      }
      if (own > p.num_slots) {
        at.fail("k", "room for " + std::to_string(own) + " tokens" + in_head(b, head), p.num_slots);
      }
    }
  }
}

}  // namespace

void fetch_rows(Backend backend, py::handle k_, py::handle v_, py::handle slot_rows_,
                py::handle seq_lens_, py::handle rows_, py::handle first_local_, py::handle active_,
                py::handle pool_, py::handle fetched_, std::int64_t num_sinks, py::handle words_,
                std::uintptr_t stream) {
  const Boundary at{"fetch_rows"};
  const TensorView k = at.tensor("k", k_), v = at.tensor("v", v_);
  const TensorView slot_rows = at.tensor("slot_rows", slot_rows_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);
  const TensorView rows = at.tensor("rows", rows_);
  const TensorView first_local = at.tensor("first_local", first_local_);
  const TensorView active = at.tensor("active", active_);
  const TensorView fetched = at.tensor("fetched", fetched_);
  at.device(backend, {&k, &v, &slot_rows, &seq_lens, &rows, &first_local, &active, &fetched});
  const std::optional<TensorView> words = at.optional("words", words_);
  words ? at.dtype(k, {DType::i8}) : at.dtype(k, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(v, k);
  for (const TensorView* view : {&slot_rows, &rows, &fetched}) at.dtype(*view, {DType::i32});
  for (const TensorView* view : {&k, &v, &slot_rows}) at.last_contiguous(*view);
  at.contiguous(rows);
  at.contiguous(fetched);
  Dim B{"B"}, H{"H"}, T{"T"}, D{"D"}, Dv{"Dv"}, K{"K"};
  at.shape(k, {B, H, T, D});
  at.shape(v, {B, H, T, Dv});
  at.shape(slot_rows, {B, H, kAny});
  at.shape(rows, {B, H, K});
  if (words) check_words(at, backend, *words, k, {B, H, kAny});
  at.shape(fetched, {B, H});
  for (const TensorView* view : {&seq_lens, &first_local, &active}) check_per_row(at, *view, B);
  if (B.size < 1) at.fail("k", "at least one sequence", B.size);
  if (H.size < 1) at.fail("k", "at least one head", H.size);
  check_row_dim(at, "k", D.size);
  check_moved(at, words.has_value(), D.size, Dv.size);
  const TensorView& values = Dv.size ? v : k;  // of no columns, nothing is read
  check_size(at, k, "tokens", T.size);
  check_size(at, rows, "rows", K.size);
  // The CUDA kernel counts heads in what a length leaves of its int32.
  if (const std::int64_t most = std::numeric_limits<std::int32_t>::max() / H.size - 1;
      T.size > most) {
    at.fail("k", "at most " + std::to_string(most) + " tokens with so many heads", T.size);
  }
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max() / 2;
  if (num_sinks < 0 || num_sinks > kMax) {
    at.fail("num_sinks", "from 0 to " + std::to_string(kMax), num_sinks);
  }
  const PoolBlocks pool = pool_blocks(at, pool_, k, B, H, D, Dv);

  const std::int64_t size = words ? 1 : k.dtype == DType::f32 ? 4 : 2;
  const std::int64_t slots = std::min(slot_rows.shape[2], words ? words->shape[2] : T.size);
  const FetchRowsParams params{
      .k = k.data,
      .v = values.data,
      .words = words ? words->as<std::uint32_t>() : nullptr,
      .slot_rows = slot_rows.as<std::int32_t>(),
      .seq_lens = seq_lens.as<std::int32_t>(),
      .rows = rows.as<std::int32_t>(),
      .first_local = first_local.as<std::int32_t>(),
      .active = active.as<std::int32_t>(),
      .fetched = fetched.as<std::int32_t>(),
      .pool = pool,
      .stride_k_b = k.strides[0] * size,
      .stride_k_h = k.strides[1] * size,
      .stride_k_t = k.strides[2] * size,
      .stride_v_b = values.strides[0] * size,
      .stride_v_h = values.strides[1] * size,
      .stride_v_t = values.strides[2] * size,
      .stride_words_b = words ? words->strides[0] : 0,
      .stride_words_h = words ? words->strides[1] : 0,
      .stride_rows_b = slot_rows.strides[0],
      .stride_rows_h = slot_rows.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(H.size),
      .num_slots = static_cast<std::int32_t>(std::min(T.size, slots)),
      .num_wanted = static_cast<std::int32_t>(K.size),
      .num_sinks = static_cast<std::int32_t>(num_sinks),
      .k_bytes = static_cast<std::int32_t>(D.size * size),
      .v_bytes = static_cast<std::int32_t>(Dv.size * size),
  };
  if (readable(backend)) check_values(at, params);
  run<cpu::fetch_rows, cuda::fetch_rows>(at, backend, params, k.device, stream);
}

KVCOMP_OP(fetch_rows);

}  // namespace kvcomp
