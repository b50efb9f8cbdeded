// Native entry of query_similarity: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {

void query_similarity(Backend backend, py::handle q_, py::handle previous_, py::handle similarity_,
                      std::uintptr_t) {
  const Boundary at{"query_similarity"};
  const TensorView q = at.tensor("q", q_), previous = at.tensor("previous", previous_);
  const TensorView similarity = at.tensor("similarity", similarity_);
  at.device(backend, {&q, &previous, &similarity});
  at.dtype(q, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(previous, q);
  at.dtype(similarity, {DType::f32});
  at.last_contiguous(q);
  at.contiguous(previous);
  at.contiguous(similarity);
  Dim B{"B"}, Hq{"Hq"}, D{"D"};
  at.shape(q, {B, Hq, D});
  at.shape(previous, {B, Hq, D});
  at.shape(similarity, {B});
  if (B.size < 1) at.fail("q", "at least one sequence", B.size);
  if (Hq.size < 1) at.fail("q", "at least one head", Hq.size);
  check_row_dim(at, "q", D.size, kMostLatent);

  const QuerySimilarityParams params{
      .dtype = at.scalar_type(q),
      .q = q.data,
      .previous = previous.data,
      .similarity = similarity.as<float>(),
      .stride_q_b = q.strides[0],
      .stride_q_h = q.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(Hq.size),
      .head_dim = static_cast<std::int32_t>(D.size),
  };
  run<cpu::query_similarity>(at, backend, params);
}

KVCOMP_OP(query_similarity);

}  // namespace kvcomp
