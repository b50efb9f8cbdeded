#include "emulator/async_copy.h"

#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "emulator/access.h"
#include "emulator/shared_memory.h"

namespace kvcomp::emulator::async_copy {
namespace {

struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
  std::size_t bytes;
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

bool is_aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

}  // namespace

void begin_block() { threads.clear(); }

void ask(void* shared, const void* from, std::size_t bytes, bool wanted, Where where) {
  if (!is_aligned(shared, bytes) || !is_aligned(from, bytes)) {
    fail("copy_async: an address that is not aligned to " + std::to_string(bytes) + " bytes",
         &where);
  }
  shared_memory::blur(shared, bytes);
  if (wanted) access(from, bytes, Access::read);
  order::advance();
  mine().asked.push_back({shared, wanted ? from : nullptr, bytes, order::now()});
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
      access(copy.to, copy.bytes, Access::write);
      if (copy.from) {
        late_read(copy.from, copy.bytes, copy.asked);
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
  }
}

}  // namespace kvcomp::emulator::async_copy
