// One query per head over rows that all heads share: the key of a token is its row, its value the
// first columns of that.
//
// Many heads share a row, so arithmetic is the bound, not memory. A sequence is cut into spans of
// so many tokens, whose number depends on its length alone; a task is a span for a block of heads,
// with an online softmax of its own over tiles of 64 tokens. A tile's keys are packed once per
// task, lane by token, so that qk needs no sum across lanes. The states of the spans are merged in
// their order, so the result is the same whatever the number of threads.
//
// Multiply-adds: seq_len * Hq * (D + value_dim) per sequence. Bytes: seq_len * D elements, read
// again for every block of heads, and 4 * Hq * seq_len with logits.
#include <cmath>
#include <vector>

#include "attention_state.h"
#include "attention_tile.h"
#include "kernels.h"

namespace kvcomp::cpu {
namespace {

constexpr int kMostSpans = 16;    // of a sequence: their states wait to be merged
constexpr int kShortestSpan = 4;  // tiles
constexpr int kHeadBlock = 16;    // the least heads of a task, where there are that many

struct Task {
  int batch, span, first_head, heads;
};

class Kernel {
 public:
  explicit Kernel(const DecodeAttentionParams& params)
      : p_(params),
        value_dim_(params.value_dim),
        rows_(simd::rows()),
        typed_(typed(rows_, p_.q_dtype)) {}

  void run() {
    constexpr std::int64_t kGrain = 1 << 19;  // multiply-adds that are worth a thread
    std::int64_t work = 0, spans = 0;
    for (int b = 0; b < p_.batch; ++b) {
      work += std::int64_t{p_.seq_lens[b]} * p_.num_heads * (p_.head_dim + value_dim_);
      spans += num_spans(b);
    }
    const int threads = num_threads(work, kGrain);
    // Blocks of heads where there are too few spans for the threads.
    const int most = (p_.num_heads + kHeadBlock - 1) / kHeadBlock;
    blocks_ = 1;
    while (threads > 1 && blocks_ * 2 <= most && spans * blocks_ < 2 * threads) blocks_ *= 2;

    static thread_local std::vector<Task> tasks;
    tasks.clear();
    first_state_.assign(1, 0);
    for (int b = 0; b < p_.batch; ++b) {
      first_state_.push_back(first_state_.back() + num_spans(b));
      for (int span = 0; span < num_spans(b); ++span) {
        for (int block = 0; block < blocks_; ++block) {
          const int first = p_.num_heads * block / blocks_;
          tasks.push_back({b, span, first, p_.num_heads * (block + 1) / blocks_ - first});
        }
      }
    }
    state_size_ = State::size(p_.num_heads, value_dim_);
    const std::size_t packed = std::size_t(p_.head_dim) * kTile;
    const std::size_t scratch = packed + lines(std::size_t(p_.num_heads) * p_.head_dim) +
                                lines(std::size_t(p_.num_heads) * (kTile + 1));
    static thread_local Workspace workspace;
    states_ = workspace.get(spans * state_size_ + threads * scratch);
    float* const scratches = states_ + spans * state_size_;
    const int count = static_cast<int>(tasks.size());
    const Task* const all = tasks.data();
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int i = 0; i < count; ++i) attend(all[i], scratches + omp_get_thread_num() * scratch);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int i = 0; i < p_.batch * p_.num_heads; ++i) finish(i / p_.num_heads, i % p_.num_heads);
  }

 private:
  int span_size(int batch) const {
    const int tiles = (p_.seq_lens[batch] + kTile - 1) / kTile;
    return std::max((tiles + kMostSpans - 1) / kMostSpans, kShortestSpan) * kTile;
  }
  int num_spans(int batch) const {
    return (p_.seq_lens[batch] + span_size(batch) - 1) / span_size(batch);
  }
  State state(int batch, int span) const {
    return State(states_ + (first_state_[batch] + span) * state_size_, p_.num_heads);
  }

