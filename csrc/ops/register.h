// KVCOMP_OP(page_scores), the last line of csrc/ops/page_scores.cpp, makes page_scores a function
// of the extension. Python calls it with the arguments of the C++ function, by position.
//
// pybind11's m.def would do the same, for 3.5 s of compiling in every file that has one.
#pragma once

#include <pybind11/pytypes.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "backend.h"

namespace kvcomp {

namespace py = pybind11;

using Native = PyObject* (*)(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// Lists a function; add_natives, which bindings.cpp calls, adds all of them to the module.
bool add_native(const char* name, Native native);
void add_natives(py::handle module);

// What one argument is in C++. Throws py::type_error, or what Python raised.
template <typename T>
T from_python(PyObject* object);
template <>
inline py::handle from_python(PyObject* object) {
  return object;
}
template <>
std::int64_t from_python(PyObject* object);
template <>
std::uintptr_t from_python(PyObject* object);
template <>
double from_python(PyObject* object);
template <>
bool from_python(PyObject* object);
template <>
Backend from_python(PyObject* object);

inline PyObject* to_python(int number) { return PyLong_FromLong(number); }

// The Python exception for the C++ exception that is being handled. Returns null.
PyObject* raise_caught();

void check_count(Py_ssize_t count, std::size_t expected);

template <auto function>
struct Entry;

template <typename Result, typename... Args, Result (*function)(Args...)>
struct Entry<function> {
  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    try {
      check_count(count, sizeof...(Args));
      return call(arguments, std::index_sequence_for<Args...>());
    } catch (...) {
      return raise_caught();
    }
  }

  template <std::size_t... i>
  static PyObject* call(PyObject* const* arguments, std::index_sequence<i...>) {
    if constexpr (std::is_void_v<Result>) {
      function(from_python<Args>(arguments[i])...);
      Py_RETURN_NONE;
    } else {
      return to_python(function(from_python<Args>(arguments[i])...));
    }
  }
};

#define KVCOMP_OP(function)                             \
  [[maybe_unused]] static const bool function##_added = \
      add_native(#function, &Entry<&function>::call)

}  // namespace kvcomp
