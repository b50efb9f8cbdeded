// Shared memory under watch.
//
// A __shared__ array is a static one; dynamic shared memory is one buffer. Three mistakes that
// often go unseen on a GPU end the launch:
//   * reading bytes that no thread of the block has written;
//   * two threads at the same bytes, one of them writing, with no barrier or __syncwarp in between;
//   * dynamic shared memory past the launch's size.
#pragma once

#include <cstddef>

#include "emulator/access.h"

namespace kvcomp::emulator::shared_memory {

inline constexpr std::size_t kMaxDynamic = 227 * 1024;  // of compute capability 9.0

void* dynamic();
void begin_launch(std::size_t dynamic_bytes);
void begin_block();  // nothing is written
bool holds(const void* address);
void access(const void* address, std::size_t size, Access kind);

// From now until its next write nobody can know what is there.
void blur(void* address, std::size_t size);

}  // namespace kvcomp::emulator::shared_memory
