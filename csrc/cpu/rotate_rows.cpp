// Rotary embedding of queries and keys. Bytes: each row, read and written once. Products and sums
// are rounded one by one, so they must not be fused: this file is compiled without FMA.
#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

constexpr int kMostDim = 1024;

// x as it would be in memory of the dtype.
void round(const simd::TypedRows& rows, ScalarType dtype, int dim, float* x) {
  if (dtype == ScalarType::f32) return;
  std::uint16_t stored[kMostDim];
  rows.narrow(x, 1.0f, dim, stored);
  rows.widen(stored, dim, x);
}

}  // namespace

void rotate_rows(const RotateRowsParams& p) {
  constexpr std::int64_t kGrain = 1 << 15;  // elements that are worth a thread
  const simd::TypedRows& loops = typed(simd::rows(), p.dtype);
  const std::int64_t size = size_of(p.dtype), tokens = std::int64_t{p.batch} * p.num_tokens;
  const int dim = p.head_dim, half = dim / 2;
  const std::int64_t heads = p.rows[0].num_heads + p.rows[1].num_heads;
  const int threads = num_threads(tokens * heads * dim, kGrain);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t token = 0; token < tokens; ++token) {
    const std::int64_t b = token / p.num_tokens, t = token % p.num_tokens;
    float cos[kMostDim], sin[kMostDim], x[kMostDim], straight[kMostDim], turned[kMostDim];
    const auto at = [size](const void* data, std::int64_t offset) {
      return static_cast<const char*>(data) + offset * size;
    };
    loops.widen(at(p.cos, b * p.stride_cos_b + t * p.stride_cos_t), dim, cos);
    loops.widen(at(p.sin, b * p.stride_sin_b + t * p.stride_sin_t), dim, sin);
    for (const RotatedRows& rows : p.rows) {
      for (std::int64_t head = 0; head < rows.num_heads; ++head) {
        loops.widen(at(rows.x, b * rows.stride_x_b + head * rows.stride_x_h + t * rows.stride_x_t),
                    dim, x);
        for (int i = 0; i < dim; ++i) straight[i] = x[i] * cos[i];
        for (int i = 0; i < half; ++i) turned[i] = -x[i + half] * sin[i];
        for (int i = half; i < dim; ++i) turned[i] = x[i - half] * sin[i];
        round(loops, p.dtype, dim, straight);
        round(loops, p.dtype, dim, turned);
        for (int i = 0; i < dim; ++i) straight[i] += turned[i];
        loops.narrow(
            straight, 1.0f, dim,
            static_cast<char*>(rows.out) +
                (b * rows.stride_out_b + head * rows.stride_out_h + t * rows.stride_out_t) * size);
      }
    }
  }
}

}  // namespace kvcomp::cpu
