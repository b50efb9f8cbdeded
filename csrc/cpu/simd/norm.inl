// RMS norm of a row. Part of rows.inl.

template <class T>
void norm(const void* x_, const void* weight_, int width, float over, float eps, void* out_) {
  constexpr int kStep = 2 * kLanes;
  const T *x = static_cast<const T*>(x_), *weight = static_cast<const T*>(weight_);
  T* out = static_cast<T*>(out_);
  Vec even = zero(), odd = zero();
  for (int i = 0; i < width; i += kStep) {
    const Pair p = load_pair(x + i);
    even = fma(p.a, p.a, even);
    odd = fma(p.b, p.b, odd);
  }
  const Vec factor = broadcast(1.0f / __builtin_sqrtf(reduce_add(even + odd) * over + eps));
  for (int i = 0; i < width; i += kStep) {
    const Pair p = load_pair(x + i), w = load_pair(weight + i);
    store_pair(out + i, Pair{p.a * factor * w.a, p.b * factor * w.b});
  }
}
