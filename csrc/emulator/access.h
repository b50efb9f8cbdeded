// Every access to memory, as the compiler reports it.
//
// Kernels are compiled with -fsanitize=thread,alignment but linked to the functions here instead of
// the sanitizers' runtimes. What a kernel touches is shared memory or global memory and goes to the
// watch over it, or lies on a thread's own stack or among the emulator's variables and is nobody's
// concern. A vector at an address that is no multiple of its size ends the launch here, as it would
// on a GPU.
//
// AddressSanitizer cannot be combined with it. A build with that one has its redzones around every
// array, and dynamic shared memory that starts as NaN in each block. (Clang, whose reports differ,
// compiles kernels without either.)
#pragma once

#include <cstddef>

#include "emulator/order.h"

namespace kvcomp::emulator {

// Without reports of plain accesses, those of atomics alone would tell a wrong story.
#if defined(__SANITIZE_ADDRESS__) || defined(__clang__)
inline constexpr bool kWatched = false;
#else
inline constexpr bool kWatched = true;
#endif

enum class Access { read, write, atomic };

// One access of the running thread, for what the compiler does not report: atomics, bulk copies.
void access(const void* address, std::size_t size, Access kind);

// A read of the running thread that happened at some time from `since` to now.
void late_read(const void* address, std::size_t size, Time since);

}  // namespace kvcomp::emulator
