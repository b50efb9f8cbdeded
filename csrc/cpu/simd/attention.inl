// Attention over the rows of a tile: logits, softmax, and the sum of values. Part of rows.inl.

// Heads and vectors whose sums stay in registers: with 32 of these, 24, else 8.
constexpr int kSharedHeads = kLanes == 16 ? 6 : 4;
constexpr int kSharedVectors = kLanes == 16 ? 4 : 2;

// Calls f with the first of each block of heads and, as a type, their number: blocks of like size,
// as few as hold kMost each.
template <int kMost, class F>
inline void for_heads(int num_heads, F f) {
  static_assert(kMost <= 6);
  for (int h = 0, n; h < num_heads; h += n) {
    const int left = num_heads - h, blocks = (left + kMost - 1) / kMost;
    n = (left + blocks - 1) / blocks;
    switch (n) {
      case 1: f(h, Count<1>{}); break;
      case 2: f(h, Count<2>{}); break;
      case 3: f(h, Count<3>{}); break;
      case 4: f(h, Count<4>{}); break;
      case 5: f(h, Count<(kMost < 5 ? 1 : 5)>{}); break;
      case 6: f(h, Count<(kMost < 6 ? 1 : 6)>{}); break;
    }
  }
}

// --- q k^T -------------------------------------------------------------------------------------

// How a step of a row multiplies q: in fp32, in the order of load_pair. An instruction set with a
// dot product of its own specialises it.
template <class T>
struct Dot {
  using Query = float;  // of prepared q
  static constexpr int kStep = 2 * kLanes;

  static void prepare(const T* q, int head_dim, Query* prepared) {
    int i = 0;
    for (; i + kStep <= head_dim; i += kStep) {
      const Pair pair = load_pair(q + i);
      store(prepared + i, pair.a);
      store(prepared + i + kLanes, pair.b);
    }
    if (i < head_dim) store(prepared + i, load(q + i));
  }
  static Pair query(const Query* q) { return {load(q), load(q + kLanes)}; }
  static Pair row(const T* k) { return load_pair(k); }
  static Vec add(Pair q, Pair k, Vec sum) { return fma(q.b, k.b, fma(q.a, k.a, sum)); }

  // The last kLanes elements, where head_dim is not a multiple of kStep.
  static Vec half_query(const Query* q) { return load(q); }
  static Vec half_row(const T* k) { return load(k); }
  static Vec half_add(Vec q, Vec k, Vec sum) { return fma(q, k, sum); }
  static Vec finish(const Vec (&sums)[kLanes]) { return reduce(sums); }
};

// Brings rows into L1, line by line in the order in which they lie: memory delivers fastest what is
// read from one end to the other.
class Fetch {
 public:
  Fetch() = default;
  Fetch(RowPointers rows, int row_bytes) : next_(rows), row_bytes_(row_bytes), at_(row_bytes) {}

  // A line for each of those that kBytes from byte `at` of a row begin: what reads a tile fetches
  // one meanwhile, and few requests wait at a time. Always inlined, because GCC takes a function
  // that only prefetches for one without effect and drops its calls.
  template <int kBytes>
  [[gnu::always_inline]] void beside(int at) {
    if (!next_ || (kBytes < 64 && at % 64 != 0)) return;
    UNROLL for (int i = 0; i < kBytes; i += 64) {
      if (at_ >= row_bytes_) {
        row_ = static_cast<const char*>(*next_++);
        at_ = 0;
      }
      __builtin_prefetch(row_ + at_);
      at_ += 64;
    }
  }

  // The next kRows rows, of kBytes each: fewer instructions, of those who begin with whole rows.
  template <int kRows, int kBytes>
  [[gnu::always_inline]] void rows_beside() {
    static_assert(kBytes % 64 == 0);
    if (!next_) return;
    UNROLL for (int r = 0; r < kRows; ++r) {
      const char* row = static_cast<const char*>(next_[r]);
      UNROLL for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(row + i);
    }
    next_ += kRows;
  }

