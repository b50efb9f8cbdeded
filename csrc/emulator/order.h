// What a thread may rely on of what others of its block did: the order that barriers make, by a
// clock that counts synchronisations. Blocks run in turn, so a time also tells the block.
#pragma once

#include <cstdint>
#include <string>

namespace kvcomp::emulator {

using Time = std::uint32_t;  // 0 is before any launch
// A rank in the block, or several threads of one warp, or several of several warps.
using Who = std::uint16_t;
inline constexpr Who kOfWarp = 1024, kAnyone = 2048;

struct Event {
  Time time = 0;
  Who who = 0;
  bool atomic = false;
};

// Of a thread at some time: what came before.
struct View {
  Time time, block_order, warp_order;
  Who who;

  bool shares_warp(Event event) const {
    return event.who != kAnyone &&
           (event.who < kOfWarp ? event.who / 32 : event.who - kOfWarp) == who / 32;
  }
  // Whether an event of the same block is surely over.
  bool sees(Event event) const {
    return event.time < block_order || (event.who == who && event.time <= time) ||
           (event.time < warp_order && shares_warp(event));
  }
  Event event(bool atomic = false) const { return {time, who, atomic}; }
  // The latest readers, now that this thread is one of them.
  Event with(Event readers) const {
    return {time, sees(readers)          ? who
                  : shares_warp(readers) ? static_cast<Who>(kOfWarp + who / 32)
                                         : kAnyone};
  }
};

namespace order {

void begin_block();
void order_block();  // what any thread did is seen by all
void order_warp();   // what any lane of the running warp did is seen by its lanes
void advance();      // what the running thread does from now on is later

Time now();
Time block_start();
View mine();  // of the running thread

}  // namespace order

std::string name(Who who);

}  // namespace kvcomp::emulator
