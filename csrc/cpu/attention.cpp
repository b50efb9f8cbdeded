// Attention of m queries per sequence, K and V read once for all of them.
//
// The G query heads of a KV head times the m queries are the rows of q that walk over its tokens
// together, at most kMostRows of them. A walk is cut into spans of so many tokens, each with an
// online softmax of its own over tiles of at most 64 tokens: qk and pv of a tile while the rows it
// needs next are fetched, across the borders of walks too. The states of the spans are merged in
// their order. The spans of the batch, in the order of sequence, walk and token, are divided into
// four ranges per thread, so that ragged lengths balance; where a border cuts a walk, the last to
// arrive merges.
//
// Where spans and tiles are cut depends on the position of a token and on the layout of K and V
// alone. So the result is the same from run to run, whatever the threads, the other sequences of
// the batch, and the number of queries: a query gets the bits that it would get alone, after the
// tokens that it sees.
//
// Bytes: 2 * seq_len * Hkv * D elements per sequence, and 4 * m * Hq * seq_len with logits.
#include "attention.h"

#include <atomic>
#include <cmath>
#include <vector>

#include "attention_state.h"
#include "attention_walks.h"
#include "kvcomp/head_sizes.h"

namespace kvcomp::cpu {
namespace {

// K and V of so many bytes displace the logits, which are read after them, from the caches: keeping
// them there would only cost the reads of their lines before they are written.
constexpr std::int64_t kCaches = 32 << 20;
constexpr int kAhead = 2;  // tiles for whose pieces memory is asked before they are fetched

// A walk that lies in several parts.
struct Cut {
  std::int64_t first_span;
  int spans, left;  // all of its spans, and those under way
  std::size_t states;
};

class Kernel {
 public:
  explicit Kernel(const AppendAttentionParams& params)
      : m_(params),
        p_(params.attention),
        rows_(simd::rows()),
        typed_(typed(rows_, p_.q_dtype)),
        coded_(p_.kv_dtype == ScalarType::i8),
        query_size_(coded_ ? rows_.codes.query_size(p_.head_dim) : p_.head_dim),
        walks_(params),
        layout_(walks_.layout()),
        stream_logits_(p_.logits && walks_.kv_bytes() >= kCaches) {}

  void run() {
    constexpr std::int64_t kGrain = 1 << 18;  // multiply-adds that are worth a thread
    constexpr int kPartsPerThread = 4;        // so that a thread that falls behind takes fewer
    const std::int64_t total = walks_.total(), work = walks_.work();
    const int threads = num_threads(work, kGrain);
    const int parts = threads == 1
                          ? 1
                          : static_cast<int>(std::min<std::int64_t>(
                                {std::int64_t{threads} * kPartsPerThread, work / kGrain, total}));
    const int rows = walks_.state_rows();
    state_size_ = State::size(rows, p_.value_dim);
    scratch_size_ = Scratch::size(rows, query_size_, p_.value_dim);
    const std::size_t cut_size = find_cuts(parts);
    static thread_local Workspace workspace;
    scratches_ = workspace.get(parts * scratch_size_ + cut_size);
    cut_states_ = scratches_ + parts * scratch_size_;

    if (parts <= 1) {
      if (total > 0) run_part(0, 1);
    } else {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int part = 0; part < parts; ++part) run_part(part, parts);
    }
    for (int b = 0; b < p_.batch; ++b) {
      const int answered = walks_.num_spans(b) > 0 ? walks_.queries(b) : 0;
      for (int query = answered; query < m_.num_queries; ++query) store_nothing(b, query);
    }
  }

 private:
  // Lists the walks that borders between parts cut; returns the room for the states of their spans.
  std::size_t find_cuts(int parts) {
    static thread_local std::vector<Cut> cuts;
    static thread_local std::vector<int> cut_at;
    cuts.clear();
    cut_at.assign(parts + 1, -1);
    std::size_t size = 0;
    for (int part = 1; part < parts; ++part) {
      const std::int64_t border = walks_.part_begin(part, parts);
      const Place place = walks_.place_at(border);
      if (place.token == 0) continue;
      const std::int64_t first = border - place.token / layout_.span_size;
      if (cuts.empty() || cuts.back().first_span != first) {
        const int spans = walks_.num_spans(place.batch);
        cuts.push_back({first, spans, spans, size});
        size += spans * state_size_;
      }
      cut_at[part] = static_cast<int>(cuts.size()) - 1;
    }
    cuts_ = cuts.data();
    cut_at_ = cut_at.data();
    return size;
  }

