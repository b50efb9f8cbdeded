// Wanted rows that no slot holds are copied from the pool into slots that hold unwanted ones.
//
// First each head is planned: a map with a byte per row tells in one pass over the slots which ones
// are free, and in one over the wanted rows which are missing. Then the rows are copied, some
// at a time, so that few heads employ all threads. Bytes: the missing rows of K and V, read and
// written once, the moved ones as in compact_kv, and the lists.
#include <cstring>
#include <vector>

#include "kernels.h"
#include "moves.h"
#include "parallel.h"
#include "pool.h"

namespace kvcomp::cpu {
namespace {

// Selections are of units, whose rows are adjacent: eight(i) for eight such rows from i on, one(i)
// for a row by itself.
template <class Eight, class One>
void by_eights(const std::int32_t* rows, int count, Eight eight, One one) {
  for (int i = 0; i < count;) {
    if (i + 8 <= count && rows[i + 7] - rows[i] == 7) {
      eight(i);
      i += 8;
    } else {
      one(i++);
    }
  }
}

class Kernel {
 public:
  explicit Kernel(const FetchRowsParams& params)
      : p_(params), num_heads_(p_.batch * p_.num_heads) {}

  void run() {
    constexpr std::int64_t kGrain = 1 << 14;      // slots and rows to look at, worth a thread
    constexpr std::int64_t kCopyGrain = 1 << 17;  // bytes to copy, worth a thread
    static thread_local Workspace workspace;
    plan_size_ = kCounts + p_.num_wanted + p_.num_slots;
    plans_ = reinterpret_cast<std::int32_t*>(workspace.get(num_heads_ * plan_size_));

    const std::int64_t looks = std::int64_t{num_heads_} * (p_.num_slots + 2 * p_.num_wanted);
    int threads = std::min(num_heads_, num_threads(looks, kGrain));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int head = 0; head < num_heads_; ++head) make_plan(head);

    std::int64_t rows = 0;
    int most = 0;
    for (int head = 0; head < num_heads_; ++head) {
      const Plan plan = this->plan(head);
      p_.fetched[head] = plan.num_missing();
      rows += std::max(plan.num_missing(), plan.num_free());
      most = std::max(most, plan.num_missing());
    }
    const int pieces = std::max(1, (most + kPiece - 1) / kPiece);
    threads = num_threads(rows * (p_.k_bytes + p_.v_bytes), kCopyGrain);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int head = 0; head < num_heads_; ++head) {
      for (int piece = 0; piece < pieces; ++piece) {
        copy_missing(head, piece * kPiece);
        if (piece == 0) fill_holes(head);
      }
    }
    for (int b = 0; b < p_.batch; ++b) {
      const Plan first = plan(b * p_.num_heads);
      p_.seq_lens[b] += first.num_missing() - first.num_free();
    }
  }

 private:
  static constexpr int kCounts = 2, kPiece = 64;

  // What a head has to do: rows to fetch and slots to fill, both ascending.
  struct Plan {
    std::int32_t *counts, *missing, *free;
    std::int32_t& num_missing() const { return counts[0]; }
    std::int32_t& num_free() const { return counts[1]; }
  };

  // `head` counts over the batch.
  Plan plan(int head) const {
    std::int32_t* counts = plans_ + head * plan_size_;
    return {counts, counts + kCounts, counts + kCounts + p_.num_wanted};
  }

  std::int32_t* slot_rows(int head) const {
    return p_.slot_rows + head / p_.num_heads * p_.stride_rows_b +
           head % p_.num_heads * p_.stride_rows_h;
  }
  char* k(int head) const {
    return static_cast<char*>(p_.k) + head / p_.num_heads * p_.stride_k_b +
           head % p_.num_heads * p_.stride_k_h;
  }
  char* v(int head) const {
    return static_cast<char*>(p_.v) + head / p_.num_heads * p_.stride_v_b +
           head % p_.num_heads * p_.stride_v_h;
  }

  std::uint32_t* words(int head) const {
    if (!p_.words) return nullptr;
    return p_.words + head / p_.num_heads * p_.stride_words_b +
           head % p_.num_heads * p_.stride_words_h;
  }

