// Native entry of unit_scores: checks, params, implementation.
#include <cmath>

#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void unit_scores(Backend backend, py::handle q_, py::handle centroids_, py::handle starts_,
                 py::handle num_indexed_, py::handle active_, py::handle scores_, double scale,
                 std::uintptr_t) {
  const Boundary at{"unit_scores"};
  const TensorView q = at.tensor("q", q_), centroids = at.tensor("centroids", centroids_);
  const TensorView starts = at.tensor("starts", starts_);
  const TensorView num_indexed = at.tensor("num_indexed", num_indexed_);
  const TensorView active = at.tensor("active", active_);
  const TensorView scores = at.tensor("scores", scores_);
  at.device(backend, {&q, &centroids, &starts, &num_indexed, &active, &scores});
  at.dtype(q, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(centroids, q);
  at.dtype(starts, {DType::i32});
  at.dtype(scores, {DType::f32});
  at.last_contiguous(q);
  check_inner_contiguous(at, centroids);
  at.last_contiguous(starts);
  at.contiguous(scores);
  Dim B{"B"}, Hq{"Hq"}, Hkv{"Hkv"}, U{"U"}, D{"D"};
  at.shape(q, {B, Hq, D});
  at.shape(centroids, {B, Hkv, U, D});
  at.shape(starts, {B, Hkv, U.size + 1});
  check_per_row(at, num_indexed, B);
  check_per_row(at, active, B);
  at.shape(scores, {B, Hkv, U});
  if (B.size < 1) at.fail("q", "at least one sequence", B.size);
  if (Hkv.size < 1 || Hq.size < 1 || Hq.size % Hkv.size != 0) {
    at.fail("q", "Hq a multiple of Hkv=" + std::to_string(Hkv.size), Hq.size);
  }
  check_row_dim(at, "q", D.size, 2 * kMostLatent);  // digests may be pairs of vectors
  check_size(at, centroids, "units", U.size);
  if (!std::isfinite(static_cast<float>(scale))) {
    at.fail("scale", "a finite number of 32 bits", std::to_string(scale));
  }

  const UnitScoresParams params{
      .dtype = at.scalar_type(q),
      .q = q.data,
      .centroids = centroids.data,
      .starts = starts.as<std::int32_t>(),
      .num_indexed = num_indexed.as<std::int32_t>(),
      .active = active.as<std::int32_t>(),
      .scores = scores.as<float>(),
      .stride_q_b = q.strides[0],
      .stride_q_h = q.strides[1],
      .stride_centroids_b = centroids.strides[0],
      .stride_centroids_h = centroids.strides[1],
      .stride_starts_b = starts.strides[0],
      .stride_starts_h = starts.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(Hq.size),
      .num_kv_heads = static_cast<std::int32_t>(Hkv.size),
      .head_dim = static_cast<std::int32_t>(D.size),
      .num_units = static_cast<std::int32_t>(U.size),
      .scale = static_cast<float>(scale),
  };
  if (readable(backend)) check_counts(at, "num_indexed", params.num_indexed, B.size, "U", U.size);
  run<cpu::unit_scores>(at, backend, params);
}

KVCOMP_OP(unit_scores);

}  // namespace kvcomp