  // The cut walk of a part that span `number` belongs to; nullptr: the part has the whole walk.
  Cut* cut_of(std::int64_t number, int part) const {
    for (const int index : {cut_at_[part], cut_at_[part + 1]}) {
      if (index < 0) continue;
      Cut& cut = cuts_[index];
      if (number >= cut.first_span && number < cut.first_span + cut.spans) return &cut;
    }
    return nullptr;
  }

  State cut_state(const Cut& cut, int span) const {
    return State(cut_states_ + cut.states + span * state_size_, walks_.state_rows());
  }

  void run_part(int part, int parts) const {
    const std::int64_t begin = walks_.part_begin(part, parts);
    const std::int64_t end = walks_.part_begin(part + 1, parts);
    if (begin == end) return;
    const Scratch scratch(scratches_ + part * scratch_size_, walks_.state_rows(), query_size_,
                          p_.value_dim);
    TileRows rows[2];
    TileRows *current = &rows[0], *next = &rows[1];
    Place place = walks_.place_at(begin), following = place;
    Walk walk = walks_.walk_at(place);
    Asked asked{place, end - begin};
    for (int i = 0; i < kAhead; ++i) ask(asked);
    gather(*current, place, walk.head);
    std::int64_t walk_begin = begin;  // of this part
    for (std::int64_t number = begin; number < end; ++number) {
      if (number == begin || place.token == 0) {
        walk = walks_.walk_at(place);
        walk_begin = number;
        prepare_q(walk, scratch.q);
      }
      Cut* cut = cut_of(number, part);
      const State state = cut ? cut_state(*cut, static_cast<int>(number - cut->first_span))
                          : number == walk_begin ? scratch.walk
                                                 : scratch.span;
      clear(state, walk);
      const int length = p_.seq_lens[walk.batch];
      const int stop = std::min(place.token + layout_.span_size, length);
      const bool whole = stop == length;  // the walk ends here
      for (int token = place.token; token < stop; token += layout_.tile_size, place = following) {
        walks_.advance(following);
        ask(asked);
        const bool last = number + 1 == end && token + layout_.tile_size >= stop;
        for (int i = 0; i < layout_.heads_together; ++i) {
          if (i + 1 < layout_.heads_together) {
            gather(*next, place, walk.head + i + 1);
          } else if (!last) {
            gather(*next, following, walks_.walk_at(following).head);
          } else {
            next = current;
          }
          attend_tile(*current, *next, walk, i, state, scratch);
          std::swap(current, next);
        }
      }
      if (cut) {
        if (whole || number + 1 == end) leave(*cut, walk, number + 1 - walk_begin);
        continue;
      }
      if (number > walk_begin) merge(scratch.walk, scratch.span, walk);
      if (whole) store(walk, scratch.walk);
    }
    if (stream_logits_) std::atomic_thread_fence(std::memory_order_seq_cst);
  }

  // Where the tiles of a part begin for whose pieces memory has not been asked, and the spans left.
  struct Asked {
    Place next;
    std::int64_t spans;
  };
  void ask(Asked& asked) const {
    if (!p_.page_ids || asked.spans == 0) return;
    const Place place = asked.next;
    const int head = walks_.walk_at(place).head, end = walks_.tile_end(place);
    for (int i = 0; i < layout_.heads_together; ++i) {
      TileRows::ask(p_, place.batch, head + i, place.token, end);
    }
    walks_.advance(asked.next);
    if (asked.next.token % layout_.span_size == 0) --asked.spans;
  }

  void gather(TileRows& rows, const Place& place, int head) const {
    rows.gather(p_, place.batch, head, place.token, walks_.tile_end(place), layout_.tile_size);
  }

  // Query and query head of a walk's row.
  struct Row {
    int query, head;
  };
  Row row_of(const Walk& walk, int head, int row) const {
    const int at = walk.first_row + row, group = walks_.group();
    return {at / group, (walk.head + head) * group + at % group};
  }

