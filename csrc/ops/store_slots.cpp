// Native entry of store_slots: checks, params, implementation.
#include <algorithm>
#include <array>
#include <cstddef>

#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

struct Step {
  std::int64_t size, stride;  // of a dimension, in bytes
};

// Whether the sum of whole steps d * stride, with |d| < size in each dimension, can lie between
// `low` and `high`, both excluded. Strides fall, and one is longer than all that lies within it.
bool reaches(const Step* step, int dims, std::int64_t low, std::int64_t high) {
  if (dims == 0) return low < 0 && 0 < high;
  std::int64_t within = 0;
  for (int i = 1; i < dims; ++i) within += (step[i].size - 1) * step[i].stride;
  const std::int64_t stride = step[0].stride, most = step[0].size - 1;
  const std::int64_t first = std::max(-most, (low - within) / stride - 1);
  const std::int64_t last = std::min(most, (high + within) / stride + 1);
  for (std::int64_t d = first; d <= last; ++d) {
    if (reaches(step + 1, dims - 1, low - d * stride, high - d * stride)) return true;
  }
  return false;
}

// Whether rows of the two pools share bytes: exact for pools of equal strides, such as parts of one
// cache; otherwise only the first rows are compared.
bool overlap(const StoreSlotsParams& p, std::int64_t pages) {
  const std::array<Step, 3> given{{{pages, p.stride_k_pool_p},
                                   {p.num_heads, p.stride_k_pool_h},
                                   {p.page_size, p.stride_k_pool_t}}};
  const std::array<std::int64_t, 3> others{p.stride_v_pool_p, p.stride_v_pool_h, p.stride_v_pool_t};
  std::array<Step, 3> steps;  // longest first
  int dims = 0;
  bool alike = true;
  for (int i = 0; i < 3; ++i) {
    if (given[i].size == 1) continue;
    alike = alike && given[i].stride == others[i];
    int place = dims++;
    for (; place > 0 && steps[place - 1].stride < given[i].stride; --place) {
      steps[place] = steps[place - 1];
    }
    steps[place] = given[i];
  }
  std::int64_t within = std::max(p.k_bytes, p.v_bytes);
  for (int i = dims - 1; i >= 0; --i) {
    alike = alike && steps[i].stride >= within;
    within += (steps[i].size - 1) * steps[i].stride;
  }
  const std::int64_t apart =
      static_cast<const std::byte*>(p.v_pool) - static_cast<const std::byte*>(p.k_pool);
  return reaches(steps.data(), alike ? dims : 0, -apart - p.v_bytes, -apart + p.k_bytes);
}

}  // namespace

void store_slots(Backend backend, py::handle k_, py::handle v_, py::handle k_pool_,
                 py::handle v_pool_, py::handle slot_mapping_, std::uintptr_t stream) {
  const Boundary at{"store_slots"};
  const TensorView k = at.tensor("k", k_), v = at.tensor("v", v_);
  const TensorView k_pool = at.tensor("k_pool", k_pool_), v_pool = at.tensor("v_pool", v_pool_);
  const TensorView slots = at.tensor("slot_mapping", slot_mapping_);
  at.device(backend, {&k, &v, &k_pool, &v_pool, &slots});
  at.dtype(k, {DType::f32, DType::f16, DType::bf16, DType::i8});
  for (const TensorView* view : {&v, &k_pool, &v_pool}) at.same_dtype(*view, k);
  at.dtype(slots, {DType::i64});
  for (const TensorView* view : {&k, &v, &k_pool, &v_pool}) at.last_contiguous(*view);
  at.contiguous(slots);
  Dim N{"N"}, H{"H"}, D{"D"}, Dv{"Dv"}, pages{"pages"}, P{"P"};
  at.shape(k, {N, H, D});
  at.shape(v, {N, H, Dv});
  at.shape(k_pool, {pages, H, P, D});
  at.shape(v_pool, {pages, H, P, Dv});
  at.shape(slots, {N});
  if (H.size < 1) at.fail("k", "at least one head", H.size);
  check_row_dim(at, "k", D.size);
  check_moved(at, false, D.size, Dv.size);
  check_size(at, k, "tokens", N.size);
  check_size(at, k_pool, "tokens in a page", P.size);
  if (P.size < 1) at.fail("k_pool", "pages of at least one token", P.size);
  const std::int64_t num_slots = pages.size * P.size;
  if (readable(backend)) {
    const auto* each = slots.as<std::int64_t>();
    for (std::int64_t i = 0; i < N.size; ++i) {
      if (each[i] < num_slots) continue;
      at.fail("slot_mapping", "slots of pages * P=" + std::to_string(num_slots) + ", or negative",
              std::to_string(each[i]) + " in row " + std::to_string(i));
    }
  }
  const TensorView &values = Dv.size ? v : k, &value_pool = Dv.size ? v_pool : k_pool;
  const std::int64_t size = k.dtype == DType::f32 ? 4 : k.dtype == DType::i8 ? 1 : 2;
  const StoreSlotsParams params{
      .k = k.data,
      .v = values.data,
      .k_pool = k_pool.data,
      .v_pool = value_pool.data,
      .slots = slots.as<std::int64_t>(),
      .stride_k_n = k.strides[0] * size,
      .stride_k_h = k.strides[1] * size,
      .stride_v_n = values.strides[0] * size,
      .stride_v_h = values.strides[1] * size,
      .stride_k_pool_p = k_pool.strides[0] * size,
      .stride_k_pool_h = k_pool.strides[1] * size,
      .stride_k_pool_t = k_pool.strides[2] * size,
      .stride_v_pool_p = value_pool.strides[0] * size,
      .stride_v_pool_h = value_pool.strides[1] * size,
      .stride_v_pool_t = value_pool.strides[2] * size,
      .num_slots = num_slots,
      .num_tokens = static_cast<std::int32_t>(N.size),
      .num_heads = static_cast<std::int32_t>(H.size),
      .page_size = static_cast<std::int32_t>(P.size),
      .k_bytes = static_cast<std::int32_t>(D.size * size),
      .v_bytes = static_cast<std::int32_t>(Dv.size * size),
  };
  if (Dv.size && pages.size && overlap(params, pages.size)) {
    at.fail("v_pool", "memory of its own, or the parts of a cache that k_pool leaves",
            "an overlap");
  }
  run<cpu::store_slots, cuda::store_slots>(at, backend, params, k.device, stream);
}

KVCOMP_OP(store_slots);

}  // namespace kvcomp
