// The native boundary: a view of a torch tensor that needs nothing of torch, and the checks that
// every op makes before a pointer reaches a kernel.
//
//   const Boundary at{"page_scores"};
//   const TensorView logits = at.tensor("logits", logits_), lse = at.tensor("lse", lse_);
//   Dim B{"B"}, Hq{"Hq"}, N{"N"};
//   at.device(backend, {&logits, &lse});
//   at.dtype(logits, {DType::f32});
//   at.last_contiguous(logits);
//   at.shape(logits, {B, Hq, N});  // the first use of a Dim takes its size, later ones compare
//   at.shape(lse, {B, Hq});
//
// A failed check throws TypeError or ValueError:
//   kvcomp.page_scores: argument 'lse': expected shape [B=2, Hq=8], got [2, 7]
#pragma once

#include <pybind11/pytypes.h>  // not all of pybind11, which takes seconds to compile

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "backend.h"
#include "kvcomp/params.h"

namespace kvcomp {

namespace py = pybind11;

enum class DType : std::uint8_t { f32, f16, bf16, f64, i8, i32, i64, u8, boolean };

const char* name(DType dtype);  // as torch calls it

struct Device {
  bool is_cuda = false;
  int index = 0;  // 0 on the CPU
  bool operator==(const Device&) const = default;
};

inline constexpr int kMaxDims = 6;

// What a kernel needs to know of a tensor. Borrowed: valid while the caller holds the tensor.
struct TensorView {
  const char* name;  // of the argument, for messages
  void* data;
  int ndim;
  DType dtype;
  Device device;
  std::array<std::int64_t, kMaxDims> shape;    // [ndim]
  std::array<std::int64_t, kMaxDims> strides;  // [ndim], in elements

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// A named size that several arguments share.
struct Dim {
  const char* name;
  std::int64_t size = -1;  // unknown until an argument's shape gives it
};

inline constexpr std::int64_t kAny = -1;

// What a shape expects of one dimension: a Dim, a number, or kAny.
struct Size {
  Size(Dim& dim) : dim(&dim) {}
  Size(std::int64_t number) : number(number) {}

  Dim* dim = nullptr;
  std::int64_t number = kAny;
};

// Looks up what views need of torch. Once, when the extension is imported.
void load_torch();

// How a tensor is read: the DLPack exchange API where torch has it, else attributes. Tests ask for
// each; ops take the default.
enum class ViewThrough { best, dlpack, attributes };

// The boundary of one op. All checks name the op and the argument, what was expected, and what
// came.
struct Boundary {
  const char* op;

  TensorView tensor(const char* argument, py::handle object,
                    ViewThrough through = ViewThrough::best) const;
  // Nothing for None.
  std::optional<TensorView> optional(const char* argument, py::handle object) const;

  // All on one device, of the kind that the backend computes on.
  void device(Backend backend, std::initializer_list<const TensorView*> views) const;
  void dtype(const TensorView& view, std::initializer_list<DType> allowed) const;
  // float32, float16 or bfloat16: what the kernels compute on.
  ScalarType scalar_type(const TensorView& view) const;
  void same_dtype(const TensorView& view, const TensorView& other) const;
  void last_contiguous(const TensorView& view) const;
  void contiguous(const TensorView& view) const;
  void shape(const TensorView& view, std::initializer_list<Size> expected) const;

  // For conditions of an op's own: `if (page_size < 1) at.fail("page_size", "at least 1",
  // page_size)`.
  [[noreturn]] void fail(const char* argument, const std::string& expected,
                         const std::string& got) const;
  [[noreturn]] void fail(const char* argument, const std::string& expected,
                         std::int64_t got) const {
    fail(argument, expected, std::to_string(got));
  }
};

}  // namespace kvcomp
