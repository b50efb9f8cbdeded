// The module: what the build is, and the ops, which register themselves (ops/register.h).
#include <pybind11/pybind11.h>

#include "backend.h"
#include "cpu/simd/rows.h"
#include "cuda/kernels.h"
#include "kvcomp/head_sizes.h"
#include "ops/register.h"
#include "tensor.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace kvcomp;
  load_torch();

  py::object backend = py::module_::import("types").attr("SimpleNamespace")();
  backend.attr("check") = static_cast<int>(Backend::check);
  backend.attr("cpu") = static_cast<int>(Backend::cpu);
  backend.attr("cuda") = static_cast<int>(Backend::cuda);
  m.attr("Backend") = backend;

  py::list sizes;
  for (const int size : kHeadSizes) sizes.append(size);
  m.attr("head_sizes") = py::tuple(sizes);
  py::list unlike;
  for (const auto& [key, value] : kUnlikeSizes) unlike.append(py::make_tuple(key, value));
  m.attr("unlike_sizes") = py::tuple(unlike);

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

  add_natives(m);
}
