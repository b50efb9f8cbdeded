#include "emulator/access.h"

#include <cstdint>
#include <string>

#include "emulator/block.h"
#include "emulator/fiber.h"
#include "emulator/global_memory.h"
#include "emulator/shared_memory.h"

// Where the linker put this module.
extern "C" __attribute__((visibility("hidden"))) unsigned char __ehdr_start[], _end[];

namespace kvcomp::emulator {
namespace {

// The launchers beside the kernels are compiled like them, and may run in another thread.
bool is_of_kernel(const void* address) {
  return kWatched && Fiber::is_on_stack(__builtin_frame_address(0)) && !Fiber::is_on_stack(address);
}

bool is_global(const void* address) {  // and not shared memory, or variables of the emulator
  const std::size_t offset = static_cast<const unsigned char*>(address) - __ehdr_start;
  return offset >= static_cast<std::size_t>(_end - __ehdr_start);
}

}  // namespace

void access(const void* address, std::size_t size, Access kind) {
  if (!is_of_kernel(address)) return;
  if (is_global(address)) {
    global_memory::access(address, size, kind);
  } else if (shared_memory::holds(address)) {
    shared_memory::access(address, size, kind);
  }
}

void late_read(const void* address, std::size_t size, Time since) {
  if (!is_of_kernel(address)) return;
  if (is_global(address)) global_memory::late_read(address, size, since);
}

}  // namespace kvcomp::emulator

#pragma GCC visibility push(hidden)
extern "C" {

// --- -fsanitize=thread ---------------------------------------------------------------------------

using kvcomp::emulator::Access;
using kvcomp::emulator::access;

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

// --- -fsanitize=alignment ------------------------------------------------------------------------

struct TypeMismatch {
  const char* file;
  std::uint32_t line, column;
  const struct {
    std::uint16_t kind, info;
    char name[1];  // in quotes
  }* type;
  unsigned char log_alignment, what;
};

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* mismatch, const void*) {
  using kvcomp::emulator::Fiber;
  if (!Fiber::is_on_stack(__builtin_frame_address(0))) return;
  const std::string file = mismatch->file;
  kvcomp::emulator::fail(
      "touches a " + std::string(mismatch->type->name) + " at an address that is not aligned to " +
      std::to_string(1 << mismatch->log_alignment) + " bytes (" + file.substr(file.rfind('/') + 1) +
      ":" + std::to_string(mismatch->line) + ")");
}

}  // extern "C"
#pragma GCC visibility pop
