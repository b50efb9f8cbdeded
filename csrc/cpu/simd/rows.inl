// The loops of rows.h, written once. An ISA file defines what follows, in an unnamed namespace, and
// then includes this:
//
//   kLanes, Vec     that many floats: + - *, zero(), broadcast(float), fma(a, b, c), round(x),
//                   max(a, b) (b where either is NaN), scale2(x, n) = x * 2^n,
//                   keep_above(value, x, low) (0 where x <= low), first(x), reduce_add(x),
//                   reduce_max(x), and reduce(Vec[kLanes]), whose lane i is the sum of vector i
//                   transpose(Vec[kLanes]), where_above(a, b, x, y) = a > b ? x : y
//   masks           above(a, b), at_least(a, b), equal(a, b): bit i is lane i;
//                   compress(float*, mask, Vec) and compress_ids(int32*, mask, first id): write
//                   the marked lanes, return how many
//   memory          load(p) and store(p, Vec) of each element type; load_first(float*, n) with
//                   zeros after n; load_pair(p) and store_pair(p, Pair) of 2 * kLanes elements in
//                   whatever order is cheapest
//   kSums           sums that pv holds at once, a power of two: enough to hide an fma's latency
//   kTall           centres that nearest holds at once, a divisor of kCentreBlock
//   UNROLL          before a loop whose arrays must end up in registers

// --- arithmetic --------------------------------------------------------------------------------

constexpr float kInfinity = __builtin_huge_valf();

inline int min(int a, int b) { return a < b ? a : b; }

// exp(x) for x <= 0 within 2 ulp; 0 below the normal range, so that -inf gives 0 exactly.
inline Vec exp(Vec x) {
  constexpr float kLow = -87.336544f;  // log of the smallest normal float
  const Vec in_range = max(broadcast(kLow), x);
  const Vec n = round(in_range * broadcast(1.44269504f));
  Vec r = fma(n, broadcast(-0.693145752f), in_range);  // log 2 in two parts
  r = fma(n, broadcast(-1.42860677e-6f), r);
  Vec p = broadcast(1.393373346e-3f);  // (exp(r) - 1 - r) / r^2, Chebyshev fit, error 1e-8
  p = fma(p, r, broadcast(8.363235385e-3f));
  p = fma(p, r, broadcast(4.166646416e-2f));
  p = fma(p, r, broadcast(1.666657664e-1f));
  p = fma(p, r, broadcast(5.000000014e-1f));
  p = fma(p, r * r, r) + broadcast(1.0f);
  return keep_above(scale2(p, n), x, kLow);
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
};

// kBytes of a row, from byte `at` on, into L2: into L1 they would only displace the tile in work.
// Asked for piece by piece, as the row in work is read, so that few requests wait at a time, and
// where pieces are smaller than a line, by the first of it.
template <int kBytes>
inline void prefetch(const void* row, int at) {
  if (kBytes < 64 && at % 64 != 0) return;
  for (int i = 0; i < kBytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(row) + at + i, 0, 2);
  }
}

// H heads against kLanes / H rows at a time: kLanes sums in registers, reduced together.
template <class T, int H>
void qk_heads(const float* prepared_q, int head_dim, RowPointers rows, int count, RowPointers fetch,
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
        if (fetch) prefetch<D::kStep * sizeof(T)>(fetch[t + r], i * sizeof(T));
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
        const auto k = D::half_row(static_cast<const T*>(rows[t + r]) + i);
        UNROLL for (int h = 0; h < H; ++h) {
          sums[h * R + r] = D::half_add(D::half_query(q + h * stride_q + i), k, sums[h * R + r]);
        }
      }
    }
    float block[kLanes];
    store(block, reduce(sums) * broadcast(scale));
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
        RowPointers fetch, float scale, float* logits) {
  for (int h = 0, n; h < num_heads; h += n, fetch = nullptr) {  // later heads find the rows in L1
    n = min(num_heads - h, 4);
    const float* q = prepared_q + h * head_dim;
    float* x = logits + h * kTile;
    switch (n) {
      case 1: qk_heads<T, 1>(q, head_dim, rows, count, fetch, scale, x); break;
      case 2: qk_heads<T, 2>(q, head_dim, rows, count, fetch, scale, x); break;
      case 3: qk_heads<T, 3>(q, head_dim, rows, count, fetch, scale, x); break;
      case 4: qk_heads<T, 4>(q, head_dim, rows, count, fetch, scale, x); break;
    }
  }
}

