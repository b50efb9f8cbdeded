#include "emulator/block.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "emulator/async_copy.h"
#include "emulator/fiber.h"
#include "emulator/global_memory.h"
#include "emulator/handover.h"
#include "emulator/order.h"
#include "emulator/shared_memory.h"

namespace kvcomp::emulator {
namespace {

enum class State { ready, at_barrier, at_collective, returned };

struct Thread {
  explicit Thread(unsigned rank) : fiber(rank) {}

  Fiber fiber;
  uint3 index;
  State state;
  // Where it waits, and with what.
  const char* what;
  Where where;
  bool predicate;
  Votes votes;
  unsigned mask;
  void* operands;

  bool waits_like(const Thread& other) const {
    return state == other.state && what == other.what && where.line() == other.where.line() &&
           where.file_name() == other.where.file_name();
  }
};

// One launch at a time: threadIdx and the static shared arrays exist once.
std::mutex launching;
std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch, for their stacks
const std::function<void()>* body;
const char* kernel;
unsigned num_threads, num_live;  // of the running block
Thread* running = nullptr;
unsigned running_rank;
std::string failure;
std::exception_ptr exception;

std::string to_text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string to_text(const Where& where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string message(const Thread* thread, const std::string& what) {
  return std::string("kvcomp cuda-host: kernel ") + kernel + ", block " + to_text(blockIdx) +
         (thread ? ", thread " + to_text(thread->index) : "") + ": " + what;
}

void wait(State state) {
  running->state = state;
  running->fiber.suspend();
}

void thread_main(void*) {
  try {
    (*body)();
  } catch (...) {
    exception = std::current_exception();
  }
  running->state = State::returned;
  running->what = nullptr;
  running->where = {};
  --num_live;
}

Thread* lane(unsigned warp_start, unsigned lane) {
  return warp_start + lane < num_threads ? threads[warp_start + lane].get() : nullptr;
}

// Who waits where, one clause for each place. Only called when nobody can go on.
std::string who_waits() {
  std::string text;
  for (unsigned i = 0; i < num_threads; ++i) {
    const Thread& thread = *threads[i];
    const auto same = [&](unsigned j) { return threads[j]->waits_like(thread); };
    unsigned first = 0, count = 0;
    while (!same(first)) ++first;
    if (first < i) continue;
    for (unsigned j = i; j < num_threads; ++j) count += same(j);
    text += (text.empty() ? "thread " : "; thread ") + to_text(thread.index);
    if (count > 1) text += " and " + std::to_string(count - 1) + " more";
    if (thread.state == State::returned) {
      text += " returned";
      continue;
    }
    text += std::string(" at ") + thread.what;
    if (thread.state == State::at_collective) {
      char mask[16];
      std::snprintf(mask, sizeof mask, "0x%08x", thread.mask);
      text += std::string(" of lanes ") + mask;
    }
    text += " (" + to_text(thread.where) + ")";
  }
  return text;
}

void release_barrier() {
  const Thread* first = nullptr;
  Votes votes{0, static_cast<int>(num_live)};
  for (unsigned i = 0; i < num_threads; ++i) {
    const Thread& thread = *threads[i];
    if (thread.state != State::at_barrier) continue;
    if (!first) first = &thread;
    if (!thread.waits_like(*first)) {
      throw std::runtime_error(
          message(&thread, "the block is split over barriers: " + who_waits()));
    }
    votes.yes += thread.predicate;
  }
  for (unsigned i = 0; i < num_threads; ++i) {
    if (threads[i]->state != State::at_barrier) continue;
    threads[i]->votes = votes;
    threads[i]->state = State::ready;
  }
  order::order_block();
}

// Which block has its turn when: in ascending, descending and mixed order, launch by launch.
struct Order {
  const std::uint64_t count;
  std::uint64_t step = 1, first = 0;

  explicit Order(std::uint64_t num_blocks) : count(num_blocks) {
    static unsigned launches = 0;
    switch (launches++ % 3) {
      case 0: break;
      case 1: step = first = count - 1; break;
      case 2:
        step = count / 2 + count / 8 + 1;
        while (std::gcd(step, count) != 1) ++step;
    }
  }

  std::uint64_t block(std::uint64_t turn) const { return (first + turn % count * step) % count; }
};

void run_block() {
  num_live = num_threads;
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread& thread = *threads[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread.state = State::ready;
    thread.fiber.start(&thread_main, nullptr);
  }
  order::begin_block();
  shared_memory::begin_block();
  handover::begin_block();
  async_copy::begin_block();
  while (num_live > 0) {
    bool progress = false;
    unsigned at_barrier = 0;
    for (unsigned i = 0; i < num_threads; ++i) {
      Thread& thread = *threads[i];
      if (thread.state == State::ready) {
        progress = true;
        running = &thread;
        running_rank = i;
        threadIdx = thread.index;
        thread.fiber.resume();
        running = nullptr;
        if (exception) std::rethrow_exception(std::exchange(exception, nullptr));
        if (!failure.empty()) throw std::runtime_error(std::exchange(failure, {}));
      }
      at_barrier += thread.state == State::at_barrier;
    }
    if (at_barrier > 0 && at_barrier == num_live) {
      release_barrier();
    } else if (!progress) {
      const auto stuck = std::find_if(threads.begin(), threads.begin() + num_threads,
                                      [](auto& t) { return t->state != State::returned; });
      throw std::runtime_error(message(stuck->get(), "waits for ever: " + who_waits()));
    }
  }
}

}  // namespace

void run_grid(const char* kernel_name, dim3 grid, dim3 block, std::size_t shared_bytes,
              const std::function<void()>& thread) {
  const std::lock_guard lock(launching);
  kernel = kernel_name;
  body = &thread;
  gridDim = grid;
  blockDim = block;
  blockIdx = {0, 0, 0};
  const std::uint64_t size = std::uint64_t{block.x} * block.y * block.z;
  if (size == 0 || size > Fiber::kMost || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > shared_memory::kMaxDynamic) {
    throw std::runtime_error(
        message(nullptr, "invalid launch: grid " + to_text({grid.x, grid.y, grid.z}) + ", block " +
                             to_text({block.x, block.y, block.z}) + ", shared bytes " +
                             std::to_string(shared_bytes)));
  }
  num_threads = static_cast<unsigned>(size);
  while (threads.size() < num_threads) threads.push_back(std::make_unique<Thread>(threads.size()));
  shared_memory::begin_launch(shared_bytes);
  global_memory::begin_launch();
  handover::begin_launch();
  const Order order(std::uint64_t{grid.x} * grid.y * grid.z);
  for (std::uint64_t turn = 0; turn < order.count; ++turn) {
    const std::uint64_t rank = order.block(turn);
    blockIdx = {static_cast<unsigned>(rank % grid.x), static_cast<unsigned>(rank / grid.x % grid.y),
                static_cast<unsigned>(rank / grid.x / grid.y)};
    run_block();
  }
}

// Does not throw from here: device code is compiled by the rules of code that does not expect it,
// and nothing on a fiber's stack needs to be destroyed.
void fail(const std::string& what, const Where* where) {
  failure = message(running, what + (where ? " (" + to_text(*where) + ")" : ""));
  while (true) running->fiber.suspend();
}

unsigned thread_rank() { return running_rank; }

unsigned live_lanes() {
  unsigned mask = 0;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    const Thread* thread = lane(running_rank / kWarpSize * kWarpSize, i);
    if (thread && thread->state != State::returned) mask |= 1u << i;
  }
  return mask;
}

Votes block_barrier(const char* what, bool predicate, Where where) {
  running->what = what;
  running->where = where;
  running->predicate = predicate;
  wait(State::at_barrier);
  return running->votes;
}

void warp_collective(const char* what, unsigned mask, void* operands, Evaluate evaluate,
                     Where where) {
  const unsigned warp_start = running_rank / kWarpSize * kWarpSize;
  if (!(mask >> (running_rank - warp_start) & 1)) {
    fail(std::string(what) + ": its mask lacks its own lane", &where);
  }
  running->what = what;
  running->where = where;
  running->mask = mask;
  running->operands = operands;
  running->state = State::at_collective;
  void* all[kWarpSize] = {};
  // From the last lane on: it is the one that comes last.
  for (unsigned left = mask; left;) {
    const unsigned i = std::bit_width(left) - 1;
    left &= ~(1u << i);
    const Thread* thread = lane(warp_start, i);
    if (!thread || !thread->waits_like(*running) || thread->mask != mask) {
      wait(State::at_collective);
      return;
    }
    all[i] = thread->operands;
  }
  evaluate(mask, all);
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (mask >> i & 1) threads[warp_start + i]->state = State::ready;
  }
}

}  // namespace kvcomp::emulator
