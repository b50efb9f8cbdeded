// A matrix of weights against a few rows. Part of rows.inl.

// B rows of x against R weights at a time, each of which is read once. A sum runs through its row
// from the first element to the last, alone in its vector, so it does not depend on B.
template <class T, int B>
void linear_block(const float* prepared_x, const T* weight, std::int64_t stride, int width,
                  std::int64_t count, const T* bias, T* y, std::int64_t stride_y) {
  using D = Dot<T>;
  using Query = typename D::Query;
  constexpr int R = kLanes / (B <= 2 ? 2 : B <= 4 ? 4 : 8);
  const int whole = width / D::kStep * D::kStep;
  const std::int64_t stride_x = linear_stride(width) * (sizeof(float) / sizeof(Query));
  constexpr int kAhead = 16384 / sizeof(T);  // elements: what is fetched while others are in work
  const int ahead = kAhead / (width + 1) + R;
  const auto* x = reinterpret_cast<const Query*>(prepared_x);
  for (std::int64_t o = 0; o < count; o += R) {
    const int present = count - o < R ? static_cast<int>(count - o) : R;
    const T *rows[R], *fetch[R];
    UNROLL for (int r = 0; r < R; ++r) {
      rows[r] = weight + (o + min(r, present - 1)) * stride;
      fetch[r] = weight + (o + r + ahead < count ? o + r + ahead : count - 1) * stride;
    }
    Vec sums[kLanes];
    UNROLL for (int i = 0; i < kLanes; ++i) sums[i] = zero();
    const auto add = [&](int i, const T* const(&from)[R]) {
      decltype(D::row(from[0])) k[R];
      UNROLL for (int r = 0; r < R; ++r) k[r] = D::row(from[r]);
      UNROLL for (int b = 0; b < B; ++b) {
        const auto q = D::query(x + b * stride_x + i);
        UNROLL for (int r = 0; r < R; ++r) sums[b * R + r] = D::add(q, k[r], sums[b * R + r]);
      }
    };
    for (int i = 0; i < whole; i += D::kStep) {
      const T* from[R];
      UNROLL for (int r = 0; r < R; ++r) {
        prefetch<D::kStep * sizeof(T)>(fetch[r], i * sizeof(T));
        from[r] = rows[r] + i;
      }
      add(i, from);
    }
    if (whole < width) {
      T last[R][D::kStep] = {};
      const T* from[R];
      UNROLL for (int r = 0; r < R; ++r) {
        __builtin_memcpy(last[r], rows[r] + whole, (width - whole) * sizeof(T));
        from[r] = last[r];
      }
      add(whole, from);
    }
    T block[kLanes] = {};
    for (int i = 0; bias && i < B * R; ++i) block[i] = bias[o + min(i % R, present - 1)];
    store(block, reduce(sums) + load(block));
    for (int b = 0; b < B; ++b) {
      for (int r = 0; r < present; ++r) y[b * stride_y + o + r] = block[b * R + r];
    }
  }
}

template <class T>
void linear(const float* prepared_x, int num_rows, const void* weight, std::int64_t stride,
            int width, std::int64_t count, const void* bias, void* y, std::int64_t stride_y) {
  constexpr decltype(&linear_block<T, 1>) kBlocks[kLinearRows] = {
      &linear_block<T, 1>, &linear_block<T, 2>, &linear_block<T, 3>, &linear_block<T, 4>,
      &linear_block<T, 5>, &linear_block<T, 6>, &linear_block<T, 7>, &linear_block<T, 8>};
  kBlocks[num_rows - 1](prepared_x, static_cast<const T*>(weight), stride, width, count,
                        static_cast<const T*>(bias), static_cast<T*>(y), stride_y);
}
