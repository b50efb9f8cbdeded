// Native entry of segment_boundaries: checks, params, implementation.
#include <cmath>

#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

// The counts of each row fit together; readable tensors only.
void check_values(const Boundary& at, const SegmentBoundariesParams& p, std::int64_t num_bounds) {
  for (int b = 0; b < p.batch; ++b) {
    const std::int32_t units = p.num_units[b];
    const auto fail = [&](const char* argument, const std::string& expected, std::int32_t got) {
      at.fail(argument, expected, std::to_string(got) + " in row " + std::to_string(b));
    };
    if (units < 0 || units + 1 >= num_bounds) {
      fail("num_units", "values in [0, U=" + std::to_string(num_bounds - 1) + ")", units);
    }
    if (p.num_indexed[b] < 0 || p.num_indexed[b] > units) {
      fail("num_indexed", "values in [0, num_units=" + std::to_string(units) + "]",
           p.num_indexed[b]);
    }
    const std::int32_t* starts = p.starts + b * p.stride_starts_b;
    if (p.lengths[b] < starts[units]) {
      fail("lengths", "at least starts[num_units]=" + std::to_string(starts[units]), p.lengths[b]);
    }
    for (int u = p.num_indexed[b]; u <= units; ++u) {
      if (starts[u] < (u > p.num_indexed[b] ? starts[u - 1] : 0)) {
        fail("starts", "ascending from 0 on", starts[u]);
      }
    }
  }
}

}  // namespace

void segment_boundaries(Backend backend, py::handle similarity_, py::handle lengths_,
                        py::handle starts_, py::handle num_units_, py::handle num_indexed_,
                        py::handle closed_, py::handle triggered_, double cut_below,
                        double retrieve_below, std::int64_t shortest, std::int64_t longest,
                        std::int64_t local, std::uintptr_t stream) {
  const Boundary at{"segment_boundaries"};
  const TensorView similarity = at.tensor("similarity", similarity_);
  const TensorView lengths = at.tensor("lengths", lengths_);
  const TensorView starts = at.tensor("starts", starts_);
  const TensorView num_units = at.tensor("num_units", num_units_);
  const TensorView num_indexed = at.tensor("num_indexed", num_indexed_);
  const TensorView closed = at.tensor("closed", closed_);
  const TensorView triggered = at.tensor("triggered", triggered_);
  at.device(backend,
            {&similarity, &lengths, &starts, &num_units, &num_indexed, &closed, &triggered});
  at.dtype(similarity, {DType::f32});
  at.dtype(starts, {DType::i32});
  at.contiguous(similarity);
  at.last_contiguous(starts);
  Dim B{"B"}, H{"H"};
  at.shape(similarity, {B});
  at.shape(starts, {B, H, kAny});
  for (const TensorView* view : {&lengths, &num_units, &num_indexed, &closed, &triggered}) {
    check_per_row(at, *view, B);
  }
  if (B.size < 1) at.fail("similarity", "at least one sequence", B.size);
  if (H.size < 1) at.fail("starts", "at least one head", H.size);
  if (starts.shape[2] < 2) at.fail("starts", "room for a unit", starts.shape[2]);
  check_size(at, starts, "units", starts.shape[2]);
  if (std::isnan(cut_below)) at.fail("cut_below", "a number", "nan");
  if (std::isnan(retrieve_below)) at.fail("retrieve_below", "a number", "nan");
  if (shortest < 1) at.fail("shortest", "at least 1", shortest);
  if (longest < shortest) at.fail("longest", "at least " + std::to_string(shortest), longest);
  if (local < 0) at.fail("local", "at least 0", local);

  // No row is longer, and sums of two stay within int32.
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max() / 2;
  const SegmentBoundariesParams params{
      .similarity = similarity.as<float>(),
      .lengths = lengths.as<std::int32_t>(),
      .starts = starts.as<std::int32_t>(),
      .num_units = num_units.as<std::int32_t>(),
      .num_indexed = num_indexed.as<std::int32_t>(),
      .closed = closed.as<std::int32_t>(),
      .triggered = triggered.as<std::int32_t>(),
      .stride_starts_b = starts.strides[0],
      .stride_starts_h = starts.strides[1],
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(H.size),
      .max_units = static_cast<std::int32_t>(starts.shape[2] - 1),
      .cut_below = static_cast<float>(cut_below),
      .retrieve_below = static_cast<float>(retrieve_below),
      .shortest = static_cast<std::int32_t>(std::min(shortest, kMax)),
      .longest = static_cast<std::int32_t>(std::min(longest, kMax)),
      .local = static_cast<std::int32_t>(std::min(local, kMax)),
  };
  if (readable(backend)) check_values(at, params, starts.shape[2]);
  run<cpu::segment_boundaries, cuda::segment_boundaries>(at, backend, params, lengths.device,
                                                         stream);
}

KVCOMP_OP(segment_boundaries);

}  // namespace kvcomp