 private:
  RowPointers next_ = nullptr;  // the rows after row_
  const char* row_ = nullptr;
  int row_bytes_ = 0, at_ = 0;  // of row_, where the next line begins
};

// For those who find their rows in L1.
struct NoFetch {
  template <int>
  void beside(int) {}
};

// H heads against kLanes / H rows at a time: kLanes sums in registers, reduced together.
template <class T, int H, class F>
void qk_heads(const float* prepared_q, int head_dim, RowPointers rows, int count, F& fetch,
              float scale, float* logits) {
  using D = Dot<T>;
  using Query = typename D::Query;
  constexpr int R = kLanes / (H == 3 ? 4 : H);  // of three heads, a quarter of the lanes idle
  const auto* q = reinterpret_cast<const Query*>(prepared_q);
  const int stride_q = head_dim * static_cast<int>(sizeof(float) / sizeof(Query));
  for (int t = 0; t < count; t += R) {
    Vec sums[kLanes];
    UNROLL for (int i = 0; i < kLanes; ++i) sums[i] = zero();
    int i = 0;
    for (; i + D::kStep <= head_dim; i += D::kStep) {
      const auto row = [&](int r) {
        fetch.template beside<D::kStep * sizeof(T)>(i * sizeof(T));
        return D::row(static_cast<const T*>(rows[t + r]) + i);
      };
      const auto query = [&](int h) { return D::query(q + h * stride_q + i); };
      if constexpr (R < H) {  // what there is less of stays in registers, beside the sums
        decltype(row(0)) k[R];
        UNROLL for (int r = 0; r < R; ++r) k[r] = row(r);
        UNROLL for (int h = 0; h < H; ++h) {
          const auto x = query(h);
          UNROLL for (int r = 0; r < R; ++r) sums[h * R + r] = D::add(x, k[r], sums[h * R + r]);
        }
      } else {
        decltype(query(0)) x[H];
        UNROLL for (int h = 0; h < H; ++h) x[h] = query(h);
        UNROLL for (int r = 0; r < R; ++r) {
          const auto k = row(r);
          UNROLL for (int h = 0; h < H; ++h) sums[h * R + r] = D::add(x[h], k, sums[h * R + r]);
        }
      }
    }
    if (i < head_dim) {
      UNROLL for (int r = 0; r < R; ++r) {
        fetch.template beside<kLanes * sizeof(T)>(i * sizeof(T));
        const auto k = D::half_row(static_cast<const T*>(rows[t + r]) + i);
        UNROLL for (int h = 0; h < H; ++h) {
          sums[h * R + r] = D::half_add(D::half_query(q + h * stride_q + i), k, sums[h * R + r]);
        }
      }
    }
    float block[kLanes];
    store(block, D::finish(sums) * broadcast(scale));
    UNROLL for (int h = 0; h < H; ++h) {
      __builtin_memcpy(logits + h * kTile + t, block + h * R, R * sizeof(float));
    }
  }
}

template <class T>
void prepare_q(const void* q, int head_dim, float* prepared) {
  using Query = typename Dot<T>::Query;
  Dot<T>::prepare(static_cast<const T*>(q), head_dim, reinterpret_cast<Query*>(prepared));
}

template <class T>
void qk(const float* prepared_q, int num_heads, int head_dim, RowPointers rows, int count,
        RowPointers fetch_rows, float scale, float* logits) {
  // Of the rows to fetch, each block of heads takes its share: a multiple of what it reads at once.
  const auto share = [&](int h) {
    return fetch_rows ? (count * h / num_heads + kLanes - 1) / kLanes * kLanes : 0;
  };
  for_heads<4>(num_heads, [&](int h, auto heads) {
    const int from = share(h), fetching = min(share(h + heads.value) - from, count);
    const auto multiply = [&](int first, int number, auto&& fetch) {
      qk_heads<T, heads.value>(prepared_q + h * head_dim, head_dim, rows + first, number, fetch,
                               scale, logits + h * kTile + first);
    };
    if (fetching > 0) multiply(0, fetching, Fetch(fetch_rows + from, head_dim * sizeof(T)));
    if (fetching < count) multiply(fetching, count - fetching, NoFetch());
  });
}

