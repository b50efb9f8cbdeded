#include "cuda_host/emulator/shared_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda_host/emulator/block.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// Where the linker put this module's zero-initialised variables. The kernels' only ones are their
// shared arrays (threadIdx and its like start as something else to stay out of the way).
extern "C" __attribute__((visibility("hidden"))) unsigned char __bss_start[], _end[];

namespace kvcomp::cuda_host::shared_memory {
namespace {

// Without reports of plain accesses, those of atomics alone would tell a wrong story.
#if defined(__SANITIZE_ADDRESS__) || defined(__clang__)
constexpr bool kWatched = false;
#else
constexpr bool kWatched = true;
#endif

// Who a reader is: a rank in the block, or several of one warp, or several of several warps.
using Who = std::uint16_t;
constexpr Who kOfWarp = 1024, kAnyone = 2048;

// What is known of one byte. Times are counts of synchronisations: 0 is before any block.
struct Byte {
  std::uint32_t write_time, read_time;
  Who writer, reader;
  bool atomic;  // the write
};

alignas(1024) unsigned char dynamic_buffer[kMaxDynamic];
std::size_t dynamic_size;

std::uint32_t now = 0, block_start, block_order;
std::uint32_t warp_order[1024 / kWarpSize];

Byte* bytes() {  // one for each of [__bss_start, _end); pages never touched cost nothing
  static Byte* all = static_cast<Byte*>(std::calloc(_end - __bss_start, sizeof(Byte)));
  return all;
}

unsigned warp_of(Who who) { return who < kOfWarp ? who / kWarpSize : who - kOfWarp; }

bool same_warp(Who who, Who me) { return who != kAnyone && warp_of(who) == me / kWarpSize; }

// Whether the running thread may rely on what `who` did at that time.
bool ordered(std::uint32_t time, Who who, Who me) {
  return time < block_order || who == me ||
         (same_warp(who, me) && time < warp_order[me / kWarpSize]);
}

std::string name(Who who) {
  if (who < kOfWarp) return "thread " + std::to_string(who);
  return who < kAnyone ? "warp " + std::to_string(who - kOfWarp) : "several warps";
}

[[noreturn]] void fail_race(Access kind, const char* did, Who who) {
  fail(std::string(kind == Access::read ? "reads" : "writes") + " shared memory that " + name(who) +
       " " + did + ", with no barrier in between");
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
  block_start = block_order = ++now;
  std::fill(std::begin(warp_order), std::end(warp_order), now);
  std::fill_n(dynamic_buffer, dynamic_size, 0xff);  // NaN in every floating type
}

void order_block() { block_order = ++now; }

void order_warp() { warp_order[thread_rank() / kWarpSize] = ++now; }

void access(const void* address, std::size_t size, Access kind) {
  const std::size_t offset = static_cast<const unsigned char*>(address) - __bss_start;
  if (!kWatched || offset >= static_cast<std::size_t>(_end - __bss_start) || !in_kernel()) return;
  const std::size_t dynamic_offset = static_cast<const unsigned char*>(address) - dynamic_buffer;
  if (dynamic_offset < kMaxDynamic && dynamic_offset + size > dynamic_size) {
    fail("touches byte " + std::to_string(dynamic_offset + size - 1) +
         " of dynamic shared memory; the launch asked for " + std::to_string(dynamic_size));
  }
  const Who me = static_cast<Who>(thread_rank());
  Byte* const first = bytes() + offset;
  for (Byte* byte = first; byte != first + size; ++byte) {
    const bool written = byte->write_time >= block_start;
    if (!written && kind != Access::write) {
      fail("reads shared memory that no thread of the block has written");
    }
    if (written && !(byte->atomic && kind == Access::atomic) &&
        !ordered(byte->write_time, byte->writer, me)) {
      fail_race(kind, "wrote", byte->writer);
    }
    const bool unordered_reader =
        byte->read_time >= block_start && !ordered(byte->read_time, byte->reader, me);
    if (kind == Access::read) {
      byte->reader = !unordered_reader             ? me
                     : same_warp(byte->reader, me) ? Who(kOfWarp + me / kWarpSize)
                                                   : kAnyone;
      byte->read_time = now;
    } else {
      if (unordered_reader) fail_race(kind, "read", byte->reader);
      byte->writer = me;
      byte->write_time = now;
      byte->atomic = kind == Access::atomic;
    }
  }
}

void blur(void* address, std::size_t size) {
  access(address, size, Access::write);
  std::memset(address, 0xff, size);  // NaN in every floating type
  const std::size_t offset = static_cast<unsigned char*>(address) - __bss_start;
  if (!kWatched || offset >= static_cast<std::size_t>(_end - __bss_start)) return;
  for (std::size_t i = 0; i < size; ++i) bytes()[offset + i].write_time = 0;
}

}  // namespace kvcomp::cuda_host::shared_memory

// --- what the compiler calls at every access of a kernel ----------------------------------------

#pragma GCC visibility push(hidden)
extern "C" {

using kvcomp::cuda_host::Access;
using kvcomp::cuda_host::shared_memory::access;

#define KVCOMP_ACCESSES_OF(SIZE)                                                           \
  void __tsan_read##SIZE(void* address) { access(address, SIZE, Access::read); }           \
  void __tsan_write##SIZE(void* address) { access(address, SIZE, Access::write); }         \
  void __tsan_unaligned_read##SIZE(void* address) { access(address, SIZE, Access::read); } \
  void __tsan_unaligned_write##SIZE(void* address) { access(address, SIZE, Access::write); }
KVCOMP_ACCESSES_OF(1)
KVCOMP_ACCESSES_OF(2)
KVCOMP_ACCESSES_OF(4)
KVCOMP_ACCESSES_OF(8)
KVCOMP_ACCESSES_OF(16)
#undef KVCOMP_ACCESSES_OF

void __tsan_read_range(void* address, std::size_t size) { access(address, size, Access::read); }
void __tsan_write_range(void* address, std::size_t size) { access(address, size, Access::write); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"
#pragma GCC visibility pop
