// What threads do together: barriers, warp exchanges and votes, atomics.
#pragma once

#include <type_traits>

#include "emulator/block.h"
#include "emulator/handover.h"
#include "emulator/order.h"

// --- barriers ----------------------------------------------------------------------------------

#define KVCOMP_WHERE kvcomp::emulator::Where where = kvcomp::emulator::Where::current()

inline void __syncthreads(KVCOMP_WHERE) {
  kvcomp::emulator::block_barrier("__syncthreads", false, where);
}
inline int __syncthreads_count(int predicate, KVCOMP_WHERE) {
  return kvcomp::emulator::block_barrier("__syncthreads_count", predicate, where).yes;
}
inline int __syncthreads_or(int predicate, KVCOMP_WHERE) {
  return kvcomp::emulator::block_barrier("__syncthreads_or", predicate, where).yes > 0;
}
inline int __syncthreads_and(int predicate, KVCOMP_WHERE) {
  const auto votes = kvcomp::emulator::block_barrier("__syncthreads_and", predicate, where);
  return votes.yes == votes.all;
}

// One thread runs at a time and sees all memory in order: these are for those who watch it.
inline void __threadfence() { kvcomp::emulator::handover::fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { __threadfence(); }

inline void __syncwarp(unsigned mask = ~0u, KVCOMP_WHERE) {
  using namespace kvcomp::emulator;
  warp_collective<int>("__syncwarp", mask, 0, [](Lanes<int>) { order::order_warp(); }, where);
}

// --- exchanges ---------------------------------------------------------------------------------

namespace kvcomp::emulator {

inline int lane_id() { return static_cast<int>(thread_rank() % kWarpSize); }

// The lane's value as `source` has it; a lane outside the segment of `width` keeps its own.
template <typename T>
T shuffle(const char* what, unsigned mask, T value, int source, Where where) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  struct Operands {
    T value, received;
    int source;
  };
  if (!(mask >> source & 1)) {
    fail(std::string(what) + ": reads lane " + std::to_string(source) + ", which its mask lacks",
         &where);
  }
  const auto evaluate = [](Lanes<Operands> lanes) {
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (lanes[i]) lanes[i]->received = lanes[lanes[i]->source]->value;
    }
  };
  return warp_collective<Operands>(what, mask, {value, value, source}, evaluate, where).received;
}

// One result for all lanes: `combine` of all values, starting with the first.
template <typename T, typename Combine>
T reduce(const char* what, unsigned mask, T value, Combine, Where where) {
  const auto evaluate = [](Lanes<T> lanes) {
    const T* first = nullptr;
    T result{};
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (!lanes[i]) continue;
      result = first ? Combine{}(result, *lanes[i]) : *lanes[i];
      first = lanes[i];
    }
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (lanes[i]) *lanes[i] = result;
    }
  };
  return warp_collective<T>(what, mask, value, evaluate, where);
}

}  // namespace kvcomp::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, KVCOMP_WHERE) {
  const int segment = kvcomp::emulator::lane_id() & -width;
  return kvcomp::emulator::shuffle("__shfl_sync", mask, value, segment | (source & (width - 1)),
                                   where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, KVCOMP_WHERE) {
  const int lane = kvcomp::emulator::lane_id(), source = lane ^ lanes;
  const bool later = source >= (lane & -width) + width;  // an earlier segment may be read
  return kvcomp::emulator::shuffle("__shfl_xor_sync", mask, value, later ? lane : source, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, KVCOMP_WHERE) {
  const int lane = kvcomp::emulator::lane_id(), source = lane + static_cast<int>(delta);
  const bool outside = source >= (lane & -width) + width;
  return kvcomp::emulator::shuffle("__shfl_down_sync", mask, value, outside ? lane : source, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, KVCOMP_WHERE) {
  const int lane = kvcomp::emulator::lane_id(), source = lane - static_cast<int>(delta);
  const bool outside = source < (lane & -width);
  return kvcomp::emulator::shuffle("__shfl_up_sync", mask, value, outside ? lane : source, where);
}

// --- votes and reductions ------------------------------------------------------------------------

inline unsigned __ballot_sync(unsigned mask, int predicate, KVCOMP_WHERE) {
  const unsigned bit = predicate ? 1u << kvcomp::emulator::lane_id() : 0;
  return kvcomp::emulator::reduce(
      "__ballot_sync", mask, bit, [](unsigned a, unsigned b) { return a | b; }, where);
}
inline int __any_sync(unsigned mask, int predicate, KVCOMP_WHERE) {
  return kvcomp::emulator::reduce(
      "__any_sync", mask, predicate != 0, [](bool a, bool b) { return a || b; }, where);
}
inline int __all_sync(unsigned mask, int predicate, KVCOMP_WHERE) {
  return kvcomp::emulator::reduce(
      "__all_sync", mask, predicate != 0, [](bool a, bool b) { return a && b; }, where);
}
// As if the live lanes of a warp had never diverged: what code may hope for, never rely on.
inline unsigned __activemask() { return kvcomp::emulator::live_lanes(); }

template <typename T>
T __reduce_add_sync(unsigned mask, T value, KVCOMP_WHERE) {
  return kvcomp::emulator::reduce(
      "__reduce_add_sync", mask, value, [](T a, T b) { return a + b; }, where);
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, KVCOMP_WHERE) {
  return kvcomp::emulator::reduce(
      "__reduce_min_sync", mask, value, [](T a, T b) { return b < a ? b : a; }, where);
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, KVCOMP_WHERE) {
  return kvcomp::emulator::reduce(
      "__reduce_max_sync", mask, value, [](T a, T b) { return a < b ? b : a; }, where);
}
#undef KVCOMP_WHERE
