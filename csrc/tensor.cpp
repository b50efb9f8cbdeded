#include "tensor.h"

#include <pybind11/cast.h>  // error_already_set needs it

#include <algorithm>
#include <stdexcept>

namespace kvcomp {

const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::f64: return "float64";
    case DType::i8: return "int8";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    case DType::u8: return "uint8";
    case DType::boolean: return "bool";
  }
  return "?";
}

namespace {

// --- DLPack's C exchange API -----------------------------------------------------------------
// The few declarations of its specification (version 1) that a borrowed view needs.

struct DlDevice {
  std::int32_t type, id;
};

struct DlDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t ndim;
  DlDataType dtype;
  const std::int64_t* shape;
  const std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DlExchangeApi {
  std::uint32_t major, minor;
  const DlExchangeApi* previous;
  void *allocate, *from_object, *to_object;    // owning exchange: not used here
  int (*borrow)(void* object, DlTensor* out);  // 0, or -1 with a Python exception set
  void* current_stream;
};

constexpr std::int32_t kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3;

std::optional<DType> dtype_of(DlDataType type) {
  enum Code : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
  if (type.lanes != 1) return std::nullopt;
  switch (type.code << 8 | type.bits) {
    case kFloat << 8 | 32: return DType::f32;
    case kFloat << 8 | 16: return DType::f16;
    case kBfloat << 8 | 16: return DType::bf16;
    case kFloat << 8 | 64: return DType::f64;
    case kInt << 8 | 8: return DType::i8;
    case kInt << 8 | 32: return DType::i32;
    case kInt << 8 | 64: return DType::i64;
    case kUInt << 8 | 8: return DType::u8;
    case kBool << 8 | 8: return DType::boolean;
  }
  return std::nullopt;
}

// --- torch, looked up once -------------------------------------------------------------------

// Python objects kept for the life of the process: never released, so no order of shutdown matters.
struct Torch {
  PyTypeObject* tensor_type;
  decltype(DlExchangeApi::borrow) borrow = nullptr;  // null where torch has no exchange API
  std::array<std::pair<PyObject*, DType>, 9> dtypes;
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
  PyObject* get_device = PyUnicode_InternFromString("get_device");

