// Native entry of store_segments: checks, params, implementation.
#include "ops/checks.h"
#include "ops/pool.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

// Each closed segment is in the pool's range and, whole, in the slots; readable tensors only.
void check_values(const Boundary& at, const StoreSegmentsParams& p, std::int64_t num_slots,
                  std::int64_t num_units) {
  check_seq_lens(at, p.seq_lens, p.batch, "T", num_slots);
  check_counts(at, "closed", p.closed, p.batch, "R", num_rows(p.pool));
  for (int b = 0; b < p.batch; ++b) {
    if (p.closed[b] == 0) continue;
    const int unit = p.num_units[b] - 1;
    if (unit < 0 || unit >= num_units) {
      at.fail("num_units", "values in [1, U=" + std::to_string(num_units) + "]",
              std::to_string(p.num_units[b]) + " in row " + std::to_string(b));
    }
    for (int head = 0; head < p.num_heads; ++head) {
      const std::int32_t* starts =
          p.starts + b * p.stride_starts_b + head * p.stride_starts_h + unit;
      const std::int32_t begin = starts[0], end = starts[1];
      if (begin < 0 || begin > end || end > num_rows(p.pool)) {
        at.fail("starts", "a unit within the pool's " + std::to_string(num_rows(p.pool)) + " rows",
                std::to_string(begin) + " to " + std::to_string(end) + in_head(b, head));
      }
      if (end - begin != p.closed[b]) {
        at.fail("closed", "the " + std::to_string(end - begin) + " tokens of the newest unit",
                std::to_string(p.closed[b]) + in_head(b, head));
      }
      const std::int32_t* held = p.slot_rows + b * p.stride_rows_b + head * p.stride_rows_h;
      const auto size = static_cast<std::uint32_t>(p.closed[b]);
      std::uint32_t count = 0;
      for (int t = 0; t < p.seq_lens[b]; ++t) {
        count += static_cast<std::uint32_t>(held[t]) - static_cast<std::uint32_t>(begin) < size;
      }
      if (count != size) {
        at.fail("slot_rows", "the " + std::to_string(size) + " rows of the newest unit",
                std::to_string(count) + in_head(b, head));
      }
    }
  }
}

}  // namespace

void store_segments(Backend backend, py::handle k_, py::handle v_, py::handle slot_rows_,
                    py::handle seq_lens_, py::handle starts_, py::handle num_units_,
                    py::handle closed_, py::handle pool_, py::handle centroids_, py::handle words_,
                    bool turned, std::uintptr_t stream) {
  const Boundary at{"store_segments"};
  const TensorView k = at.tensor("k", k_), v = at.tensor("v", v_);
  const TensorView slot_rows = at.tensor("slot_rows", slot_rows_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);
  const TensorView starts = at.tensor("starts", starts_);
  const TensorView num_units = at.tensor("num_units", num_units_);
  const TensorView closed = at.tensor("closed", closed_);
  const TensorView centroids = at.tensor("centroids", centroids_);
  at.device(backend, {&k, &v, &slot_rows, &seq_lens, &starts, &num_units, &closed, &centroids});
  const std::optional<TensorView> words = at.optional("words", words_);
  words ? at.dtype(k, {DType::i8}) : at.dtype(k, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(v, k);
  words ? at.dtype(centroids, {DType::f32, DType::f16, DType::bf16}) : at.same_dtype(centroids, k);
  at.dtype(slot_rows, {DType::i32});
  at.dtype(starts, {DType::i32});
  for (const TensorView* view : {&k, &v, &slot_rows, &starts}) at.last_contiguous(*view);
  check_inner_contiguous(at, centroids);
  Dim B{"B"}, H{"H"}, T{"T"}, D{"D"}, Dv{"Dv"}, U{"U"};
  at.shape(k, {B, H, T, D});
  at.shape(v, {B, H, T, Dv});
  at.shape(slot_rows, {B, H, kAny});
  at.shape(centroids, {B, H, U, D});
  at.shape(starts, {B, H, U.size + 1});
  if (words) check_words(at, backend, *words, k, {B, H, kAny});
  for (const TensorView* view : {&seq_lens, &num_units, &closed}) check_per_row(at, *view, B);
  if (B.size < 1) at.fail("k", "at least one sequence", B.size);
  if (H.size < 1) at.fail("k", "at least one head", H.size);
  check_row_dim(at, "k", D.size);
  check_moved(at, words.has_value(), D.size, Dv.size);
  const TensorView& values = Dv.size ? v : k;  // of no columns, nothing is read
  if (turned) check_turn(at, "turned", D.size);
  const std::int64_t slots =
      std::min({T.size, slot_rows.shape[2], words ? words->shape[2] : T.size});
  check_size(at, k, "tokens", T.size);
  check_size(at, centroids, "units", U.size);
  const PoolBlocks pool = pool_blocks(at, pool_, k, B, H, D, Dv);

  const StoreSegmentsParams params{
      .dtype = at.scalar_type(centroids),
      .k = k.data,
      .v = values.data,
      .words = words ? words->as<std::uint32_t>() : nullptr,
      .slot_rows = slot_rows.as<std::int32_t>(),
      .seq_lens = seq_lens.as<std::int32_t>(),
      .starts = starts.as<std::int32_t>(),
      .num_units = num_units.as<std::int32_t>(),
      .closed = closed.as<std::int32_t>(),
      .centroids = centroids.data,
      .pool = pool,
      .stride_k_b = k.strides[0],
      .stride_k_h = k.strides[1],
      .stride_k_t = k.strides[2],
      .stride_v_b = values.strides[0],
      .stride_v_h = values.strides[1],
      .stride_v_t = values.strides[2],
      .stride_words_b = words ? words->strides[0] : 0,
      .stride_words_h = words ? words->strides[1] : 0,
      .stride_rows_b = slot_rows.strides[0],
      .stride_rows_h = slot_rows.strides[1],
      .stride_starts_b = starts.strides[0],
      .stride_starts_h = starts.strides[1],
      .stride_centroids_b = centroids.strides[0],
      .stride_centroids_h = centroids.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(H.size),
      .head_dim = static_cast<std::int32_t>(D.size),
      .value_dim = static_cast<std::int32_t>(Dv.size),
      .num_slots = static_cast<std::int32_t>(slots),
      .max_units = static_cast<std::int32_t>(U.size),
      .turned = turned,
  };
  if (readable(backend)) check_values(at, params, slots, U.size);
  run<cpu::store_segments, cuda::store_segments>(at, backend, params, k.device, stream);
}

KVCOMP_OP(store_segments);

}  // namespace kvcomp
