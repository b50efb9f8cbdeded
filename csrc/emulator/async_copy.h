// Asynchronous copies into shared memory, which happen as late as they may: when their thread waits
// for them. Until then nobody can read what is there, nor write what is copied.
#pragma once

#include <cstddef>

#include "emulator/block.h"

namespace kvcomp::emulator::async_copy {

void begin_block();
void ask(void* shared, const void* from, std::size_t bytes, bool wanted, Where where);  // or zeros
void end_group();
void wait(int later);  // for all groups of the running thread but the `later` latest

}  // namespace kvcomp::emulator::async_copy
