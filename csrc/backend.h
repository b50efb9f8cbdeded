// Which implementation a native entry runs. Every op's entry is, in csrc/ops/<op>.cpp,
//
//   void page_scores(Backend, py::handle tensors..., scalars..., std::uintptr_t stream);
//
// It builds views, checks them, fills the op's params and calls the implementation.
#pragma once

#include <pybind11/pybind11.h>

namespace kvcomp {

// check stops after the checks: the Triton and reference paths use it, so that each check is
// written once. cuda_host runs the CUDA device code under the emulator on the CPU.
enum class Backend { check, cpu, cuda, cuda_host };

#ifdef KVCOMP_WITH_CUDA
inline constexpr bool kWithCuda = true;
#else
inline constexpr bool kWithCuda = false;
#endif

}  // namespace kvcomp

// Python holds a Backend as a plain int, which costs a call a few nanoseconds.
template <>
struct pybind11::detail::type_caster<kvcomp::Backend> {
  PYBIND11_TYPE_CASTER(kvcomp::Backend, const_name("int"));

  bool load(handle source, bool) {
    if (!PyLong_Check(source.ptr())) return false;
    const long number = PyLong_AsLong(source.ptr());
    if (number < 0 || number > static_cast<long>(kvcomp::Backend::cuda_host)) {
      PyErr_Clear();
      return false;
    }
    value = static_cast<kvcomp::Backend>(number);
    return true;
  }

  static handle cast(kvcomp::Backend backend, return_value_policy, handle) {
    return PyLong_FromLong(static_cast<long>(backend));
  }
};