  Torch() {
    const auto torch = py::reinterpret_steal<py::object>(PyImport_ImportModule("torch"));
    if (!torch) throw py::error_already_set();
    py::object type = torch.attr("Tensor");
    if (py::hasattr(type, "__dlpack_c_exchange_api__")) {
      const py::object capsule = type.attr("__dlpack_c_exchange_api__");
      auto* api = static_cast<const DlExchangeApi*>(
          PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (!api) throw py::error_already_set();
      while (api && api->major > 1) api = api->previous;
      if (api && api->major == 1) borrow = api->borrow;
    }
    tensor_type = reinterpret_cast<PyTypeObject*>(type.release().ptr());
    for (std::size_t i = 0; i < dtypes.size(); ++i) {
      const auto dtype = static_cast<DType>(i);
      dtypes[i] = {py::object(torch.attr(name(dtype))).release().ptr(), dtype};
    }
  }

  static const Torch& get() {
    static const Torch* torch = new Torch;
    return *torch;
  }
};

std::string text(py::handle object) { return py::str(object); }

// --- the two ways to read a tensor: false where the dtype has no name here ---------------------

bool view_through_dlpack(py::handle tensor, TensorView& view) {
  DlTensor from;
  if (Torch::get().borrow(tensor.ptr(), &from) != 0) throw py::error_already_set();
  if (from.ndim > kMaxDims) throw std::invalid_argument("more than 6 dimensions");
  if (from.device.type < kDlCpu || from.device.type > kDlCudaHost) {
    throw std::invalid_argument("one on " + text(tensor.attr("device")));
  }
  view.data = static_cast<char*>(from.data) + from.byte_offset;
  view.ndim = from.ndim;
  // Pinned host memory may be reported as CUDA's: to the ops it is plain CPU memory.
  view.device.is_cuda = from.device.type == kDlCuda;
  view.device.index = view.device.is_cuda ? from.device.id : 0;
  for (int i = 0; i < from.ndim; ++i) {
    view.shape[i] = from.shape[i];
    view.strides[i] = from.strides[i];
  }
  const std::optional<DType> dtype = dtype_of(from.dtype);
  if (dtype) view.dtype = *dtype;
  return dtype.has_value();
}

py::object call(py::handle object, PyObject* method) {
  PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), method);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object attribute(py::handle object, PyObject* attribute) {
  PyObject* result = PyObject_GetAttr(object.ptr(), attribute);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

bool view_through_attributes(py::handle tensor, TensorView& view) {
  const Torch& torch = Torch::get();
  const py::object shape = attribute(tensor, torch.shape), strides = call(tensor, torch.stride);
  const py::ssize_t ndim = PyTuple_GET_SIZE(shape.ptr());
  if (ndim > kMaxDims) throw std::invalid_argument("more than 6 dimensions");
  view.device.is_cuda = attribute(tensor, torch.is_cuda).ptr() == Py_True;
  if (!view.device.is_cuda && attribute(tensor, torch.is_cpu).ptr() != Py_True) {
    throw std::invalid_argument("one on " + text(tensor.attr("device")));
  }
  view.device.index = view.device.is_cuda
                          ? static_cast<int>(PyLong_AsLong(call(tensor, torch.get_device).ptr()))
                          : 0;
  view.data = PyLong_AsVoidPtr(call(tensor, torch.data_ptr).ptr());
  view.ndim = static_cast<int>(ndim);
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    view.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
  }
  const py::object found = attribute(tensor, torch.dtype);
  for (const auto& [object, dtype] : torch.dtypes) {
    if (object == found.ptr()) {
      view.dtype = dtype;
      return true;
    }
  }
  return false;
}

bool is_empty(const TensorView& view) {
  return std::find(view.shape.begin(), view.shape.begin() + view.ndim, 0) !=
         view.shape.begin() + view.ndim;
}

// --- messages ----------------------------------------------------------------------------------

std::string message(const char* op, const char* argument, const std::string& expected,
                    const std::string& got) {
  return std::string("kvcomp.") + op + ": argument '" + argument + "': expected " + expected +
         ", got " + got;
}

template <typename Items, typename Print>
std::string bracketed(const Items& items, std::size_t count, Print print) {
  std::string result = "[";
  for (std::size_t i = 0; i < count; ++i) result += (i ? ", " : "") + print(std::data(items)[i]);
  return result + "]";
}

std::string bracketed(const std::array<std::int64_t, kMaxDims>& numbers, int count) {
  return bracketed(numbers, count, [](std::int64_t number) { return std::to_string(number); });
}

std::string to_text(const Size& size) {
  if (size.dim && size.dim->size < 0) return size.dim->name;
  if (size.dim) return std::string(size.dim->name) + "=" + std::to_string(size.dim->size);
  return size.number == kAny ? "*" : std::to_string(size.number);
}

std::string to_text(Device device) {
  return device.is_cuda ? "cuda:" + std::to_string(device.index) : "cpu";
}

}  // namespace

void load_torch() { Torch::get(); }

TensorView Boundary::tensor(const char* argument, py::handle object, ViewThrough through) const {
  const Torch& torch = Torch::get();
  if (!PyObject_TypeCheck(object.ptr(), torch.tensor_type)) {
    throw py::type_error(message(op, argument, "a torch.Tensor", Py_TYPE(object.ptr())->tp_name));
  }
  const bool dlpack = torch.borrow && through != ViewThrough::attributes;
  TensorView view;
  view.name = argument;
  try {
    if (dlpack ? view_through_dlpack(object, view) : view_through_attributes(object, view)) {
      if (!view.data && !is_empty(view)) throw std::invalid_argument("one without memory");
      return view;
    }
  } catch (const py::error_already_set&) {  // a sparse or meta tensor, of which torch says pages
    fail(argument, "a dense CPU or CUDA tensor",
         text(object.attr("layout")) + " on " + text(object.attr("device")));
  } catch (const std::exception& error) {
    fail(argument, "a dense CPU or CUDA tensor", error.what());
  }
  throw py::type_error(
      message(op, argument, "a real or integer dtype", text(object.attr("dtype"))));
}

