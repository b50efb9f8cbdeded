// Which implementation a native entry runs. Every op's entry is, in csrc/ops/<op>.cpp,
//
//   void page_scores(Backend, py::handle tensors..., scalars..., std::uintptr_t stream);
//
// It builds views, checks them, fills the op's params and calls the implementation.
#pragma once

namespace kvcomp {

// check stops after the checks: the Triton and reference paths use it, so that each check is
// written once.
enum class Backend { check, cpu, cuda };

#ifdef KVCOMP_WITH_CUDA
inline constexpr bool kWithCuda = true;
#else
inline constexpr bool kWithCuda = false;
#endif

// In the tests' module (csrc/emulated) cuda means the same code, but under the emulator and on CPU
// tensors; there is nothing else in it.
#ifdef KVCOMP_EMULATED
inline constexpr bool kEmulated = true;
#else
inline constexpr bool kEmulated = false;
#endif

}  // namespace kvcomp