// --- softmax -----------------------------------------------------------------------------------

void softmax(float* logits, int num_heads, int count, float* max_, float* sum, float* rescale) {
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int h = 0; h < num_heads; ++h, logits += kTile) {
    for (int t = count; t < padded; ++t) logits[t] = -kInfinity;
    Vec top = broadcast(max_[h]);
    for (int t = 0; t < padded; t += kLanes) top = max(top, load(logits + t));
    const float new_max = reduce_max(top);
    const Vec shift = broadcast(new_max == -kInfinity ? 0.0f : new_max);
    Vec total = zero();
    for (int t = 0; t < padded; t += kLanes) {
      const Vec p = exp(load(logits + t) - shift);
      store(logits + t, p);
      total = total + p;
    }
    rescale[h] = first(exp(broadcast(max_[h]) - shift));
    sum[h] = sum[h] * rescale[h] + reduce_add(total);
    max_[h] = new_max;
  }
}

// --- probs v -----------------------------------------------------------------------------------

// N vectors of a row from `column` on, for H heads: H * N sums in registers over all rows. They
// start from zero, not from acc: rounding then grows with the number of tiles, not of tokens.
template <class T, int H, int N>
void pv_block(const float* probs, int head_dim, RowPointers rows, int count, RowPointers fetch,
              const float* rescale, int column, float* acc) {
  Vec sums[H][N];
  UNROLL for (int h = 0; h < H; ++h) { UNROLL for (int n = 0; n < N; ++n) sums[h][n] = zero(); }
  for (int t = 0; t < count; ++t) {
    if (fetch) prefetch<N * kLanes * sizeof(T)>(fetch[t], column * sizeof(T));
    const T* row = static_cast<const T*>(rows[t]) + column;
    Vec v[N];
    if constexpr (N == 1) {
      v[0] = load(row);
    } else {
      UNROLL for (int n = 0; n < N; n += 2) {
        const Pair pair = load_pair(row + n * kLanes);
        v[n] = pair.a;
        v[n + 1] = pair.b;
      }
    }
    UNROLL for (int h = 0; h < H; ++h) {
      const Vec p = broadcast(probs[h * kTile + t]);
      UNROLL for (int n = 0; n < N; ++n) sums[h][n] = fma(p, v[n], sums[h][n]);
    }
  }
  UNROLL for (int h = 0; h < H; ++h) {
    UNROLL for (int n = 0; n < N; ++n) {
      float* sum = acc + h * head_dim + column + n * kLanes;
      store(sum, fma(load(sum), broadcast(rescale[h]), sums[h][n]));
    }
  }
}

