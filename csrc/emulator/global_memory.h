// Global memory under watch: what the threads of a launch do to the same bytes, one of them
// writing, must be in an order that holds on a GPU. Blocks run in turn here, so without this a
// kernel that lacks a fence would give right numbers.
//
//   * In a block, barriers and __syncwarp make that order, as in shared memory.
//   * From block to block nothing does but a handover: see handover.h.
//   * Atomics on the same bytes never conflict with one another.
//   * Launches are in the order of their stream.
//
// Two writes of one value are a conflict too. Fences of a block's scope and volatile accesses put
// nothing in order.
#pragma once

#include <cstddef>

#include "emulator/access.h"
#include "emulator/order.h"

namespace kvcomp::emulator::global_memory {

void begin_launch();
void access(const void* address, std::size_t size, Access kind);
void late_read(const void* address, std::size_t size, Time since);  // see access.h

}  // namespace kvcomp::emulator::global_memory
