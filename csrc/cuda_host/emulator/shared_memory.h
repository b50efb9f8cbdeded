// Shared memory under watch.
//
// A __shared__ array is a static one; dynamic shared memory is one buffer. Kernels are compiled
// with -fsanitize=thread but linked to the functions here instead of its runtime: the compiler
// reports every access, and three mistakes that often go unseen on a GPU end the launch:
//   * reading bytes that no thread of the block has written;
//   * two threads at the same bytes, one of them writing, with no barrier or __syncwarp in between;
//   * dynamic shared memory past the launch's size.
// AddressSanitizer cannot be combined with it. A build with that one has its redzones around every
// array, and dynamic shared memory that starts as NaN in each block. (Clang, whose reports differ,
// compiles kernels without either.)
#pragma once

#include <cstddef>

namespace kvcomp::cuda_host {

enum class Access { read, write, atomic };

namespace shared_memory {

inline constexpr std::size_t kMaxDynamic = 227 * 1024;  // of compute capability 9.0

void* dynamic();
void begin_launch(std::size_t dynamic_bytes);
void begin_block();  // nothing is written
void order_block();  // what any thread did is seen by all
void order_warp();   // what any lane of the running warp did is seen by its lanes

// One access of the running thread, for what the compiler does not report: atomics, bulk copies.
void access(const void* address, std::size_t size, Access kind);

// From now until its next write nobody can know what is there.
void blur(void* address, std::size_t size);

}  // namespace shared_memory
}  // namespace kvcomp::cuda_host
