// Fiber: a stack of its own that runs a function and can pause in the middle of it.
#pragma once

#include <cstddef>

namespace kvcomp::cuda_host {

class Fiber {
 public:
  using Entry = void (*)(void* argument);

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() enters entry(argument). Whatever ran on this stack before is forgotten, and
  // with it the objects there: a fiber may be abandoned in the middle.
  void start(Entry entry, void* argument);
  void resume();   // from outside: runs the fiber until it pauses or ends
  void suspend();  // from inside: pauses it

 private:
  static void run(Fiber* self);

  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  void* mapping_;               // a guard page, then the stack
  void* inside_ = nullptr;      // saved context of the fiber
  void* outside_ = nullptr;     // saved context of whoever resumed it
  void* fake_stack_ = nullptr;  // AddressSanitizer's, of whoever is paused
  const void* outside_stack_ = nullptr;
  std::size_t outside_stack_size_ = 0;
};

}  // namespace kvcomp::cuda_host
