// What the blocks of a launch hand on to one another.
//
// One block writes, then __threadfence, then an atomic: a release of what came before the fence.
// Another has an atomic on the same word, then __threadfence: from there on it has acquired that.
// Each step is by the thread before, or by one that a barrier puts behind it. The atomics on a word
// are a chain: who comes later has all that was released there, and with its own atomic hands on
// what it had before its fence.
//
// Blocks run in turn, so the events of each lie together in time and in the lists kept here.
#pragma once

#include "emulator/builtins.h"
#include "emulator/order.h"

namespace kvcomp::emulator::handover {

void begin_launch();
void begin_block();
void fence();
void atomic(const void* word);

bool is_released(Event event);
bool is_acquired(Event event, const View& me);  // released, and this thread knows
const uint3& block_of(Event event);

}  // namespace kvcomp::emulator::handover
