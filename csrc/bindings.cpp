// The native table of contents: one declaration and one m.def per op.
#include <pybind11/pybind11.h>

#include "backend.h"
#include "cpu/simd/rows.h"
#include "cuda/kernels.h"
#include "tensor.h"

// Python holds a Backend as a plain int, which costs a call a few nanoseconds.
template <>
struct pybind11::detail::type_caster<kvcomp::Backend> {
  PYBIND11_TYPE_CASTER(kvcomp::Backend, const_name("int"));

  bool load(handle source, bool) {
    if (!PyLong_Check(source.ptr())) return false;
    const Py_ssize_t number = PyLong_AsSsize_t(source.ptr());
    if (PyErr_Occurred()) PyErr_Clear();  // out of range: -1
    if (number < 0 || number > static_cast<Py_ssize_t>(kvcomp::Backend::cuda_host)) return false;
    value = static_cast<kvcomp::Backend>(number);
    return true;
  }

  static handle cast(kvcomp::Backend backend, return_value_policy, handle) {
    return PyLong_FromLong(static_cast<long>(backend));
  }
};

namespace py = pybind11;

namespace kvcomp {

// One declaration per op; the definitions are csrc/ops/<op>.cpp.
void attend_and_select(Backend backend, py::handle q, py::handle k, py::handle v,
                       py::handle seq_lens, py::handle page_ids, py::handle logits, py::handle out,
                       py::handle lse, py::handle scores, py::handle selected_ids,
                       py::handle selected_lens, std::int64_t page_size, double scale,
                       std::int64_t num_groups, bool use_max, std::int64_t num_recent,
                       std::int64_t num_sink, py::handle partial_out, py::handle partial_lse,
                       std::int64_t split_size, py::handle arrived, std::uintptr_t stream);
void attention_hits(Backend backend, py::handle logits, py::handle lse, py::handle seq_lens,
                    py::handle hits, double log_threshold, std::uintptr_t stream);
void compact_kv(Backend backend, py::handle k, py::handle v, py::handle state, py::handle victims,
                py::handle seq_lens, std::uintptr_t stream);
void decode_attention(Backend backend, py::handle q, py::handle k, py::handle v,
                      py::handle seq_lens, py::handle page_ids, py::handle logits, py::handle out,
                      py::handle lse, std::int64_t page_size, double scale, py::handle partial_out,
                      py::handle partial_lse, std::int64_t split_size, std::uintptr_t stream);
int decode_attention_blocks(py::handle q);
void fetch_rows(Backend backend, py::handle k, py::handle v, py::handle slot_rows,
                py::handle seq_lens, py::handle rows, py::handle first_local, py::handle active,
                py::handle pool, py::handle fetched, std::int64_t num_sinks, std::uintptr_t stream);
void kmeans(Backend backend, py::handle keys, py::handle first, py::handle last, py::handle labels,
            py::handle centroids, py::handle sizes, std::int64_t cluster_size, std::int64_t window,
            std::int64_t iterations, std::uintptr_t stream);
void merge_states(Backend backend, py::handle out_a, py::handle lse_a, py::handle out_b,
                  py::handle lse_b, py::handle out, py::handle lse, std::uintptr_t stream);
void page_scores(Backend backend, py::handle logits, py::handle lse, py::handle seq_lens,
                 py::handle out, std::int64_t page_size, std::int64_t num_groups, bool use_max,
                 std::uintptr_t stream);
void query_similarity(Backend backend, py::handle q, py::handle previous, py::handle similarity,
                      std::uintptr_t stream);
void recurrence_update(Backend backend, py::handle hits, py::handle last_hit, py::handle longest,
                       py::handle seq_lens, py::handle born, std::int64_t first_step,
                       std::uintptr_t stream);
void rotate_keys(Backend backend, py::handle k, py::handle cos, py::handle sin,
                 std::uintptr_t stream);
void segment_boundaries(Backend backend, py::handle similarity, py::handle lengths,
                        py::handle starts, py::handle num_units, py::handle num_indexed,
                        py::handle closed, py::handle triggered, double cut_below,
                        double retrieve_below, std::int64_t shortest, std::int64_t longest,
                        std::int64_t local, std::uintptr_t stream);
void select_pages(Backend backend, py::handle scores, py::handle seq_lens, py::handle page_ids,
                  py::handle selected_lens, std::int64_t page_size, std::int64_t num_recent,
                  std::int64_t num_sink, std::uintptr_t stream);
void select_units(Backend backend, py::handle scores, py::handle starts, py::handle num_indexed,
                  py::handle active, py::handle rows, std::int64_t budget, std::uintptr_t stream);
void select_victims(Backend backend, py::handle scores, py::handle positions, py::handle seq_lens,
                    py::handle kept_lens, py::handle victims, std::int64_t num_victims,
                    std::int64_t num_recent, std::uintptr_t stream);
void store_segments(Backend backend, py::handle k, py::handle v, py::handle slot_rows,
                    py::handle seq_lens, py::handle starts, py::handle num_units, py::handle closed,
                    py::handle pool, py::handle centroids, std::uintptr_t stream);
void unit_scores(Backend backend, py::handle q, py::handle centroids, py::handle starts,
                 py::handle num_indexed, py::handle active, py::handle scores, double scale,
                 std::uintptr_t stream);

}  // namespace kvcomp

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace kvcomp;
  load_torch();

  py::object backend = py::module_::import("types").attr("SimpleNamespace")();
  backend.attr("check") = Backend::check;
  backend.attr("cpu") = Backend::cpu;
  backend.attr("cuda") = Backend::cuda;
  backend.attr("cuda_host") = Backend::cuda_host;
  m.attr("Backend") = backend;

  m.def("build_info", [] {
    py::dict info;
    info["version"] = KVCOMP_VERSION;
    info["compiler"] = KVCOMP_COMPILER;
    info["cpu_isas"] = py::str(KVCOMP_CPU_ISAS).attr("split")();
    info["with_cuda"] = kWithCuda;
    info["cuda_version"] = KVCOMP_CUDA_VERSION;
    info["cuda_archs"] = py::str(KVCOMP_CUDA_ARCHS).attr("split")();
    info["sanitize"] = KVCOMP_SANITIZE;
    return info;
  });

  m.def("cpu_isa", [] { return simd::rows().isa; });

  m.def("cuda_driver_suffices", [] {
    if constexpr (kWithCuda) return cuda::driver_suffices();
    return true;
  });

  // How the boundary sees a tensor: for tests.
  m.def("view_tensor", [](py::handle tensor, bool dlpack) {
    const TensorView view = Boundary{"view_tensor"}.tensor(
        "tensor", tensor, dlpack ? ViewThrough::dlpack : ViewThrough::attributes);
    py::list shape, strides;
    for (int i = 0; i < view.ndim; ++i) {
      shape.append(view.shape[i]);
      strides.append(view.strides[i]);
    }
    return py::make_tuple(reinterpret_cast<std::uintptr_t>(view.data), shape, strides,
                          name(view.dtype), view.device.is_cuda ? "cuda" : "cpu");
  });

  // Ops, in the order of kvcomp/ops/__init__.py:
  m.def("attend_and_select", &attend_and_select);
  m.def("attention_hits", &attention_hits);
  m.def("compact_kv", &compact_kv);
  m.def("decode_attention", &decode_attention);
  m.def("decode_attention_blocks", &decode_attention_blocks);
  m.def("fetch_rows", &fetch_rows);
  m.def("kmeans", &kmeans);
  m.def("merge_states", &merge_states);
  m.def("page_scores", &page_scores);
  m.def("query_similarity", &query_similarity);
  m.def("recurrence_update", &recurrence_update);
  m.def("rotate_keys", &rotate_keys);
  m.def("segment_boundaries", &segment_boundaries);
  m.def("select_pages", &select_pages);
  m.def("select_units", &select_units);
  m.def("select_victims", &select_victims);
  m.def("store_segments", &store_segments);
  m.def("unit_scores", &unit_scores);
}