// --- soft cap ----------------------------------------------------------------------------------

void cap(float* logits, int num_heads, int count, float cap) {
  const Vec lowest = broadcast(-80.0f);  // where tanh is 1 already, and exp finite
  for (int h = 0; h < num_heads; ++h, logits += kTile) {
    for (int t = 0; t < count; t += kLanes) {
      const Vec x = load(logits + t) * broadcast(-2.0f / cap);
      store(logits + t, exp(zero() - max(lowest, x)));  // NaN stays: it comes second
    }
    for (int t = 0; t < count; ++t) logits[t] = cap - 2 * cap / (logits[t] + 1);
  }
}

// --- softmax -----------------------------------------------------------------------------------

// Of as many heads as there are lanes, so that what each has one of takes one step for all.
inline void softmax_heads(float* logits, int num_heads, int count, float* max_, float* sum,
                          float* rescale) {
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  float behind[kLanes] = {}, shift[kLanes] = {};  // old max - shift
  for (int h = 0; h < num_heads; ++h) {
    float* x = logits + h * kTile;
    for (int t = count; t < padded; ++t) x[t] = -kInfinity;
    Vec top = broadcast(max_[h]);
    for (int t = 0; t < padded; t += kLanes) top = max(top, load(x + t));
    const float new_max = reduce_max(top);
    shift[h] = new_max == -kInfinity ? 0.0f : new_max;
    behind[h] = max_[h] - shift[h];
    max_[h] = new_max;
  }
  store(behind, exp(load(behind)));
  for (int h = 0; h < num_heads; ++h) {
    float* x = logits + h * kTile;
    Vec total = zero();
    for (int t = 0; t < padded; t += kLanes) {
      const Vec p = exp(load(x + t) - broadcast(shift[h]));
      store(x + t, p);
      total = total + p;
    }
    rescale[h] = behind[h];
    sum[h] = sum[h] * behind[h] + reduce_add(total);
  }
}

void softmax(float* logits, int num_heads, int count, float* max, float* sum, float* rescale) {
  for (int h = 0; h < num_heads; h += kLanes) {
    softmax_heads(logits + h * kTile, min(num_heads - h, kLanes), count, max + h, sum + h,
                  rescale + h);
  }
}

// --- probs v -----------------------------------------------------------------------------------

// How rows are weighed and added up: one at a time in fp32. An instruction set with a dot product
// of its own specialises it.
template <class T>
struct Values {
  static constexpr int kRows = 1;  // at once
  using Weights = const float*;    // of a head

  static void weigh(const float* probs, int, Weights& weights) { weights = probs; }
  static Vec weight(Weights weights, int t) { return broadcast(weights[t]); }
  template <int>
  static Pair pair(const T* const* rows) {
    return load_pair(*rows);
  }
  template <int>
  static Vec half(const T* const* rows) {
    return load(*rows);
  }
  static Vec add(Vec weight, Vec v, Vec sum) { return fma(weight, v, sum); }
};