std::optional<TensorView> Boundary::optional(const char* argument, py::handle object) const {
  if (object.is_none()) return std::nullopt;
  return tensor(argument, object);
}

void Boundary::device(Backend backend, std::initializer_list<const TensorView*> views) const {
  const TensorView& first = **views.begin();
  if (backend == Backend::cuda && !kWithCuda) {
    throw std::invalid_argument(std::string("kvcomp.") + op + ": this build has no CUDA kernels");
  }
  const bool on_gpu = backend == Backend::cuda && !kEmulated;
  if (backend != Backend::check && first.device.is_cuda != on_gpu) {
    fail(first.name, on_gpu ? "a CUDA tensor" : "a CPU tensor", "one on " + to_text(first.device));
  }
  for (const TensorView* view : views) {
    if (view->device != first.device) {
      fail(view->name, std::string("the device of '") + first.name + "', " + to_text(first.device),
           to_text(view->device));
    }
  }
}

void Boundary::dtype(const TensorView& view, std::initializer_list<DType> allowed) const {
  for (const DType dtype : allowed) {
    if (view.dtype == dtype) return;
  }
  std::string expected;
  for (const DType dtype : allowed)
    expected += (expected.empty() ? "" : " or ") + std::string(name(dtype));
  throw py::type_error(message(op, view.name, expected, name(view.dtype)));
}

ScalarType Boundary::scalar_type(const TensorView& view) const {
  dtype(view, {DType::f32, DType::f16, DType::bf16});
  if (view.dtype == DType::f32) return ScalarType::f32;
  return view.dtype == DType::f16 ? ScalarType::f16 : ScalarType::bf16;
}

void Boundary::same_dtype(const TensorView& view, const TensorView& other) const {
  if (view.dtype == other.dtype) return;
  const std::string expected =
      std::string("the dtype of '") + other.name + "', " + name(other.dtype);
  throw py::type_error(message(op, view.name, expected, name(view.dtype)));
}

void Boundary::last_contiguous(const TensorView& view) const {
  const int last = view.ndim - 1;
  if (last < 0 || view.strides[last] == 1 || view.shape[last] <= 1) return;
  fail(view.name, "the last dimension contiguous", "strides " + bracketed(view.strides, view.ndim));
}

void Boundary::contiguous(const TensorView& view) const {
  std::int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] == 0) return;
    if (view.shape[i] != 1 && view.strides[i] != stride) {
      fail(view.name, "a contiguous tensor",
           "shape " + bracketed(view.shape, view.ndim) + " with strides " +
               bracketed(view.strides, view.ndim));
    }
    stride *= view.shape[i];
  }
}

void Boundary::shape(const TensorView& view, std::initializer_list<Size> expected) const {
  bool fits = view.ndim == static_cast<int>(expected.size());
  int i = 0;
  for (const Size& size : expected) {
    if (!fits) break;
    const std::int64_t got = view.shape[i++];
    if (size.dim && size.dim->size < 0) size.dim->size = got;
    const std::int64_t want = size.dim ? size.dim->size : size.number;
    fits = want == got || (!size.dim && want == kAny);
  }
  if (fits) return;
  fail(view.name,
       "shape " + bracketed(expected, expected.size(), [](const Size& s) { return to_text(s); }),
       bracketed(view.shape, view.ndim));
}

void Boundary::fail(const char* argument, const std::string& expected,
                    const std::string& got) const {
  throw std::invalid_argument(message(op, argument, expected, got));
}

}  // namespace kvcomp