// As many vectors at once as there are sums, then half as many of what is left.
template <class T, int H, int N = kSums / H / 2 * 2>
void pv_heads(const float* probs, int head_dim, RowPointers rows, int count, RowPointers fetch,
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
        RowPointers fetch, const float* rescale, float* acc) {
  for (int h = 0, n; h < num_heads; h += n, fetch = nullptr) {  // later heads find the rows in L1
    n = min(num_heads - h, 4);
    const float *p = probs + h * kTile, *alpha = rescale + h;
    float* sums = acc + h * head_dim;
    switch (n) {
      case 1: pv_heads<T, 1>(p, head_dim, rows, count, fetch, alpha, sums); break;
      case 2: pv_heads<T, 2>(p, head_dim, rows, count, fetch, alpha, sums); break;
      case 3: pv_heads<T, 3>(p, head_dim, rows, count, fetch, alpha, sums); break;
      case 4: pv_heads<T, 4>(p, head_dim, rows, count, fetch, alpha, sums); break;
    }
  }
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

// --- nearest centre ----------------------------------------------------------------------------

constexpr int kPanel = 2 * kLanes;  // tokens whose best centre is sought together
static_assert(kTile % kPanel == 0 && kCentreBlock % kTall == 0);

// panel [D, kPanel] = rows - mean, transposed: a lane is a token.
template <class T>
void pack(RowPointers rows, const float* mean, int head_dim, float* panel) {
  const auto pack_block = [=](int i, int from, auto load_row) {
    const Vec offset = load(mean + i);
    Vec block[kLanes];
    UNROLL for (int t = 0; t < kLanes; ++t) {
      block[t] = load_row(static_cast<const T*>(rows[from + t])) - offset;
    }
    transpose(block);
    UNROLL for (int n = 0; n < kLanes; ++n) store(panel + (i + n) * kPanel + from, block[n]);
  };
  for (int from = 0; from < kPanel; from += kLanes) {
    int i = 0;
    for (; i + 2 * kLanes <= head_dim; i += 2 * kLanes) {
      pack_block(i, from, [i](const T* row) { return load_pair(row + i).a; });
      pack_block(i + kLanes, from, [i](const T* row) { return load_pair(row + i).b; });
    }
    if (i < head_dim) pack_block(i, from, [i](const T* row) { return load(row + i); });
  }
}

// kTall x 2 vectors of products stay in registers, and so never exist as a matrix. The panel is
// read from L1, the centres pass through once a panel.
void nearest_of_panel(const float* panel, const float* centres, int num_centres, int head_dim,
                      std::int32_t* ids, float* dots) {
  Vec best[2] = {broadcast(-kInfinity), broadcast(-kInfinity)}, id[2] = {zero(), zero()};
  for (int c = 0; c < num_centres; c += kTall) {
    const float* centre = centres + static_cast<std::int64_t>(c) * head_dim;
    Vec sums[kTall][2];
    UNROLL for (int r = 0; r < kTall; ++r) sums[r][0] = sums[r][1] = zero();
    for (int i = 0; i < head_dim; ++i) {
      const Vec x0 = load(panel + i * kPanel), x1 = load(panel + i * kPanel + kLanes);
      UNROLL for (int r = 0; r < kTall; ++r) {
        const Vec w = broadcast(centre[r * head_dim + i]);
        sums[r][0] = fma(w, x0, sums[r][0]);
        sums[r][1] = fma(w, x1, sums[r][1]);
      }
    }
    UNROLL for (int r = 0; r < kTall; ++r) {
      const Vec this_id = broadcast(static_cast<float>(c + r));
      UNROLL for (int n = 0; n < 2; ++n) {
        id[n] = where_above(sums[r][n], best[n], this_id, id[n]);
        best[n] = max(sums[r][n], best[n]);
      }
    }
  }
  float id_of[kPanel];
  UNROLL for (int n = 0; n < 2; ++n) {
    store(id_of + n * kLanes, id[n]);
    store(dots + n * kLanes, best[n]);
  }
  for (int t = 0; t < kPanel; ++t) ids[t] = static_cast<std::int32_t>(id_of[t]);
}

template <class T>
void nearest(RowPointers rows, int count, const float* mean, const float* centres, int num_centres,
             int head_dim, std::int32_t* ids, float* dots) {
  alignas(64) float panel[kPanel * 256];
  for (int t = 0; t < count; t += kPanel) {
    pack<T>(rows + t, mean, head_dim, panel);
    nearest_of_panel(panel, centres, num_centres, head_dim, ids + t, dots + t);
  }
}

// --- similarity --------------------------------------------------------------------------------

template <class T>
void products(const void* a_, const void* b_, int head_dim, float* sums) {
  const T *a = static_cast<const T*>(a_), *b = static_cast<const T*>(b_);
  Vec aa = zero(), ab = zero(), bb = zero();
  const auto add = [&](Vec x, Vec y) {
    aa = fma(x, x, aa);
    ab = fma(x, y, ab);
    bb = fma(y, y, bb);
  };
  int i = 0;
  for (; i + 2 * kLanes <= head_dim; i += 2 * kLanes) {
    const Pair x = load_pair(a + i), y = load_pair(b + i);
    add(x.a, y.a);
    add(x.b, y.b);
  }
  if (i < head_dim) add(load(a + i), load(b + i));
  sums[0] = reduce_add(aa);
  sums[1] = reduce_add(ab);
  sums[2] = reduce_add(bb);
}

// --- rows changed in place ---------------------------------------------------------------------

template <class T>
void rotate(void* row_, int half, const float* cos, const float* sin) {
  const auto turn = [](T* first, T* second, Vec c, Vec s) {
    const Vec x = load(first), y = load(second);
    store(first, x * c - y * s);
    store(second, fma(x, s, y * c));
  };
  T* row = static_cast<T*>(row_);
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    turn(row + i, row + half + i, load(cos + i), load(sin + i));
  }
  if (const int n = half - i; n > 0) {
    T first[kLanes] = {}, second[kLanes] = {};
    const auto bytes = n * sizeof(T);
    __builtin_memcpy(first, row + i, bytes);
    __builtin_memcpy(second, row + half + i, bytes);
    turn(first, second, load_first(cos + i, n), load_first(sin + i, n));
    __builtin_memcpy(row + i, first, bytes);
    __builtin_memcpy(row + half + i, second, bytes);
  }
}