  void make_plan(int head) const {
    const int batch = head / p_.num_heads;
    const Plan plan = this->plan(head);
    plan.num_missing() = plan.num_free() = 0;
    if (!p_.active[batch]) return;
    const std::int32_t* const wanted = p_.rows + std::int64_t{head} * p_.num_wanted;
    const std::int32_t* const held = slot_rows(head);
    std::int32_t *const missing = plan.missing, *const free = plan.free;
    const int num_wanted = static_cast<int>(
        std::partition_point(wanted, wanted + p_.num_wanted, [](int row) { return row >= 0; }) -
        wanted);
    const int length = p_.seq_lens[batch];
    const auto first = static_cast<std::uint32_t>(p_.num_sinks);
    const auto count =
        static_cast<std::uint32_t>(std::max(p_.first_local[batch] - p_.num_sinks, 0));

    // Of rows [first, first + count): 1 where one is wanted and not yet found. The byte behind
    // stands for all rows that stay wherever they are.
    constexpr std::uint8_t kStays = 2;
    static thread_local std::vector<std::uint8_t> marks;  // all 0 between heads
    if (marks.size() <= count) marks.resize(count + 1);
    std::uint8_t* const mark = marks.data();
    constexpr std::uint64_t kEight = 0x0101010101010101;
    by_eights(
        wanted, num_wanted, [=](int i) { std::memcpy(mark + (wanted[i] - first), &kEight, 8); },
        [=](int i) { mark[wanted[i] - first] = 1; });

    mark[count] = kStays;
    int num_free = 0;
    for (int slot = 0; slot < length; ++slot) {
      const std::uint32_t row = held[slot] - first;
      std::uint8_t& m = mark[std::min(row, count)];
      free[num_free] = slot;
      num_free += m == 0;
      m &= kStays;
    }
    mark[count] = 0;

    int num_missing = 0;
    const auto take = [&](int i, bool is_missing) {
      missing[num_missing] = wanted[i];
      num_missing += is_missing;
    };
    by_eights(
        wanted, num_wanted,
        [&](int i) {
          std::uint64_t eight;
          std::memcpy(&eight, mark + (wanted[i] - first), 8);
          if (eight == 0) return;
          std::memset(mark + (wanted[i] - first), 0, 8);
          for (int j = 0; j < 8; ++j, eight >>= 8) take(i + j, eight & 1);
        },
        [&](int i) {
          take(i, mark[wanted[i] - first]);
          mark[wanted[i] - first] = 0;
        });
    plan.num_free() = num_free;
    plan.num_missing() = num_missing;
  }

  // Missing rows [first, first + kPiece) of a head, into the free slots and behind the last one.
  void copy_missing(int head, int first) const {
    const Plan plan = this->plan(head);
    const int last = std::min(first + kPiece, plan.num_missing());
    if (first >= last) return;
    PoolHead pool(p_.pool, head);
    std::uint32_t* words = this->words(head);
    std::int32_t* held = slot_rows(head);
    char *k = this->k(head), *v = this->v(head);
    const int length = p_.seq_lens[head / p_.num_heads];
    for (int i = first; i < last; ++i) {
      const char* row = pool[plan.missing[i]];
      const std::int64_t slot = i < plan.num_free() ? plan.free[i] : length + (i - plan.num_free());
      std::memcpy(k + slot * p_.stride_k_t, row, p_.k_bytes);
      std::memcpy(v + slot * p_.stride_v_t, row + p_.k_bytes, p_.v_bytes);
      if (words) std::memcpy(words + slot, row + p_.k_bytes + p_.v_bytes, sizeof *words);
      held[slot] = plan.missing[i];
    }
  }

  // Free slots that remain get the last survivors. None of these slots is fetched into.
  void fill_holes(int head) const {
    const Plan plan = this->plan(head);
    if (plan.num_missing() >= plan.num_free()) return;
    std::int32_t* held = slot_rows(head);
    char *k = this->k(head), *v = this->v(head);
    std::uint32_t* words = this->words(head);
    const int length = p_.seq_lens[head / p_.num_heads];
    const std::int32_t *holes = plan.free + plan.num_missing(), *end = plan.free + plan.num_free();
    for_each_move(holes, end, length, [&](std::int64_t hole, std::int64_t survivor) {
      std::memcpy(k + hole * p_.stride_k_t, k + survivor * p_.stride_k_t, p_.k_bytes);
      std::memcpy(v + hole * p_.stride_v_t, v + survivor * p_.stride_v_t, p_.v_bytes);
      if (words) words[hole] = words[survivor];
      held[hole] = held[survivor];
    });
    std::fill(held + length - (end - holes), held + length, 0);
  }

  const FetchRowsParams& p_;
  const int num_heads_;  // of all sequences
  std::size_t plan_size_;
  std::int32_t* plans_;
};

}  // namespace

void fetch_rows(const FetchRowsParams& params) { Kernel(params).run(); }

}  // namespace kvcomp::cpu
