#include "emulator/global_memory.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/block.h"
#include "emulator/handover.h"

namespace kvcomp::emulator::global_memory {
namespace {

struct Cell {
  Event write;
  Event read;     // the latest readers, of the latest block that has any
  Event earlier;  // a reader of a block before: one that never released it if there is one
};

constexpr unsigned kPageBits = 12;
constexpr std::uintptr_t kPageBytes = 1 << kPageBits;

// A cell per 4 bytes, until an access needs smaller ones.
struct Page {
  unsigned grain_bits = 2;
  std::vector<Cell> cells = std::vector<Cell>(kPageBytes >> grain_bits);

  void split(unsigned bits) {
    std::vector<Cell> smaller(kPageBytes >> bits);
    for (std::size_t i = 0; i < smaller.size(); ++i) smaller[i] = cells[i >> (grain_bits - bits)];
    cells = std::move(smaller);
    grain_bits = bits;
  }
};

std::unordered_map<std::uintptr_t, Page> pages;
struct Recent {
  std::uintptr_t number = 0;
  Page* page = nullptr;
} recent[64];  // by the low bits of a page's number

Page& page_of(std::uintptr_t address) {
  const std::uintptr_t number = address >> kPageBits;
  auto& entry = recent[number % std::size(recent)];
  if (!entry.page || entry.number != number) entry = {number, &pages[number]};
  return *entry.page;
}

// use(cell) for all that an access touches.
template <typename Use>
void for_each_cell(const void* from, std::size_t size, const Use& use) {
  auto address = reinterpret_cast<std::uintptr_t>(from);
  for (const std::uintptr_t end = address + size; address < end;) {
    Page& page = page_of(address);
    const std::uintptr_t first = address % kPageBytes;
    const std::uintptr_t past = std::min(first + (end - address), kPageBytes);
    while ((first | past) & ((1u << page.grain_bits) - 1)) page.split(page.grain_bits - 1);
    for (std::uintptr_t i = first >> page.grain_bits; i < past >> page.grain_bits; ++i) {
      use(page.cells[i]);
    }
    address += past - first;
  }
}

Time launch_start;

bool in_launch(Event event) { return event.time >= launch_start; }

bool is_ordered(Event event, const View& me) {
  return !in_launch(event) || (event.time >= order::block_start() && me.sees(event)) ||
         handover::is_acquired(event, me);
}

[[noreturn]] void fail_conflict(Access kind, Event event, const char* did) {
  std::string whose, why = "with no barrier in between";
  if (event.time < order::block_start()) {
    const uint3& block = handover::block_of(event);
    whose = " of block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
            std::to_string(block.z) + ")";
    why = handover::is_released(event)
              ? "which this thread has not acquired (an atomic on the same word, "
                "__threadfence, a barrier if by another thread)"
              : "which that block has not released (a barrier if by another thread, "
                "__threadfence, an atomic)";
  }
  fail(std::string(kind == Access::read ? "reads" : "writes") + " global memory that " +
       name(event.who) + whose + " " + did + ", " + why);
}

void touch(Cell& cell, Access kind, const View& me) {
  const bool both_atomic = cell.write.atomic && kind == Access::atomic;
  if (!both_atomic && !is_ordered(cell.write, me)) fail_conflict(kind, cell.write, "wrote");
  if (kind == Access::read) {
    if (cell.read.time >= order::block_start()) {
      cell.read = me.with(cell.read);
      return;
    }
    if (in_launch(cell.read) && (!in_launch(cell.earlier) || handover::is_released(cell.earlier))) {
      cell.earlier = cell.read;
    }
    cell.read = me.event();
    return;
  }
  for (const Event& read : {cell.read, cell.earlier}) {
    if (!is_ordered(read, me)) fail_conflict(kind, read, "read");
  }
  cell = {.write = me.event(kind == Access::atomic), .read = {}, .earlier = {}};
}

}  // namespace

void begin_launch() {
  launch_start = order::now() + 1;
  pages.clear();
  std::fill(std::begin(recent), std::end(recent), Recent{});
}

void access(const void* address, std::size_t size, Access kind) {
  const View me = order::mine();
  for_each_cell(address, size, [&](Cell& cell) { touch(cell, kind, me); });
  if (kind == Access::atomic) handover::atomic(address);
}

void late_read(const void* address, std::size_t size, Time since) {
  const View me = order::mine();
  for_each_cell(address, size, [&](Cell& cell) {
    if (cell.write.time >= since) {
      fail("copies global memory that " + name(cell.write.who) + " wrote before the copy was over");
    }
    touch(cell, Access::read, me);
  });
}

}  // namespace kvcomp::emulator::global_memory
