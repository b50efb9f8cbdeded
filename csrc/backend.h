// Which implementation a native entry runs. Every op's entry is, in csrc/ops/<op>.cpp,
//
//   void page_scores(Backend, py::handle tensors..., scalars..., std::uintptr_t stream);
//
// It builds views, checks them, fills the op's params and calls the implementation.
#pragma once

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
