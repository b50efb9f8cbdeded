// Atomics on global and shared memory: one thread runs at a time, so plain code is atomic.
#pragma once

#include <type_traits>

#include "emulator/access.h"

namespace kvcomp::emulator {

// Returns the old value. Not instrumented: it reports its one access itself.
template <typename T, typename Update>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T* address, Update update) {
  access(address, sizeof(T), Access::atomic);
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace kvcomp::emulator

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return kvcomp::emulator::atomic(address, [value](T old) { return T(old + value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return kvcomp::emulator::atomic(address, [value](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return kvcomp::emulator::atomic(address, [value](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return kvcomp::emulator::atomic(address, [value](T) { return value; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return kvcomp::emulator::atomic(address, [value](T old) { return T(old | value); });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return kvcomp::emulator::atomic(address, [value](T old) { return T(old & value); });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return kvcomp::emulator::atomic(
      address, [expected, value](T old) { return old == expected ? value : old; });
}
