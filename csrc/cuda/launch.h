// Launch: what the launcher in a .cuh is given to start its kernel on a device's stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace kvcomp::cuda {

class Launch {
 public:
  Launch(const char* op, int device, std::uintptr_t stream)
      : op_(op), stream_(reinterpret_cast<cudaStream_t>(stream)) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    switched_ = previous_ != device;
  }
  ~Launch() {
    if (switched_) cudaSetDevice(previous_);
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  template <typename... Params>
  void operator()(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                  std::type_identity_t<Params>... args) const {
    if (shared_bytes > kSharedWithoutAsking) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            "cudaFuncSetAttribute");
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, args...), "launch");
  }

 private:
  static constexpr std::size_t kSharedWithoutAsking = 48 * 1024;

  void check(cudaError_t error, const char* what) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the next call starts clean
    throw std::runtime_error(std::string("kvcomp.") + op_ + ": " + what +
                             " failed: " + cudaGetErrorString(error));
  }

  const char* op_;
  cudaStream_t stream_;
  int previous_ = 0;
  bool switched_ = false;
};

}  // namespace kvcomp::cuda
