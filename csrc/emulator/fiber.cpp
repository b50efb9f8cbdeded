#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__) || defined(KVCOMP_UCONTEXT)
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
static void __asan_unpoison_memory_region(const void*, std::size_t) {}
#endif

namespace kvcomp::emulator {
namespace {

constexpr std::size_t kStackSize = 128 * 1024;  // touched pages only are ever allocated

// --- contexts: prepare() makes one that enters run(fiber), switch_context() changes to one -------

#if defined(__x86_64__) && !defined(KVCOMP_UCONTEXT)

// Saves the registers that a call preserves on the stack, and the stack pointer in *from. With
// swapcontext, which makes a system call at every switch, device code runs about 8 times slower.
__attribute__((naked, noinline)) void switch_context(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "retq");
}

// What the first switch returns into: run and its argument come from the two saved registers.
__attribute__((naked, noinline)) void enter() { asm("movq %rbx, %rdi\n callq *%rbp\n ud2"); }

void prepare(void*& context, char* stack, void (*run)(Fiber*), Fiber* fiber) {
  auto* top = reinterpret_cast<std::uintptr_t*>(stack + kStackSize);  // 16-byte aligned
  // r15 r14 r13 r12 rbx rbp, return address, end of backtraces: a call from there is aligned.
  std::uintptr_t* saved = top - 9;
  saved[4] = reinterpret_cast<std::uintptr_t>(fiber);
  saved[5] = reinterpret_cast<std::uintptr_t>(run);
  saved[6] = reinterpret_cast<std::uintptr_t>(&enter);
  saved[7] = 0;
  context = saved;
}

void destroy(void*) {}

#else

void switch_context(void** from, void* to) {
  if (!*from) *from = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

void prepare(void*& context, char* stack, void (*run)(Fiber*), Fiber* fiber) {
  if (!context) context = new ucontext_t;
  auto* made = static_cast<ucontext_t*>(context);
  getcontext(made);
  made->uc_stack.ss_sp = stack;
  made->uc_stack.ss_size = kStackSize;
  const auto bits = reinterpret_cast<std::uintptr_t>(fiber);  // makecontext passes ints only
  using Run = void (*)(Fiber*);
  static Run entry;
  entry = run;
  makecontext(made, reinterpret_cast<void (*)()>(+[](unsigned high, unsigned low) {
                entry(reinterpret_cast<Fiber*>(std::uintptr_t{high} << 32 | low));
              }),
              2, static_cast<unsigned>(bits >> 32), static_cast<unsigned>(bits));
}

void destroy(void* context) { delete static_cast<ucontext_t*>(context); }

#endif

}  // namespace

// All stacks lie in one reservation, whose pages are unusable until asked for.
Fiber::Fiber(unsigned number) {
  const std::size_t pitch = getpagesize() + kStackSize;
  if (!stacks_) {
    void* all =
        mmap(nullptr, kMost * pitch, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    stacks_ = reinterpret_cast<std::uintptr_t>(all);
    stacks_size_ = kMost * pitch;
  }
  // The page before it stays as it is: an overflow faults instead of spreading.
  stack_ = reinterpret_cast<char*>(stacks_) + number * pitch + getpagesize();
  if (mprotect(stack_, kStackSize, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

Fiber::~Fiber() {
  destroy(inside_);
  destroy(outside_);
}

void Fiber::start(Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  fake_stack_ = nullptr;
  __asan_unpoison_memory_region(stack_, kStackSize);  // frames that were abandoned
  prepare(inside_, stack_, &Fiber::run, this);
}

void Fiber::resume() {
  void* outside_fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&outside_fake_stack, stack_, kStackSize);
  switch_context(&outside_, inside_);
  __sanitizer_finish_switch_fiber(outside_fake_stack, nullptr, nullptr);
}

void Fiber::suspend() {
  __sanitizer_start_switch_fiber(&fake_stack_, outside_stack_, outside_stack_size_);
  switch_context(&inside_, outside_);
  __sanitizer_finish_switch_fiber(fake_stack_, &outside_stack_, &outside_stack_size_);
}

void Fiber::run(Fiber* self) {
  __sanitizer_finish_switch_fiber(nullptr, &self->outside_stack_, &self->outside_stack_size_);
  self->entry_(self->argument_);
  // Null: AddressSanitizer may free what it kept for this stack.
  __sanitizer_start_switch_fiber(nullptr, self->outside_stack_, self->outside_stack_size_);
  switch_context(&self->inside_, self->outside_);
  __builtin_unreachable();
}

}  // namespace kvcomp::emulator
