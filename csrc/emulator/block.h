// The execution model: blocks run in turn, in an order that changes from launch to launch, and the
// threads of a block as fibers that pause where a CUDA thread would wait. A wait that cannot end,
// and every other misuse, becomes an exception that launch() throws, naming the kernel, the block,
// the thread and the lines in question.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

#include "emulator/builtins.h"

namespace kvcomp::emulator {

inline constexpr unsigned kWarpSize = 32;
using Where = std::source_location;

// Runs `thread` once for every thread of every block.
void run_grid(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
              const std::function<void()>& thread);

// For device code's mistakes: ends the launch with a std::runtime_error that says who did it. A
// debugger's breakpoint here shows the line.
[[noreturn]] void fail(const std::string& what, const Where* where = nullptr);

unsigned thread_rank();  // of the running thread in its block
unsigned live_lanes();   // of the running warp: those that have not returned

// Waits for all live threads of the block; returns for how many of them the predicate held.
struct Votes {
  int yes, all;
};
Votes block_barrier(const char* what, bool predicate, Where where);

// Waits for the lanes named in mask, each with its operands. When the last one has come, `evaluate`
// runs once with all of them, reads what the lanes brought and writes what they take away. This is
// the host meaning of every warp-wide instruction, up to matrix tiles.
using Evaluate = void (*)(unsigned mask, void* const operands[kWarpSize]);
void warp_collective(const char* what, unsigned mask, void* operands, Evaluate evaluate,
                     Where where);

// As above, with the operands' type: evaluate(lanes) gets an array of pointers, null outside mask.
template <typename Operands>
using Lanes = Operands* const*;

template <typename Operands, typename F>
Operands warp_collective(const char* what, unsigned mask, Operands mine, F, Where where) {
  static_assert(std::is_empty_v<F>, "evaluate() sees all lanes: it must not capture one of them");
  const Evaluate evaluate = [](unsigned named, void* const operands[kWarpSize]) {
    Operands* lanes[kWarpSize];
    for (unsigned i = 0; i < kWarpSize; ++i) {
      lanes[i] = named >> i & 1 ? static_cast<Operands*>(operands[i]) : nullptr;
    }
    F{}(lanes);
  };
  warp_collective(what, mask, static_cast<void*>(&mine), evaluate, where);
  return mine;
}

}  // namespace kvcomp::emulator
