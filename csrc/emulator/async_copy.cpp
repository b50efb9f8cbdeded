#include "emulator/async_copy.h"

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "emulator/access.h"
#include "emulator/shared_memory.h"

namespace kvcomp::emulator::async_copy {
namespace {

constexpr std::size_t kBytes = 16;

struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
  Time asked;
};

struct Thread {
  std::vector<Copy> asked;
  std::deque<std::vector<Copy>> groups;
};

std::vector<Thread> threads;

Thread& mine() {
  if (threads.size() <= thread_rank()) threads.resize(thread_rank() + 1);
  return threads[thread_rank()];
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kBytes == 0;
}

}  // namespace

void begin_block() { threads.clear(); }

void ask(void* shared, const void* from, bool wanted, Where where) {
  if (!is_aligned(shared) || !is_aligned(from)) {
    fail("copy_async: an address that is not aligned to 16 bytes", &where);
  }
  shared_memory::blur(shared, kBytes);
  if (wanted) access(from, kBytes, Access::read);
  order::advance();
  mine().asked.push_back({shared, wanted ? from : nullptr, order::now()});
}

void end_group() {
  Thread& thread = mine();
  thread.groups.push_back(std::move(thread.asked));
  thread.asked.clear();
}

void wait(int later) {
  Thread& thread = mine();
  for (; thread.groups.size() > static_cast<std::size_t>(later); thread.groups.pop_front()) {
    for (const Copy& copy : thread.groups.front()) {
      access(copy.to, kBytes, Access::write);
      if (copy.from) {
        late_read(copy.from, kBytes, copy.asked);
        std::memcpy(copy.to, copy.from, kBytes);
      } else {
        std::memset(copy.to, 0, kBytes);
      }
    }
  }
}

}  // namespace kvcomp::emulator::async_copy
