// Fiber: a stack of its own that runs a function and can pause in the middle of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvcomp::emulator {

class Fiber {
 public:
  using Entry = void (*)(void* argument);

  static constexpr unsigned kMost = 1024;

  explicit Fiber(unsigned number);  // 0, 1, ... kMost - 1: each has its stack
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() enters entry(argument). Whatever ran on this stack before is forgotten, and
  // with it the objects there: a fiber may be abandoned in the middle.
  void start(Entry entry, void* argument);
  void resume();   // from outside: runs the fiber until it pauses or ends
  void suspend();  // from inside: pauses it

  static bool is_on_stack(const void* address) {  // of any of them
    return reinterpret_cast<std::uintptr_t>(address) - stacks_ < stacks_size_;
  }

 private:
  static void run(Fiber* self);

  static inline std::uintptr_t stacks_ = 0, stacks_size_ = 0;

  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  char* stack_;                 // behind a guard page
  void* inside_ = nullptr;      // saved context of the fiber
  void* outside_ = nullptr;     // saved context of whoever resumed it
  void* fake_stack_ = nullptr;  // AddressSanitizer's, of whoever is paused
  const void* outside_stack_ = nullptr;
  std::size_t outside_stack_size_ = 0;
};

}  // namespace kvcomp::emulator
