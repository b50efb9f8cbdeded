// run: how every native entry ends, once it has checked its arguments.
//
//   run<cpu::page_scores, cuda::page_scores>(at, backend, params, q.device, stream);
#pragma once

#include <pybind11/gil_simple.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "backend.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops/register.h"
#include "tensor.h"

namespace kvcomp {

// The kernel of `backend` on `params`; for Backend::check none. A CUDA kernel goes to the stream of
// the device; not every op has one.
template <auto cpu, auto cuda = nullptr, typename Params>
void run(const Boundary& at, Backend backend, const Params& params, Device device = {},
         std::uintptr_t stream = 0) {
  if (backend == Backend::check) return;
  // Python's lock is let go for every kernel, as torch lets it go for each of its ops. The sizes
  // decide how long a kernel takes, and a launch waits where the stream's queue is full; meanwhile
  // other threads must get on: a server's, or those that move K and V to the host's memory.
  const py::gil_scoped_release_simple released;
  if constexpr (!kEmulated) {
    if (backend == Backend::cpu) return cpu(params);
  }
  if constexpr (kWithCuda && !std::is_null_pointer_v<decltype(cuda)>) {
    if (backend == Backend::cuda) return cuda(params, device.index, stream);
  }
  throw std::logic_error(std::string("kvcomp.") + at.op + ": this build has no such kernel");
}

}  // namespace kvcomp
