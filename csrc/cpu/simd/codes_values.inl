// The sum of values in eight bits. Part of rows.inl.
//
// What a token's codes weigh, its probability times the scale of its value, becomes an int16, with
// one unit per tile and head: the largest weight is kWeightBound of it. Codes of two tokens are
// interleaved, so that one instruction multiplies both with their weights and adds them up in
// int32, which is exact: kTile products of kWeightBound and 128 stay below 2^31. So a head gets the
// same bits whatever heads it is computed with. A weight is wrong by at most half a unit, 2^-16 of
// the largest, where a code is wrong by 2^-8 of the largest in its row.

constexpr int kWeightBound = 32767;

// What the tokens of a tile weigh under one head.
struct Weights {
  std::int16_t integers[kTile];
  float unit;
  bool whole;  // integers stand for all of them; if not, they are 0

  void put(int t, Vec x) { store_ints(integers + t, x); }
};

// Weights that are infinite, NaN or below 0 do not become integers.
template <class W>
void weigh(const float* probs, const float* scales, int count, W& weights) {
  Vec x[kTile / kLanes], largest = broadcast(power_of_two(kLeastExponent));
  constexpr unsigned kAll = (1u << kLanes) - 1;
  unsigned positive = kAll;
  UNROLL for (int i = 0; i < kTile / kLanes; ++i) {
    const int t = i * kLanes;
    x[i] = t < count ? load(probs + t) * load(scales + t) : zero();
    largest = max(x[i], largest);
    positive &= at_least(x[i], zero());
  }
  const float top = reduce_max(largest);
  weights.whole = positive == kAll && top < kInfinity;
  weights.unit = weights.whole ? top / kWeightBound : 0.0f;
  const Vec factor = broadcast(kWeightBound / top);
  UNROLL for (int i = 0; i < kTile / kLanes; ++i) {
    weights.put(i * kLanes, weights.whole ? x[i] * factor : zero());
  }
}

// N vectors of a row from `column` on, for H heads.
template <int H, int N>
void add_codes_block(const Weights* weights, int head_dim, RowPointers rows, int count,
                     Fetch& fetch, const float* rescale, int column, float* acc) {
  constexpr int kStep = N == 1 ? 1 : 2;  // vectors
  Vec sums[H][N];
  UNROLL for (int h = 0; h < H; ++h) { UNROLL for (int n = 0; n < N; ++n) sums[h][n] = zero(); }
  for (int t = 0; t < count; t += 2) {  // behind an odd count the list goes on, with weight 0
    fetch.beside<N * kLanes>(column);
    fetch.beside<N * kLanes>(column);
    const Code* first = static_cast<const Code*>(rows[t]) + column;
    const Code* second = static_cast<const Code*>(rows[t + 1]) + column;
    UNROLL for (int n = 0; n < N; n += kStep) {
      Ints16 v[kStep];
      if constexpr (N == 1) {
        v[0] = interleave_half_codes(first, second);
      } else {
        interleave_codes(first + n * kLanes, second + n * kLanes, v[0], v[1]);
      }
      UNROLL for (int h = 0; h < H; ++h) {
        const Ints16 w = broadcast_ints(weights[h].integers + t);
        UNROLL for (int i = 0; i < kStep; ++i) {
          sums[h][n + i] = add_products(w, v[i], sums[h][n + i]);
        }
      }
    }
  }
  UNROLL for (int h = 0; h < H; ++h) {
    const Vec unit = broadcast(weights[h].unit), alpha = broadcast(rescale[h]);
    float* out = acc + h * head_dim + column;
    UNROLL for (int n = 0; n < N; n += kStep) {
      if constexpr (N > 1) in_order(sums[h][n], sums[h][n + 1]);
    }
    UNROLL for (int n = 0; n < N; ++n) {
      const Vec old = load(out + n * kLanes) * alpha;
      store(out + n * kLanes, fma(to_floats(sums[h][n]), unit, old));
    }
  }
}

// As many vectors at once as there are sums, then half as many of what is left.
template <int H, int N = kSums / H / 2 * 2>
void add_codes_heads(const Weights* weights, int head_dim, RowPointers rows, int count,
                     Fetch& fetch, const float* rescale, float* acc, int column = 0) {
  for (; column + N * kLanes <= head_dim; column += N * kLanes) {
    add_codes_block<H, N>(weights, head_dim, rows, count, fetch, rescale, column, acc);
  }
  if constexpr (N > 1) {
    add_codes_heads<H, N / 2>(weights, head_dim, rows, count, fetch, rescale, acc, column);
  }
}

void add_floats(const float* weights, int head_dim, RowPointers rows, int count, float* acc) {
  const float rescale = 1.0f;
  Fetch none;
  pv_heads<Code, 1>(weights, head_dim, rows, count, none, &rescale, acc);
}

// How codes are multiplied: as pairs of int16. Bit h of what `add` returns says whether integers do
// not stand for the weights of head h, and nothing was added.
struct AsPairs {
  static int query_size(int head_dim) { return head_dim; }
  static void prepare(const float* q, int head_dim, float* prepared) {
    prepare_query(q, head_dim, prepared);
  }

  template <int H, int D>
  static void multiply(const float* prepared_q, int head_dim, RowPointers rows, int count,
                       Fetch& fetch, float scale, const float* k_scale, float* logits) {
    qk_codes_heads<H, D>(prepared_q, head_dim, rows, count, fetch, scale, k_scale, logits);
  }

  template <int H>
  static unsigned add(const float* probs, const float* scales, int head_dim, RowPointers rows,
                      int count, Fetch& fetch, const float* rescale, float* acc, int column = 0) {
    Weights weights[H];
    unsigned left = 0;
    for (int h = 0; h < H; ++h) {
      weigh(probs + h * kTile, scales, count, weights[h]);
      left |= !weights[h].whole << h;
    }
    add_codes_heads<H>(weights, head_dim, rows, count, fetch, rescale, acc, column);
    return left;
  }
  static void arrange(float*, int) {}  // sums are in the order of elements
};

template <class Way>
void add_codes(const float* probs, const float* scales, int num_heads, int head_dim,
               RowPointers rows, int count, RowPointers fetch_rows, const float* rescale,
               float* acc) {
  Fetch fetch(fetch_rows, head_dim);
  for_heads<4>(num_heads, [&](int h, auto heads) {
    unsigned left = Way::template add<heads.value>(probs + h * kTile, scales, head_dim, rows, count,
                                                   fetch, rescale + h, acc + h * head_dim);
    fetch = {};  // later heads find the rows in L1
    for (; left; ++h, left >>= 1) {
      if (left % 2 == 0) continue;
      float weights[kTile], *row = acc + h * head_dim;  // which is rescaled by now
      for (int t = 0; t < count; ++t) weights[t] = probs[h * kTile + t] * scales[t];
      Way::arrange(row, head_dim);
      add_floats(weights, head_dim, rows, count, row);
      Way::arrange(row, head_dim);
    }
  });
}

template <class Way>
constexpr CodeRows code_rows() {
  return {&Way::query_size, &Way::prepare, &qk_codes<Way>,
          &add_codes<Way>,  &Way::arrange, &add_floats,
          &split_words,     &quantize,     &turn};
}
