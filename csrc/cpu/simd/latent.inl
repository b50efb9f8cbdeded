// Attention of many queries over rows that they share: a tile of keys is packed once, lane by
// token, and multiplied without sums across lanes. Part of rows.inl.

// A step of a packed tile is 4 bytes of each of its kTile rows, side by side: an element in fp32.
// An instruction set with a dot product of its own specialises it.
template <class T>
struct Packed {
  static constexpr int kElements = 1;  // of a step

  static Vec steps(const T* row) { return load(row); }  // kLanes of them
  static Vec add(Vec q, Vec k, Vec sum) { return fma(q, k, sum); }
};

template <class T>
constexpr int kPackedAtOnce = kLanes * Packed<T>::kElements;  // elements of a row

template <class T>
inline Vec steps_at(const T* row, int i, int head_dim) {
  if (i + kPackedAtOnce<T> <= head_dim) return Packed<T>::steps(row + i);
  T last[kPackedAtOnce<T>] = {};
  __builtin_memcpy(last, row + i, (head_dim - i) * sizeof(T));
  return Packed<T>::steps(last);
}

template <class T>
void prepare_shared_q(const void* q, int head_dim, float* prepared) {
  for (int i = 0; i < head_dim; i += kPackedAtOnce<T>, prepared += kLanes) {
    store(prepared, steps_at(static_cast<const T*>(q), i, head_dim));
  }
}

template <class T>
void pack(RowPointers rows, int head_dim, float* packed) {
  for (int t = 0; t < kTile; t += kLanes) {
    float* to = packed + t;
    for (int i = 0; i < head_dim; i += kPackedAtOnce<T>, to += kLanes * kTile) {
      Vec square[kLanes];
      UNROLL for (int r = 0; r < kLanes; ++r) {
        square[r] = steps_at(static_cast<const T*>(rows[t + r]), i, head_dim);
      }
      transpose(square);
      UNROLL for (int s = 0; s < kLanes; ++s) store(to + s * kTile, square[s]);
    }
  }
}

constexpr int kPackedChunk = 96;  // steps of a tile that stay in L1 for all heads

template <class T, int H>
void qk_block(const float* q, int head_dim, const float* packed, int steps, bool first, float scale,
              float* logits) {
  constexpr int N = kSharedVectors;
  for (int t = 0; t < kTile; t += N * kLanes) {
    Vec sums[H][N];
    UNROLL for (int h = 0; h < H; ++h) { UNROLL for (int n = 0; n < N; ++n) sums[h][n] = zero(); }
    for (int s = 0; s < steps; ++s) {
      Vec k[N];
      UNROLL for (int n = 0; n < N; ++n) k[n] = load(packed + s * kTile + t + n * kLanes);
      UNROLL for (int h = 0; h < H; ++h) {
        const Vec x = broadcast(q[h * head_dim + s]);
        UNROLL for (int n = 0; n < N; ++n) sums[h][n] = Packed<T>::add(x, k[n], sums[h][n]);
      }
    }
    UNROLL for (int h = 0; h < H; ++h) {
      UNROLL for (int n = 0; n < N; ++n) {
        float* out = logits + h * kTile + t + n * kLanes;
        const Vec before = first ? zero() : load(out);
        store(out, fma(sums[h][n], broadcast(scale), before));
      }
    }
  }
}

template <class T>
void qk_packed(const float* prepared_q, int num_heads, int head_dim, const float* packed,
               float scale, float* logits) {
  const int all = (head_dim + kPackedAtOnce<T> - 1) / kPackedAtOnce<T> * kLanes;
  for (int s = 0; s < all; s += kPackedChunk) {
    const int steps = min(all - s, kPackedChunk);
    for_heads<kSharedHeads>(num_heads, [&](int h, auto heads) {
      qk_block<T, heads.value>(prepared_q + h * head_dim + s, head_dim, packed + s * kTile, steps,
                               s == 0, scale, logits + h * kTile);
    });
  }
}

// A column of the tile, N vectors wide, is read once for all heads while it stays in L1.
template <class T, int N = kSharedVectors>
void pv_shared_columns(const float* probs, int num_heads, int width, RowPointers rows, int count,
                       const float* rescale, float* acc, int column) {
  Fetch nothing;
  for (; column + N * kLanes <= width; column += N * kLanes) {
    for_heads<kSharedHeads>(num_heads, [&](int h, auto heads) {
      pv_block<T, heads.value, N>(probs + h * kTile, width, rows, count, nothing, rescale + h,
                                  column, acc + h * width);
    });
  }
  if constexpr (N > 1) {
    pv_shared_columns<T, N / 2>(probs, num_heads, width, rows, count, rescale, acc, column);
  }
}

template <class T>
void pv_shared(const float* probs, int num_heads, int width, RowPointers rows, int count,
               const float* rescale, float* acc) {
  pv_shared_columns<T>(probs, num_heads, width, rows, count, rescale, acc, 0);
}
