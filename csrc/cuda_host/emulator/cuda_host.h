// CUDA device code as C++: what kvcomp/device.cuh includes where the compiler is not nvcc.
#pragma once

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__) && !defined(__clang__)
#error "compile emulated kernels with -fsanitize=thread,alignment (see access.h) or =address"
#endif

#include <cstddef>

#include "cuda_host/emulator/atomic.h"
#include "cuda_host/emulator/block.h"
#include "cuda_host/emulator/builtins.h"
#include "cuda_host/emulator/half.h"
#include "cuda_host/emulator/shared_memory.h"
#include "cuda_host/emulator/warp.h"

namespace kvcomp {

// The host meaning of the function in device.cuh.
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_host::shared_memory::dynamic());
}

namespace cuda_host {

// What a launcher in a .cuh is given here; see cuda/launch.h for its twin.
struct Launch {
  const char* op;

  template <typename... Params>
  void operator()(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                  std::type_identity_t<Params>... args) const {
    // Not instrumented: that the kernel gets copies of its arguments is no access of its own.
    run_grid(op, grid, block, shared_bytes,
             [&]() __attribute__((no_sanitize("thread"))) { kernel(args...); });
  }
};

}  // namespace cuda_host
}  // namespace kvcomp
