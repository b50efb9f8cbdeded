// The native table of contents: one declaration and one m.def per op.
#include <pybind11/pybind11.h>

#include "backend.h"
#include "tensor.h"

namespace py = pybind11;

namespace kvcomp {

// One declaration per op; the definitions are csrc/ops/<op>.cpp.

}  // namespace kvcomp

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace kvcomp;

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
  //   m.def("page_scores", &page_scores);
}