void accumulate(float* acc, float factor, const float* x, float weight, int count) {
  const Vec f = broadcast(factor), w = broadcast(weight);
  for (int i = 0; i < count; i += kLanes) {
    store(acc + i, fma(load(acc + i), f, load(x + i) * w));
  }
}

// --- page scores -------------------------------------------------------------------------------

void token_scores(const float* logits, std::int64_t stride, const float* lse, int num_heads,
                  int count, bool use_max, float* tokens) {
  for (int t = 0; t < count; t += kLanes) store(tokens + t, broadcast(use_max ? -kInfinity : 0));
  for (int h = 0; h < num_heads; ++h, logits += stride) {  // head by head: reads are in sequence
    const Vec shift = broadcast(lse[h] == -kInfinity ? kInfinity : lse[h]);  // all masked: 0
    for (int t = 0; t < count; t += kLanes) {
      const int n = min(count - t, kLanes);
      const Vec exponent = (n == kLanes ? load(logits + t) : load_first(logits + t, n)) - shift;
      const Vec score = load(tokens + t);
      store(tokens + t, use_max ? max(score, exponent) : score + exp(exponent));
    }
  }
  // The exp of the largest exponent is the largest exp: one exp per token for the maximum.
  for (int t = 0; use_max && t < count; t += kLanes) store(tokens + t, exp(load(tokens + t)));
}

float sum(const float* x, int count) {
  Vec total = zero();
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) total = total + load(x + i);
  if (i < count) total = total + load_first(x + i, count - i);
  return reduce_add(total);
}

// --- hits --------------------------------------------------------------------------------------

void hit_bits(const float* logits, std::int64_t stride, const float* lse, int num_heads, int count,
              float log_threshold, std::uint32_t* words) {
  const int whole = count / 32, rest = count % 32;
  const Vec limit = broadcast(log_threshold);
  for (int w = 0; w < whole + (rest > 0); ++w) words[w] = 0;
  for (int h = 0; h < num_heads; ++h, logits += stride) {  // head by head: reads are in sequence
    const Vec shift = broadcast(lse[h] == -kInfinity ? kInfinity : lse[h]);  // all masked: no hit
    const float* x = logits;
    for (int w = 0; w < whole; ++w, x += 32) {
      std::uint32_t bits = words[w];
      UNROLL for (int i = 0; i < 32; i += kLanes) bits |= at_least(load(x + i) - shift, limit) << i;
      words[w] = bits;
    }
    for (int i = 0; i < rest; i += kLanes) {
      const int n = min(rest - i, kLanes);
      words[whole] |= (at_least(load_first(x + i, n) - shift, limit) & ((1u << n) - 1)) << i;
    }
  }
}

struct Bits {  // the lanes of 32 tokens
  std::uint32_t bit[32] = {};
  constexpr Bits() {
    for (int i = 0; i < 32; ++i) bit[i] = 1u << i;
  }
};
constexpr Bits kBits;

