#include "emulator/handover.h"

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace kvcomp::emulator::handover {
namespace {

// A set of releases, by number.
class Known {
 public:
  bool has(std::size_t i) const { return i / 64 < words_.size() && words_[i / 64] >> i % 64 & 1; }
  void add(std::size_t i) {
    words_.resize(std::max(words_.size(), i / 64 + 1));
    words_[i / 64] |= std::uint64_t{1} << i % 64;
  }
  void add(const Known& other) {
    words_.resize(std::max(words_.size(), other.words_.size()));
    for (std::size_t i = 0; i < other.words_.size(); ++i) words_[i] |= other.words_[i];
  }

 private:
  std::vector<std::uint64_t> words_;
};

struct Fence {
  View view;
  Known known;  // to whoever of the block sees the fence
};

struct Arrival {  // an atomic that may have read what others released
  View view;
  Known found;
};

struct Turn {  // of a block
  Time start;
  uint3 block;
  std::size_t first_fence, first_release;
};

// Of this launch. A release is an atomic behind a fence.
std::vector<Turn> turns;
std::vector<Fence> fences;
std::vector<View> releases;
std::vector<Arrival> arrivals;                  // of the running block
std::unordered_map<const void*, Known> chains;  // by the atomics' address: what is released there

const Turn& turn_of(Event event) {
  const auto later = [](Time time, const Turn& turn) { return time < turn.start; };
  return *--std::upper_bound(turns.begin(), turns.end(), event.time, later);
}

// Whether use(number) holds for one of the releases that hand on an event.
template <typename Use>
bool any_release(Event event, const Use& use) {
  const Turn& turn = turn_of(event);
  const bool last = &turn == &turns.back();
  const std::size_t past_release = last ? releases.size() : (&turn)[1].first_release;
  const std::size_t past_fence = last ? fences.size() : (&turn)[1].first_fence;
  for (std::size_t i = turn.first_release; i < past_release; ++i) {
    const bool covered = std::any_of(
        fences.begin() + turn.first_fence, fences.begin() + past_fence, [&](const Fence& fence) {
          return releases[i].sees(fence.view.event()) && fence.view.sees(event);
        });
    if (covered && use(i)) return true;
  }
  return false;
}

template <typename Use>
void for_each_fence_before(const View& view, const Use& use) {
  for (std::size_t i = turns.back().first_fence; i < fences.size(); ++i) {
    if (view.sees(fences[i].view.event())) use(fences[i]);
  }
}

}  // namespace

void begin_launch() {
  turns.clear();
  fences.clear();
  releases.clear();
  chains.clear();
}

void begin_block() {
  arrivals.clear();
  if (!turns.empty()) {
    for (std::size_t i = turns.back().first_fence; i < fences.size(); ++i) fences[i].known = {};
  }
  turns.push_back({order::block_start(), blockIdx, fences.size(), releases.size()});
}

void fence() {
  Fence fence{order::mine(), {}};
  order::advance();
  for (const Arrival& arrival : arrivals) {
    if (fence.view.sees(arrival.view.event())) fence.known.add(arrival.found);
  }
  for_each_fence_before(fence.view, [&](const Fence& other) { fence.known.add(other.known); });
  fences.push_back(std::move(fence));
}

void atomic(const void* word) {
  const View me = order::mine();
  order::advance();
  const auto chain = chains.find(word);
  if (chain != chains.end()) arrivals.push_back({me, chain->second});
  bool fenced = false;
  Known handed_on;
  for_each_fence_before(me, [&](const Fence& fence) {
    fenced = true;
    handed_on.add(fence.known);
  });
  if (!fenced) return;
  handed_on.add(releases.size());
  releases.push_back(me);
  chains[word].add(handed_on);
}

bool is_released(Event event) {
  return any_release(event, [](std::size_t) { return true; });
}

bool is_acquired(Event event, const View& me) {
  return any_release(event, [&](std::size_t i) {
    bool acquired = false;
    for_each_fence_before(me, [&](const Fence& fence) { acquired |= fence.known.has(i); });
    return acquired;
  });
}

const uint3& block_of(Event event) { return turn_of(event).block; }

}  // namespace kvcomp::emulator::handover