  void attend(const Task& task, float* scratch) const {
    float* const packed = scratch;
    float* const q = packed + std::size_t(p_.head_dim) * kTile;
    float* const logits = q + lines(std::size_t(p_.num_heads) * p_.head_dim);
    float* const rescale = logits + std::size_t(task.heads) * kTile;
    const State whole = state(task.batch, task.span);
    float *max = whole.max + task.first_head, *sum = whole.sum + task.first_head;
    float* acc = whole.acc + std::size_t(task.first_head) * value_dim_;
    std::fill_n(max, task.heads, -kInfinity);
    std::fill_n(sum, task.heads, 0.0f);
    std::fill_n(acc, std::size_t(task.heads) * value_dim_, 0.0f);
    const int size = size_of(p_.q_dtype);
    for (int h = 0; h < task.heads; ++h) {
      const std::int64_t at = task.batch * p_.stride_q_b + (task.first_head + h) * p_.stride_q_h;
      typed_.prepare_shared_q(static_cast<const char*>(p_.q) + at * size, p_.head_dim,
                              q + std::size_t(h) * p_.head_dim);
    }
    const int begin = task.span * span_size(task.batch);
    const int end = std::min(begin + span_size(task.batch), p_.seq_lens[task.batch]);
    TileRows rows;
    for (int token = begin; token < end; token += kTile) {
      rows.gather(p_, task.batch, 0, token, std::min(token + kTile, end), kTile);
      if (rows.count == 0) continue;
      typed_.pack(rows.k, p_.head_dim, packed);
      typed_.qk_packed(q, task.heads, p_.head_dim, packed, p_.scale, logits);
      if (p_.logits) keep_logits(task, rows, logits);
      rows_.softmax(logits, task.heads, rows.count, max, sum, rescale);
      typed_.pv_shared(logits, task.heads, value_dim_, rows.v, rows.count, rescale, acc);
    }
  }

  void keep_logits(const Task& task, const TileRows& rows, const float* logits) const {
    for (int h = 0; h < task.heads; ++h, logits += kTile) {
      float* out = static_cast<float*>(p_.logits) + task.batch * p_.stride_logits_b +
                   (task.first_head + h) * p_.stride_logits_h;
      for (int t = 0; t < rows.count; ++t) out[rows.position[t]] = logits[t];
    }
  }

  // Merges the spans of a sequence for one head, in their order.
  void finish(int batch, int head) const {
    const int spans = num_spans(batch);
    float max = -kInfinity, sum = 0.0f;
    float* acc = nullptr;
    for (int span = 0; span < spans; ++span) {
      const State from = state(batch, span);
      if (from.sum[head] == 0.0f) continue;  // nothing attended
      float* const x = from.acc + std::size_t(head) * value_dim_;
      if (!acc) {
        max = from.max[head];
        sum = from.sum[head];
        acc = x;
        continue;
      }
      const float ahead = from.max[head] - max;
      const float a = ahead > 0 ? std::exp(-ahead) : 1.0f, b = ahead > 0 ? 1.0f : std::exp(ahead);
      rows_.accumulate(acc, a, x, b, value_dim_);
      sum = sum * a + from.sum[head] * b;
      max = std::max(max, from.max[head]);
    }
    const std::int64_t at = std::int64_t{batch} * p_.num_heads + head;
    char* const out = static_cast<char*>(p_.out) + at * value_dim_ * size_of(p_.q_dtype);
    p_.lse[at] = acc ? max + std::log(sum) : -kInfinity;
    if (acc) {
      typed_.store(acc, 1.0f / sum, value_dim_, out);
    } else {
      std::fill_n(out, std::int64_t{value_dim_} * size_of(p_.q_dtype), 0);
    }
  }

  const DecodeAttentionParams& p_;
  const int value_dim_;
  const simd::Rows& rows_;
  const simd::TypedRows& typed_;
  int blocks_ = 1;                         // of heads
  std::vector<std::int64_t> first_state_;  // [batch + 1] spans before a sequence
  std::size_t state_size_ = 0;             // floats
  float* states_ = nullptr;
};

}  // namespace

void latent_attention(const DecodeAttentionParams& params) { Kernel(params).run(); }

}  // namespace kvcomp::cpu