void replay(const std::uint32_t* hits, std::int64_t stride, int num_steps, int first_step,
            std::int32_t* last_hit, std::int32_t* longest) {
  constexpr int kVectors = 32 / kLanes;
  using Ints __attribute__((vector_size(kLanes * 4))) = std::int32_t;
  Ints bit[kVectors], last[kVectors], interval[kVectors];
  __builtin_memcpy(bit, kBits.bit, sizeof bit);
  __builtin_memcpy(last, last_hit, sizeof last);
  __builtin_memcpy(interval, longest, sizeof interval);
  for (int s = 0; s < num_steps; ++s) {
    const Ints word = Ints{} + static_cast<std::int32_t>(hits[s * stride]);
    const Ints step = Ints{} + (first_step + s);
    UNROLL for (int v = 0; v < kVectors; ++v) {
      const Ints hit = (word & bit[v]) == bit[v], silent = step - last[v];
      const Ints longer = silent > interval[v] ? silent : interval[v];
      interval[v] = hit ? longer : interval[v];
      last[v] = hit ? step : last[v];
    }
  }
  __builtin_memcpy(last_hit, last, sizeof last);
  __builtin_memcpy(longest, interval, sizeof interval);
}

// --- selection ---------------------------------------------------------------------------------

inline Vec load_ranking(const float* x, int n) {  // NaN becomes -inf; lanes past n are 0
  return max(n == kLanes ? load(x) : load_first(x, n), broadcast(-kInfinity));
}

// Floats in their order have a place among the unsigned integers; its bits are found one by one.
inline float float_at(std::uint32_t place) {
  const bool negative = place < 0x80000000u;
  if (place < 0x007fffffu) return -kInfinity;  // what would be NaN
  return __builtin_bit_cast(float, negative ? ~place : place & 0x7fffffffu);
}

float nth_largest(const float* x, int count, int rank, int* num_above) {
  const auto count_if = [&](auto test) {
    int matches = 0;
    for (int i = 0; i < count; i += kLanes) {
      const int n = min(count - i, kLanes);
      matches += __builtin_popcount(test(load_ranking(x + i, n)) & ((1u << n) - 1));
    }
    return matches;
  };
  std::uint32_t place = 0;
  for (std::uint32_t bit = 0x80000000u; bit; bit >>= 1) {
    const Vec limit = broadcast(float_at(place | bit));
    const int matches = count_if([&](Vec v) { return at_least(v, limit); });
    if (matches == rank && rank < count && place != 0) {  // the float before splits them already
      *num_above = rank;
      return float_at((place | bit) - 1);
    }
    if (matches >= rank) place |= bit;
  }
  const Vec limit = broadcast(float_at(place));
  *num_above = count_if([&](Vec v) { return above(v, limit); });
  return float_at(place);
}

int bracket(const float* x, int count, float low, float high, float* inside, int* num_above) {
  const Vec lo = broadcast(low), hi = broadcast(high);
  int num_inside = 0, above_high = 0;
  for (int i = 0; i < count; i += kLanes) {
    const int n = min(count - i, kLanes);
    const Vec v = load_ranking(x + i, n);
    const unsigned exists = (1u << n) - 1;
    const unsigned over = above(v, hi) & exists;
    above_high += __builtin_popcount(over);
    num_inside += compress(inside + num_inside, exists & ~over & ~above(lo, v), v);
  }
  *num_above = above_high;
  return num_inside;
}

int select(const float* x, int count, float threshold, int num_equal, int first_id,
           std::int32_t* ids) {
  const Vec limit = broadcast(threshold);
  int selected = 0;
  for (int i = 0; i < count; i += kLanes) {
    const int n = min(count - i, kLanes);
    const Vec v = load_ranking(x + i, n);
    const unsigned exists = (1u << n) - 1;
    unsigned take = above(v, limit) & exists, ties = equal(v, limit) & exists;
    for (; ties && num_equal > 0; ties &= ties - 1, --num_equal) take |= ties & -ties;
    selected += compress_ids(ids + selected, take, first_id + i);
  }
  return selected;
}

using Ints __attribute__((vector_size(kLanes * 4))) = std::int32_t;

// The same wherever integers lie.
using IntsAt __attribute__((vector_size(kLanes * 4), aligned(4), may_alias)) = std::int32_t;

inline const IntsAt& ints_at(const std::int32_t* p) { return *reinterpret_cast<const IntsAt*>(p); }
inline IntsAt& ints_at(std::int32_t* p) { return *reinterpret_cast<IntsAt*>(p); }

