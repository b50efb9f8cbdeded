// A matrix of weights against a few rows. Part of rows.inl.

constexpr int kLinearRows = 8;

// Floats between prepared rows: one line more than they need, since rows a multiple of 4 KiB apart
// would displace each other in L1.
constexpr std::int64_t linear_stride(std::int64_t width) { return padded(width) + 16; }

inline std::int64_t linear_size(int num_rows, int width) { return num_rows * linear_stride(width); }

// Behind its width a row has zeros.
template <class T>
void prepare_linear(const void* const* x, int num_rows, int width, float* prepared) {
  using Query = typename Dot<T>::Query;
  const int whole = width / kRowStep * kRowStep, rest = width - whole;
  for (int r = 0; r < num_rows; ++r, prepared += linear_stride(width)) {
    const T* row = static_cast<const T*>(x[r]);
    auto* to = reinterpret_cast<Query*>(prepared);
    Dot<T>::prepare(row, whole, to);
    if (rest > 0) {
      T last[kRowStep] = {};
      __builtin_memcpy(last, row + whole, rest * sizeof(T));
      Dot<T>::prepare(last, kRowStep, to + whole);
    }
  }
}

// kBytes of a row, from byte `at` on, into L1; where they are less than a line, by the first of it.
template <int kBytes>
[[gnu::always_inline]] inline void prefetch(const void* row, int at) {
  if (kBytes < 64 && at % 64 != 0) return;
  for (int i = 0; i < kBytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(row) + at + i);
  }
}

// Sums of B rows of x with R weights, which are read side by side. A sum runs through its row from
// the first element to the last, alone in its vector, so it does not depend on B and R.
template <class T, int B, int R>
inline void linear_sums(const typename Dot<T>::Query* x, std::int64_t stride_x,
                        const T* const (&rows)[R], const T* const (&fetch)[R], int width,
                        Vec (&sums)[B][R]) {
  using D = Dot<T>;
  UNROLL for (int b = 0; b < B; ++b) { UNROLL for (int r = 0; r < R; ++r) sums[b][r] = zero(); }
  const auto add = [&](int i, const T* const(&from)[R]) {
    decltype(D::row(from[0])) k[R];
    UNROLL for (int r = 0; r < R; ++r) k[r] = D::row(from[r]);
    UNROLL for (int b = 0; b < B; ++b) {
      const auto q = D::query(x + b * stride_x + i);
      UNROLL for (int r = 0; r < R; ++r) sums[b][r] = D::add(q, k[r], sums[b][r]);
    }
  };
  const T* from[R];
  int i = 0;
  for (; i + D::kStep <= width; i += D::kStep) {
    UNROLL for (int r = 0; r < R; ++r) {
      prefetch<D::kStep * sizeof(T)>(fetch[r], i * sizeof(T));
      from[r] = rows[r] + i;
    }
    add(i, from);
  }
  if (i < width) {
    T last[R][D::kStep] = {};
    UNROLL for (int r = 0; r < R; ++r) {
      __builtin_memcpy(last[r], rows[r] + i, (width - i) * sizeof(T));
      from[r] = last[r];
    }
    add(i, from);
  }
}

// Memory is fastest where it is read from one end to the other: one weight after another. With many
// rows of x two at a time pay, since each load of x then serves both.
template <class T, int B>
void linear_block(const float* prepared_x, const T* weight, std::int64_t stride, int width,
                  std::int64_t count, const T* bias, T* y, std::int64_t stride_y) {
  constexpr int kOutputs = kLanes / (B <= 2 ? B : B <= 4 ? 4 : 8);  // that are reduced together
  constexpr int R = B <= 4 || kOutputs < 2 ? 1 : 2;
  constexpr int kAhead = R * (R == 1 ? 4096 : 8192) / sizeof(T);  // elements fetched ahead
  using Query = typename Dot<T>::Query;
  const auto* x = reinterpret_cast<const Query*>(prepared_x);
  const std::int64_t stride_x = linear_stride(width) * (sizeof(float) / sizeof(Query));
  const int ahead = kAhead / (width + 1) + R;  // weights
  for (std::int64_t o = 0; o < count; o += kOutputs) {
    const int present = count - o < kOutputs ? static_cast<int>(count - o) : kOutputs;
    Vec sums[kLanes];
    UNROLL for (int i = 0; i < kLanes; ++i) sums[i] = zero();
    for (int at = 0; at < present; at += R) {
      const T *rows[R], *fetch[R];
      UNROLL for (int r = 0; r < R; ++r) {
        const std::int64_t next = o + at + r + ahead;
        rows[r] = weight + (o + min(at + r, present - 1)) * stride;
        fetch[r] = weight + (next < count ? next : count - 1) * stride;
      }
      Vec block[B][R];
      linear_sums<T, B, R>(x, stride_x, rows, fetch, width, block);
      UNROLL for (int b = 0; b < B; ++b) {
        UNROLL for (int r = 0; r < R; ++r) sums[b * kOutputs + at + r] = block[b][r];
      }
    }
    T block[kLanes] = {};
    for (int i = 0; bias && i < B * kOutputs; ++i) {
      block[i] = bias[o + min(i % kOutputs, present - 1)];
    }
    store(block, reduce(sums) + load(block));
    for (int b = 0; b < B; ++b) {
      for (int r = 0; r < present; ++r) y[b * stride_y + o + r] = block[b * kOutputs + r];
    }
  }
}

template <class T>
void multiply_linear(const float* prepared_x, int num_rows, const void* weight, std::int64_t stride,
                     int width, std::int64_t count, const void* bias, void* y,
                     std::int64_t stride_y) {
  constexpr decltype(&linear_block<T, 1>) kBlocks[kLinearRows] = {
      &linear_block<T, 1>, &linear_block<T, 2>, &linear_block<T, 3>, &linear_block<T, 4>,
      &linear_block<T, 5>, &linear_block<T, 6>, &linear_block<T, 7>, &linear_block<T, 8>};
  kBlocks[num_rows - 1](prepared_x, static_cast<const T*>(weight), stride, width, count,
                        static_cast<const T*>(bias), static_cast<T*>(y), stride_y);
}
