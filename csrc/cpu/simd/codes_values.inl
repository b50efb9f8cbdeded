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
  bool finite;  // all of them; if not, integers are 0
};

inline void weigh(const float* probs, const float* scales, int count, Weights& weights) {
  Vec largest = broadcast(power_of_two(kLeastExponent)), nothing = zero();
  for (int t = 0; t < count; t += kLanes) {
    const Vec x = load(probs + t) * load(scales + t);
    largest = max(max(x, zero() - x), largest);
    nothing = fma(x, zero(), nothing);  // NaN where x is not finite
  }
  const float top = reduce_max(largest);
  weights.finite = reduce_add(nothing) == 0.0f;
  weights.unit = weights.finite ? top / kWeightBound : 0.0f;
  const Vec factor = broadcast(kWeightBound / top);
  for (int t = 0; t < count; t += kLanes) {
    const Vec x = weights.finite ? load(probs + t) * load(scales + t) * factor : zero();
    store_ints(weights.integers + t, x);
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

void add_codes(const float* probs, const float* scales, int num_heads, int head_dim,
               RowPointers rows, int count, RowPointers fetch_rows, const float* rescale,
               float* acc) {
  constexpr int kHeads = 4;
  Weights weights[kHeads];
  Fetch fetch(fetch_rows, head_dim);
  for (int h = 0, n; h < num_heads; h += n, fetch = {}) {  // later heads find the rows in L1
    n = min(num_heads - h, kHeads);
    for (int i = 0; i < n; ++i) weigh(probs + (h + i) * kTile, scales, count, weights[i]);
    const float* alpha = rescale + h;
    float* sums = acc + h * head_dim;
    switch (n) {
      case 1: add_codes_heads<1>(weights, head_dim, rows, count, fetch, alpha, sums); break;
      case 2: add_codes_heads<2>(weights, head_dim, rows, count, fetch, alpha, sums); break;
      case 3: add_codes_heads<3>(weights, head_dim, rows, count, fetch, alpha, sums); break;
      case 4: add_codes_heads<4>(weights, head_dim, rows, count, fetch, alpha, sums); break;
    }
    for (int i = 0; i < n; ++i) {
      if (weights[i].finite) continue;
      float floats[kTile];
      for (int t = 0; t < count; ++t) floats[t] = probs[(h + i) * kTile + t] * scales[t];
      add_floats(floats, head_dim, rows, count, sums + i * head_dim);  // which are rescaled by now
    }
  }
}
