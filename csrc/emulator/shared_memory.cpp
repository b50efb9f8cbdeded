#include "emulator/shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "emulator/block.h"
#include "emulator/order.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// Where the linker put this module's zero-initialised variables. The kernels' only ones are their
// shared arrays (threadIdx and its like start as something else to stay out of the way).
extern "C" __attribute__((visibility("hidden"))) unsigned char __bss_start[], _end[];

namespace kvcomp::emulator::shared_memory {
namespace {

struct Byte {
  Event write, read;
};

alignas(1024) unsigned char dynamic_buffer[kMaxDynamic];
std::size_t dynamic_size;

// There is one for each of [__bss_start, _end); pages never touched cost nothing.
Byte* bytes_at(const void* address) {
  static Byte* const all = static_cast<Byte*>(std::calloc(_end - __bss_start, sizeof(Byte)));
  return all + (static_cast<const unsigned char*>(address) - __bss_start);
}

[[noreturn]] void fail_race(Access kind, Event event, const char* did) {
  fail(std::string(kind == Access::read ? "reads" : "writes") + " shared memory that " +
       name(event.who) + " " + did + ", with no barrier in between");
}

}  // namespace

void* dynamic() { return dynamic_buffer; }

void begin_launch(std::size_t dynamic_bytes) {
  dynamic_size = dynamic_bytes;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(dynamic_buffer, kMaxDynamic);
  __asan_poison_memory_region(dynamic_buffer + dynamic_size, kMaxDynamic - dynamic_size);
#endif
}

void begin_block() {
  std::fill_n(dynamic_buffer, dynamic_size, 0xff);  // NaN in every floating type
}

bool holds(const void* address) {
  const std::size_t offset = static_cast<const unsigned char*>(address) - __bss_start;
  return offset < static_cast<std::size_t>(_end - __bss_start);
}

void access(const void* address, std::size_t size, Access kind) {
  const std::size_t dynamic_offset = static_cast<const unsigned char*>(address) - dynamic_buffer;
  if (dynamic_offset < kMaxDynamic && dynamic_offset + size > dynamic_size) {
    fail("touches byte " + std::to_string(dynamic_offset + size - 1) +
         " of dynamic shared memory; the launch asked for " + std::to_string(dynamic_size));
  }
  const View me = order::mine();
  const auto is_of_block = [](Event event) { return event.time >= order::block_start(); };
  Byte* const first = bytes_at(address);
  for (Byte* byte = first; byte != first + size; ++byte) {
    const bool written = is_of_block(byte->write);
    if (!written && kind != Access::write) {
      fail("reads shared memory that no thread of the block has written");
    }
    const bool both_atomic = byte->write.atomic && kind == Access::atomic;
    if (written && !both_atomic && !me.sees(byte->write)) fail_race(kind, byte->write, "wrote");
    if (kind == Access::read) {
      byte->read = me.with(byte->read);
    } else {
      if (is_of_block(byte->read) && !me.sees(byte->read)) fail_race(kind, byte->read, "read");
      byte->write = me.event(kind == Access::atomic);
    }
  }
}

void blur(void* address, std::size_t size) {
  emulator::access(address, size, Access::write);
  std::memset(address, 0xff, size);  // NaN in every floating type
  if (!kWatched || !holds(address)) return;
  for (std::size_t i = 0; i < size; ++i) bytes_at(address)[i].write = {};
}

}  // namespace kvcomp::emulator::shared_memory