// N vectors of a row from `column` on, for H heads: H * N sums in registers over all rows. They
// start from zero, not from acc: rounding then grows with the number of tiles, not of tokens.
template <class T, int H, int N>
void pv_block(const float* probs, int head_dim, RowPointers rows, int count, Fetch& fetch,
              const float* rescale, int column, float* acc) {
  using W = Values<T>;
  typename W::Weights weights[H];
  UNROLL for (int h = 0; h < H; ++h) W::weigh(probs + h * kTile, count, weights[h]);
  Vec sums[H][N];
  UNROLL for (int h = 0; h < H; ++h) { UNROLL for (int n = 0; n < N; ++n) sums[h][n] = zero(); }
  const auto add = [&](int t, auto number) __attribute__((always_inline)) {  // of rows
    constexpr int R = number.value;
    const T* row[R];
    UNROLL for (int r = 0; r < R; ++r) {
      fetch.beside<N * kLanes * sizeof(T)>(column * sizeof(T));
      row[r] = static_cast<const T*>(rows[t + r]) + column;
    }
    Vec v[N];
    if constexpr (N == 1) {
      v[0] = W::template half<R>(row);
    } else {
      UNROLL for (int n = 0; n < N; n += 2) {
        const Pair pair = W::template pair<R>(row);
        v[n] = pair.a;
        v[n + 1] = pair.b;
        UNROLL for (int r = 0; r < R; ++r) row[r] += 2 * kLanes;
      }
    }
    UNROLL for (int h = 0; h < H; ++h) {
      const Vec weight = W::weight(weights[h], t);
      UNROLL for (int n = 0; n < N; ++n) sums[h][n] = W::add(weight, v[n], sums[h][n]);
    }
  };
  int t = 0;
  for (; t + W::kRows <= count; t += W::kRows) add(t, Count<W::kRows>{});
  if (t < count) add(t, Count<1>{});
  UNROLL for (int h = 0; h < H; ++h) {
    UNROLL for (int n = 0; n < N; ++n) {
      float* sum = acc + h * head_dim + column + n * kLanes;
      store(sum, fma(load(sum), broadcast(rescale[h]), sums[h][n]));
    }
  }
}

// As many vectors at once as there are sums, then half as many of what is left.
template <class T, int H, int N = H <= 4 ? kSums / H / 2 * 2 : kSharedVectors>
void pv_heads(const float* probs, int head_dim, RowPointers rows, int count, Fetch& fetch,
              const float* rescale, float* acc, int column = 0) {
  for (; column + N * kLanes <= head_dim; column += N * kLanes) {
    pv_block<T, H, N>(probs, head_dim, rows, count, fetch, rescale, column, acc);
  }
  if constexpr (N > 1) {
    pv_heads<T, H, N / 2>(probs, head_dim, rows, count, fetch, rescale, acc, column);
  }
}

template <class T>
void pv(const float* probs, int num_heads, int head_dim, RowPointers rows, int count,
        RowPointers fetch_rows, const float* rescale, float* acc) {
  Fetch fetch(fetch_rows, head_dim * sizeof(T));
  for_heads<kSharedHeads>(num_heads, [&](int h, auto heads) {
    pv_heads<T, heads.value>(probs + h * kTile, head_dim, rows, count, fetch, rescale + h,
                             acc + h * head_dim);
    fetch = {};  // later heads find the rows in L1
  });
}

// --- whole rows --------------------------------------------------------------------------------

template <class T>
void store_row(const float* acc, float factor, int head_dim, void* out_) {
  T* out = static_cast<T*>(out_);
  const Vec f = broadcast(factor);
  int i = 0;
  for (; i + 2 * kLanes <= head_dim; i += 2 * kLanes) {
    store_pair(out + i, {load(acc + i) * f, load(acc + i + kLanes) * f});
  }
  if (i < head_dim) store(out + i, load(acc + i) * f);
}

template <class T>
void blend(const void* a_, float weight_a, const void* b_, float weight_b, int head_dim,
           void* out_) {
  const T *a = static_cast<const T*>(a_), *b = static_cast<const T*>(b_);
  T* out = static_cast<T*>(out_);
  const Vec wa = broadcast(weight_a), wb = broadcast(weight_b);
  for (int i = 0; i < head_dim; i += kLanes) {
    store(out + i, fma(load(a + i), wa, load(b + i) * wb));
  }
}

void accumulate(float* acc, float factor, const float* x, float weight, int count) {
  const Vec f = broadcast(factor), w = broadcast(weight);
  for (int i = 0; i < count; i += kLanes) {
    store(acc + i, fma(load(acc + i), f, load(x + i) * w));
  }
}