  template <class Visit>  // (index in a state, row) of all of a walk's rows
  void for_each_row(const Walk& walk, const Visit& visit) const {
    for (int head = 0, index = 0; head < layout_.heads_together; ++head) {
      for (int row = 0; row < walk.rows; ++row, ++index) visit(index, row_of(walk, head, row));
    }
  }

  void prepare_q(const Walk& walk, float* prepared) const {
    const int size = size_of(p_.q_dtype);
    const char* q = static_cast<const char*>(p_.q) + walk.batch * p_.stride_q_b * size;
    for_each_row(walk, [&](int index, Row row) {
      const char* from = q + (row.query * m_.stride_q_m + row.head * p_.stride_q_h) * size;
      float* into = prepared + std::size_t(index) * query_size_;
      if (!coded_) return typed_.prepare_q(from, p_.head_dim, into);
      float wide[simd::kMostQuery];
      static_assert(std::end(kHeadSizes)[-1] <= simd::kMostQuery);
      typed_.widen(from, p_.head_dim, wide);
      rows_.codes.prepare_q(wide, p_.head_dim, into);
    });
  }

  void clear(const State& state, const Walk& walk) const {
    const int rows = walk.rows * layout_.heads_together;
    std::fill_n(state.max, rows, -kInfinity);
    std::fill_n(state.sum, rows, 0.0f);
    std::fill_n(state.acc, std::size_t(rows) * p_.value_dim, 0.0f);
  }

  // One tile of the walk's KV head number `head`.
  void attend_tile(const TileRows& rows, const TileRows& next, const Walk& walk, int head,
                   const State& state, const Scratch& scratch) const {
    if (rows.count == 0) return;
    float k_scale[kTile], v_scale[kTile];
    if (coded_) {
      std::uint32_t words[kTile];
      rows.read_words(words);
      rows_.codes.split_words(words, rows.count, k_scale, v_scale);
    }
    const auto *fetch_k = layout_.scattered ? next.k : rows.v,
               *fetch_v = layout_.scattered ? next.v : next.k;
    const int at = head * walk.rows;  // of a state's rows
    const float* q = scratch.q + std::size_t(at) * query_size_;
    float *logits = scratch.logits, *acc = state.acc + std::size_t(at) * p_.value_dim;
    if (coded_) {
      rows_.codes.qk(q, walk.rows, p_.head_dim, rows.k, rows.count, fetch_k, p_.scale, k_scale,
                     logits);
    } else {
      typed_.qk(q, walk.rows, p_.head_dim, rows.k, rows.count, fetch_k, p_.scale, logits);
    }
    if (p_.softcap > 0) rows_.cap(logits, walk.rows, rows.count, p_.softcap);
    const int first_new = p_.seq_lens[walk.batch] - walks_.queries(walk.batch);
    if (p_.logits || rows.position[rows.count - 1] >= first_new) {
      for (int row = 0; row < walk.rows; ++row) {
        finish_logits(rows, walk.batch, row_of(walk, head, row), first_new, logits + row * kTile);
      }
    }
    rows_.softmax(logits, walk.rows, rows.count, state.max + at, state.sum + at, scratch.rescale);
    if (coded_) {
      rows_.codes.pv(logits, v_scale, walk.rows, p_.value_dim, rows.v, rows.count, fetch_v,
                     scratch.rescale, acc);
    } else {
      typed_.pv(logits, walk.rows, p_.value_dim, rows.v, rows.count, fetch_v, scratch.rescale, acc);
    }
  }

