// Launch: what the launcher in a .cuh is given to start its kernel on a device's stream.
#pragma once

#ifndef __CUDACC__
#include "emulator/cuda.h"  // which has its own

namespace kvcomp::cuda {
using emulator::Launch;
using emulator::Occupancy;
}  // namespace kvcomp::cuda
#else

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
    allow(kernel, shared_bytes);
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, args...), "launch");
  }

  template <typename Kernel>
  void allow(Kernel* kernel, std::size_t shared_bytes) const {
    constexpr std::size_t kWithoutAsking = 48 * 1024;
    if (shared_bytes <= kWithoutAsking) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
  }

  void check(cudaError_t error, const char* what) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the next call starts clean
    throw std::runtime_error(std::string("kvcomp.") + op_ + ": " + what +
                             " failed: " + cudaGetErrorString(error));
  }

 private:
  const char* op_;
  cudaStream_t stream_;
  int previous_ = 0;
  bool switched_ = false;
};

// In place of a Launch: leaves how many blocks of the last kernel a multiprocessor takes at once.
class Occupancy {
 public:
  Occupancy(const char* op, int device, int& blocks) : launch_(op, device, 0), blocks_(blocks) {}

  template <typename... Params>
  void operator()(void (*kernel)(Params...), dim3, dim3 block, std::size_t shared_bytes,
                  std::type_identity_t<Params>...) const {
    launch_.allow(kernel, shared_bytes);
    const auto threads = static_cast<int>(block.x * block.y * block.z);
    launch_.check(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_, kernel, threads, shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  }

 private:
  Launch launch_;
  int& blocks_;
};

}  // namespace kvcomp::cuda

#endif
