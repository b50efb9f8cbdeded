// Native entry of kmeans: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

// As kvcomp.ops.kmeans.num_clusters has it.
std::int64_t num_clusters(std::int64_t tokens, std::int64_t cluster_size, std::int64_t window) {
  const auto of_window = [cluster_size](std::int64_t count) {
    return std::max<std::int64_t>(1, (2 * count + cluster_size) / (2 * cluster_size));
  };
  const std::int64_t rest = tokens % window;
  return tokens / window * of_window(window) + (rest ? of_window(rest) : 0);
}

// The range of each row; readable tensors only.
void check_ranges(const Boundary& at, const KmeansParams& p) {
  check_counts(at, "last", p.last, p.batch, "N", p.num_tokens);
  for (int b = 0; b < p.batch; ++b) {
    if (p.first[b] >= 0 && p.first[b] <= p.last[b]) continue;
    at.fail("first", "values in [0, last=" + std::to_string(p.last[b]) + "]",
            std::to_string(p.first[b]) + " in row " + std::to_string(b));
  }
}

}  // namespace

void kmeans(Backend backend, py::handle keys_, py::handle first_, py::handle last_,
            py::handle labels_, py::handle centroids_, py::handle sizes_, std::int64_t cluster_size,
            std::int64_t window, std::int64_t iterations, std::uintptr_t) {
  const Boundary at{"kmeans"};
  const TensorView keys = at.tensor("keys", keys_);
  const TensorView first = at.tensor("first", first_), last = at.tensor("last", last_);
  const TensorView labels = at.tensor("labels", labels_);
  const TensorView centroids = at.tensor("centroids", centroids_);
  const TensorView sizes = at.tensor("sizes", sizes_);
  at.device(backend, {&keys, &first, &last, &labels, &centroids, &sizes});
  at.dtype(keys, {DType::f32, DType::f16, DType::bf16});
  at.same_dtype(centroids, keys);
  at.dtype(labels, {DType::i32});
  at.dtype(sizes, {DType::i32});
  at.last_contiguous(keys);
  at.contiguous(labels);
  at.contiguous(centroids);
  at.contiguous(sizes);
  Dim B{"B"}, H{"H"}, N{"N"}, D{"D"};
  at.shape(keys, {B, H, N, D});
  check_per_row(at, first, B);
  check_per_row(at, last, B);
  if (B.size < 1) at.fail("keys", "at least one sequence", B.size);
  if (H.size < 1) at.fail("keys", "at least one head", H.size);
  check_row_dim(at, "keys", D.size, kMostLatent);
  check_size(at, keys, "tokens", N.size);
  if (cluster_size < 1) at.fail("cluster_size", "at least 1", cluster_size);
  if (window < 1) at.fail("window", "at least 1", window);
  if (iterations < 1) at.fail("iterations", "at least 1", iterations);
  // Beyond the tokens there are, neither makes a difference.
  window = std::min(window, std::max<std::int64_t>(N.size, 1));
  cluster_size = std::min(cluster_size, 2 * window + 1);
  Dim K{"K", num_clusters(N.size, cluster_size, window)};
  at.shape(labels, {B, H, N});
  at.shape(centroids, {B, H, K, D});
  at.shape(sizes, {B, H, K});

  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  const KmeansParams params{
      .dtype = at.scalar_type(keys),
      .keys = keys.data,
      .first = first.as<std::int32_t>(),
      .last = last.as<std::int32_t>(),
      .labels = labels.as<std::int32_t>(),
      .centroids = centroids.data,
      .sizes = sizes.as<std::int32_t>(),
      .stride_k_b = keys.strides[0],
      .stride_k_h = keys.strides[1],
      .stride_k_t = keys.strides[2],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(H.size),
      .num_tokens = static_cast<std::int32_t>(N.size),
      .head_dim = static_cast<std::int32_t>(D.size),
      .num_clusters = static_cast<std::int32_t>(K.size),
      .cluster_size = static_cast<std::int32_t>(cluster_size),
      .window = static_cast<std::int32_t>(window),
      .iterations = static_cast<std::int32_t>(std::min(iterations, kMax)),
  };
  if (readable(backend)) check_ranges(at, params);
  run<cpu::kmeans>(at, backend, params);
}

KVCOMP_OP(kmeans);

}  // namespace kvcomp