// Signed integers in the order of the floats, and back.
inline std::int32_t flip(std::int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// Keys and weights, of which only those between the bounds of a bisection are kept.
struct Weighed {
  std::int32_t *key, *weight;
  int count;

  std::int32_t at_least(std::int32_t limit) const {
    Ints total = {};
    for (int i = 0; i < count; i += kLanes) {
      total += (ints_at(key + i) >= limit) & ints_at(weight + i);
    }
    std::int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
    return sum;
  }

  void keep(std::int32_t low, std::int32_t high) {
    int kept = 0;
    for (int i = 0; i < count; i += kLanes) {
      const Ints k = ints_at(key + i), w = ints_at(weight + i);
      // As floats, for the sake of masks: 1 where a key is kept.
      const Ints inside = (k >= low) & (k <= high) & (w > 0) & 0x3f800000;
      const unsigned mask = above(__builtin_bit_cast(Vec, inside), zero());
      compress(reinterpret_cast<float*>(weight) + kept, mask, __builtin_bit_cast(Vec, w));
      kept += compress(reinterpret_cast<float*>(key) + kept, mask, __builtin_bit_cast(Vec, k));
    }
    count = kept;
    ints_at(weight + count) = Ints{};  // what the last vector holds beyond weighs nothing
  }
};

float weighted_threshold(const float* x, const std::int32_t* bounds, int count, std::int32_t budget,
                         std::int32_t* space, std::int32_t* left) {
  Weighed all{space, space + count + 16, count};
  const int whole = count / kLanes * kLanes;
  Ints least = Ints{} + 0x7fffffff, most = ~least;
  for (int i = 0; i < whole; i += kLanes) {
    const auto bits = __builtin_bit_cast(Ints, load_ranking(x + i, kLanes) + zero());  // no -0
    const Ints key = bits ^ (bits >> 31 & 0x7fffffff);
    ints_at(all.key + i) = key;
    ints_at(all.weight + i) = ints_at(bounds + i + 1) - ints_at(bounds + i);
    least = key < least ? key : least;
    most = key > most ? key : most;
  }
  std::int32_t low = 0x7fffffff, high = -low;
  for (int lane = 0; lane < kLanes && whole; ++lane) {
    low = least[lane] < low ? least[lane] : low;
    high = most[lane] > high ? most[lane] : high;
  }
  ints_at(all.weight + whole) = Ints{};
  for (int i = whole; i < count; ++i) {
    const float value = x[i] >= -kInfinity ? x[i] + 0.0f : -kInfinity;
    const std::int32_t key = flip(__builtin_bit_cast(std::int32_t, value));
    all.key[i] = key;
    all.weight[i] = bounds[i + 1] - bounds[i];
    low = key < low ? key : low;
    high = key > high ? key : high;
  }

  std::int32_t above_high = 0;  // the weight of keys that have been put aside: all above the rest
  for (int pass = 1; low < high; ++pass) {
    const auto distance = static_cast<std::uint32_t>(high) - static_cast<std::uint32_t>(low);
    const auto middle = static_cast<std::int32_t>(high - distance / 2);
    const std::int32_t weight = above_high + all.at_least(middle);
    if (weight >= budget) {
      low = middle;
    } else {
      high = middle - 1;
    }
    if (pass % 4 == 0 && all.count > kLanes) {
      above_high += high < 0x7fffffff ? all.at_least(high + 1) : 0;
      all.keep(low, high);
    }
  }
  *left = budget - above_high - all.at_least(low + 1);
  return __builtin_bit_cast(float, flip(low));
}

// --- the table ---------------------------------------------------------------------------------

template <class T>
constexpr TypedRows typed_rows() {
  return {&prepare_q<T>, &qk<T>,      &pv<T>,     &store_row<T>,
          &blend<T>,     &nearest<T>, &rotate<T>, &products<T>};
}

constexpr Rows make_rows(const char* isa) {
  return {isa,
          typed_rows<float>(),
          typed_rows<Half>(),
          typed_rows<Bfloat16>(),
          &softmax,
          &accumulate,
          &token_scores,
          &sum,
          &hit_bits,
          &replay,
          &nth_largest,
          &bracket,
          &select,
          &weighted_threshold};
}
