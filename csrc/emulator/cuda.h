// CUDA device code as C++: what kvcomp/device.cuh includes where the compiler is not nvcc.
#pragma once

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__) && !defined(__clang__)
#error "compile emulated kernels with -fsanitize=thread,alignment (see access.h) or =address"
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "emulator/atomic.h"
#include "emulator/block.h"
#include "emulator/builtins.h"
#include "emulator/half.h"
#include "emulator/shared_memory.h"
#include "emulator/warp.h"

namespace kvcomp {

// The host meaning of the function in device.cuh.
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::shared_memory::dynamic());
}

namespace emulator {

// What a launcher in a .cuh is given here; see cuda/launch.h for its twin. There is one device,
// which is done when a launch returns.
class Launch {
 public:
  constexpr explicit Launch(const char* op, int = 0, std::uintptr_t = 0) : op_(op) {}

  template <typename... Params>
  void operator()(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                  std::type_identity_t<Params>... args) const {
    // Not instrumented: that the kernel gets copies of its arguments is no access of its own.
    run_grid(op_, grid, block, shared_bytes,
             [&]() __attribute__((no_sanitize("thread"))) { kernel(args...); });
  }

 private:
  const char* op_;
};

// Here a block runs alone.
class Occupancy {
 public:
  Occupancy(const char*, int, int& blocks) { blocks = 1; }

  template <typename... Params>
  void operator()(void (*)(Params...), dim3, dim3, std::size_t,
                  std::type_identity_t<Params>...) const {}
};

}  // namespace emulator
}  // namespace kvcomp
