#include "emulator/order.h"

#include <algorithm>
#include <iterator>

#include "emulator/block.h"

namespace kvcomp::emulator {
namespace order {
namespace {

Time time = 0, start, block_order;
Time warp_order[kOfWarp / kWarpSize];

}  // namespace

void begin_block() {
  start = block_order = ++time;
  std::fill(std::begin(warp_order), std::end(warp_order), time);
}

void order_block() { block_order = ++time; }

void order_warp() { warp_order[thread_rank() / kWarpSize] = ++time; }

void advance() { ++time; }

Time now() { return time; }

Time block_start() { return start; }

View mine() {
  const unsigned rank = thread_rank();
  return {time, block_order, warp_order[rank / kWarpSize], static_cast<Who>(rank)};
}

}  // namespace order

std::string name(Who who) {
  if (who < kOfWarp) return "thread " + std::to_string(who);
  return who < kAnyone ? "warp " + std::to_string(who - kOfWarp) : "several warps";
}

}  // namespace kvcomp::emulator