  // -inf for the new tokens that a query does not see; and what is wanted of the logits.
  void finish_logits(const TileRows& rows, int batch, Row row, int first_new, float* logits) const {
    if (rows.position[rows.count - 1] >= first_new) {
      const std::uint64_t seen = m_.tail ? m_.tail[batch * m_.stride_tail_b + row.query]
                                         : ~(~std::uint64_t{1} << row.query);
      for (int t = rows.count - 1; t >= 0 && rows.position[t] >= first_new; --t) {
        if (!(seen >> (rows.position[t] - first_new) & 1)) logits[t] = -kInfinity;
      }
    }
    if (!p_.logits) return;
    float* out = static_cast<float*>(p_.logits) + batch * p_.stride_logits_b +
                 row.query * m_.stride_logits_m + row.head * p_.stride_logits_h;
    if (rows.position[rows.count - 1] - rows.position[0] == rows.count - 1) {
      out += rows.position[0];
      if (stream_logits_) {
        rows_.stream(logits, rows.count, out);
      } else {
        std::copy_n(logits, rows.count, out);
      }
    } else {
      for (int t = 0; t < rows.count; ++t) out[rows.position[t]] = logits[t];
    }
  }

  // This part is done with so many spans of a cut walk; the last part to say so merges them.
  void leave(Cut& cut, const Walk& walk, std::int64_t spans) const {
    const int done = static_cast<int>(spans);
    if (std::atomic_ref(cut.left).fetch_sub(done, std::memory_order_acq_rel) != done) return;
    const State state = cut_state(cut, 0);
    for (int span = 1; span < cut.spans; ++span) merge(state, cut_state(cut, span), walk);
    store(walk, state);
  }

  void merge(const State& into, const State& from, const Walk& walk) const {
    for (int row = 0; row < walk.rows * layout_.heads_together; ++row) {
      if (from.sum[row] == 0.0f) continue;                // nothing attended
      const float ahead = from.max[row] - into.max[row];  // inf where nothing was so far
      const float a = ahead > 0 ? std::exp(-ahead) : 1.0f, b = ahead > 0 ? 1.0f : std::exp(ahead);
      const std::size_t offset = std::size_t(row) * p_.value_dim;
      rows_.accumulate(into.acc + offset, a, from.acc + offset, b, p_.value_dim);
      into.sum[row] = into.sum[row] * a + from.sum[row] * b;
      into.max[row] = std::max(into.max[row], from.max[row]);
    }
  }

  std::int64_t out_row(int batch, Row row) const {
    return (std::int64_t{batch} * m_.num_queries + row.query) * p_.num_heads + row.head;
  }

  void store(const Walk& walk, const State& state) const {
    for_each_row(walk, [&](int index, Row row) {
      const std::int64_t at = out_row(walk.batch, row);
      const float sum = state.sum[index], factor = sum == 0.0f ? 0.0f : 1.0f / sum;
      float* acc = state.acc + std::size_t(index) * p_.value_dim;
      char* out = static_cast<char*>(p_.out) + at * p_.value_dim * size_of(p_.q_dtype);
      if (coded_) {
        rows_.codes.arrange(acc, p_.value_dim);
        typed_.narrow(acc, factor, p_.value_dim, out);
      } else {
        typed_.store(acc, factor, p_.value_dim, out);
      }
      p_.lse[at] = sum == 0.0f ? -kInfinity : state.max[index] + std::log(sum);
    });
  }

  // All heads of a query that has nothing to attend to.
  void store_nothing(int batch, int query) const {
    const std::int64_t at = out_row(batch, {query, 0});
    const std::int64_t bytes = std::int64_t{p_.value_dim} * size_of(p_.q_dtype);
    std::fill_n(static_cast<char*>(p_.out) + at * bytes, p_.num_heads * bytes, 0);
    std::fill_n(p_.lse + at, p_.num_heads, -kInfinity);
  }

  const AppendAttentionParams& m_;
  const DecodeAttentionParams& p_;
  const simd::Rows& rows_;
  const simd::TypedRows& typed_;  // of q and out
  const bool coded_;              // K and V are codes
  const int query_size_;          // floats of a prepared row
  const Walks walks_;
  // Memory delivers rows in sequence best when K and V are fetched by turns, 8 to 16 KiB each, and
  // each while the other is in work; scattered rows take longer and are fetched a tile ahead.
  const Layout& layout_;
  const bool stream_logits_;
  std::size_t state_size_, scratch_size_;
  Cut* cuts_;
  const int* cut_at_;  // [parts + 1] which walk the border before a part cuts, -1: none
  float *scratches_, *cut_states_;
};

}  // namespace

void attend(const AppendAttentionParams& params) { Kernel(params).run(); }

}  // namespace kvcomp::cpu
