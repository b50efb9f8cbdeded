// Native entry of select_pages: checks, params, implementation.
#include <limits>

#include "ops/checks.h"
#include "ops/run.h"
#include "ops/selection.h"

namespace kvcomp {
namespace {

// The table whose entries at the selected columns are wanted, and where they go.
void add_pages(const Boundary& at, Backend backend, const TensorView& scores,
               const TensorView& page_ids, py::handle table_, const char* table_name,
               py::handle pages_, SelectPagesParams& params) {
  const std::optional<TensorView> table = at.optional(table_name, table_);
  const std::optional<TensorView> pages = at.optional("pages", pages_);
  if (!pages) return;
  if (!table) at.fail("pages", std::string("None without ") + table_name, "a tensor");
  at.device(backend, {&scores, &*table, &*pages});
  at.dtype(*table, {DType::i32});
  at.dtype(*pages, {DType::i32});
  at.last_contiguous(*table);
  at.contiguous(*pages);
  Dim B{"B", scores.shape[0]}, H{"H", scores.shape[1]}, K{"K", page_ids.shape[2]};
  at.shape(*pages, {B, H, K});
  const bool by_set = table->ndim == 3 && table->shape[1] != 1;
  if (table->ndim == 2) {
    at.shape(*table, {B, kAny});
  } else if (by_set) {
    at.shape(*table, {B, H, kAny});
  } else {
    at.shape(*table, {B, 1, kAny});
  }
  if (const std::int64_t columns = table->shape[table->ndim - 1]; columns < scores.shape[2]) {
    at.fail(table_name, "at least the " + std::to_string(scores.shape[2]) + " columns of scores",
            columns);
  }
  params.table = table->as<std::int32_t>();
  params.pages = pages->as<std::int32_t>();
  params.stride_table_b = table->strides[0];
  params.stride_table_h = by_set ? table->strides[1] : 0;
}

}  // namespace

SelectPagesParams select_pages_params(const Boundary& at, Backend backend, const TensorView& scores,
                                      const TensorView& seq_lens, const TensorView& page_ids,
                                      const TensorView& selected_lens, std::int64_t page_size,
                                      std::int64_t num_recent, std::int64_t num_sink,
                                      py::handle table, const char* table_name, py::handle pages) {
  at.device(backend, {&scores, &seq_lens, &page_ids, &selected_lens});
  at.dtype(scores, {DType::f32});
  at.dtype(seq_lens, {DType::i32});
  at.dtype(page_ids, {DType::i32});
  at.last_contiguous(scores);
  at.last_contiguous(seq_lens);
  at.contiguous(page_ids);
  Dim B{"B"}, H{"H"}, P{"P"}, K{"K"};
  at.shape(scores, {B, H, P});
  at.shape(seq_lens, {B});
  at.shape(page_ids, {B, H, K});
  if (B.size < 1) at.fail("scores", "at least one sequence", B.size);
  if (H.size < 1) at.fail("scores", "at least one head", H.size);
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  if (page_size < 1 || page_size > kMax) {
    at.fail("page_size", "in 1.." + std::to_string(kMax), page_size);
  }
  if (num_recent < 1) at.fail("num_recent", "at least 1", num_recent);
  if (num_sink < 0) at.fail("num_sink", "at least 0", num_sink);
  if (num_recent > K.size || num_sink > K.size - num_recent) {
    at.fail("num_pages",
            "at least num_recent + num_sink = " + std::to_string(num_recent) + " + " +
                std::to_string(num_sink),
            K.size);
  }
  if (P.size > kMax / 2 || K.size > kMax / 2) at.fail("scores", "fewer pages", P.size);
  at.dtype(selected_lens, {DType::i32});
  at.shape(selected_lens, {B});
  at.contiguous(selected_lens);
  if (readable(backend)) {
    check_seq_lens(at, seq_lens.as<std::int32_t>(), B.size, "P * page_size", P.size * page_size);
  }
  SelectPagesParams params{
      .scores = scores.as<float>(),
      .seq_lens = seq_lens.as<std::int32_t>(),
      .page_ids = page_ids.as<std::int32_t>(),
      .selected_lens = selected_lens.as<std::int32_t>(),
      .table = nullptr,
      .pages = nullptr,
      .stride_scores_b = scores.strides[0],
      .stride_scores_h = scores.strides[1],
      .stride_table_b = 0,
      .stride_table_h = 0,
      .batch = static_cast<std::int32_t>(B.size),
      .num_sets = static_cast<std::int32_t>(H.size),
      .num_pages = static_cast<std::int32_t>(P.size),
      .num_selected = static_cast<std::int32_t>(K.size),
      .page_size = static_cast<std::int32_t>(page_size),
      .num_recent = static_cast<std::int32_t>(num_recent),
      .num_sink = static_cast<std::int32_t>(num_sink),
  };
  add_pages(at, backend, scores, page_ids, table, table_name, pages, params);
  return params;
}

void select_pages(Backend backend, py::handle scores_, py::handle seq_lens_, py::handle page_ids_,
                  py::handle selected_lens_, std::int64_t page_size, std::int64_t num_recent,
                  std::int64_t num_sink, py::handle table, py::handle pages,
                  std::uintptr_t stream) {
  const Boundary at{"select_pages"};
  const TensorView scores = at.tensor("scores", scores_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);  // before what is made like it
  const TensorView page_ids = at.tensor("page_ids", page_ids_);
  const TensorView selected_lens = at.tensor("selected_lens", selected_lens_);
  const SelectPagesParams params =
      select_pages_params(at, backend, scores, seq_lens, page_ids, selected_lens, page_size,
                          num_recent, num_sink, table, "table", pages);
  run<cpu::select_pages, cuda::select_pages>(at, backend, params, scores.device, stream);
}

KVCOMP_OP(select_pages);

}  // namespace kvcomp
