#include "ops/register.h"

#include <pybind11/cast.h>  // error_already_set needs it

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvcomp {
namespace {

std::vector<PyMethodDef>& methods() {
  static std::vector<PyMethodDef> methods;
  return methods;
}

}  // namespace

bool add_native(const char* name, Native native) {
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(native));
  methods().push_back({name, function, METH_FASTCALL, nullptr});
  return true;
}

void add_natives(py::handle module) {
  methods().push_back({});  // the end of the list, which lives as long as the functions
  if (PyModule_AddFunctions(module.ptr(), methods().data()) != 0) throw py::error_already_set();
}

template <>
std::int64_t from_python(PyObject* object) {
  const long long number = PyLong_AsLongLong(object);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

template <>
std::uintptr_t from_python(PyObject* object) {
  const unsigned long long number = PyLong_AsUnsignedLongLong(object);
  if (number == ~0ull && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

template <>
double from_python(PyObject* object) {
  const double number = PyFloat_AsDouble(object);
  if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

template <>
bool from_python(PyObject* object) {
  if (!PyBool_Check(object)) throw py::type_error("kvcomp._C: expected True or False");
  return object == Py_True;
}

// Python holds a Backend as a plain int, which costs a call a few nanoseconds.
template <>
Backend from_python(PyObject* object) {
  const std::int64_t number = from_python<std::int64_t>(object);
  if (number < 0 || number > static_cast<std::int64_t>(Backend::cuda)) {
    throw py::type_error("kvcomp._C: expected one of Backend");
  }
  return static_cast<Backend>(number);
}

void check_count(Py_ssize_t count, std::size_t expected) {
  if (count == static_cast<Py_ssize_t>(expected)) return;
  throw py::type_error("kvcomp._C: expected " + std::to_string(expected) + " arguments, got " +
                       std::to_string(count));
}

PyObject* raise_caught() {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace kvcomp
