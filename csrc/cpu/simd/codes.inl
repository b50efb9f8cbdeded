// Rows in eight bits: made, multiplied with queries, and added up. Part of rows.inl.
//
// Codes and queries are multiplied as integers, which is exact; scales come in afterwards, at the
// logits and at the probabilities. No row is ever turned back into floats in memory.

// --- q k^T -------------------------------------------------------------------------------------

// A sum's lanes are int32, and so are the sums of lanes: all of a row, at most 512 products of 2^14
// and 127, stays below 2^31.
template <>
struct Dot<Code> {
  using Query = std::int16_t;
  static constexpr int kStep = 2 * kLanes;

  static Ints16 query(const Query* q) { return load_ints(q); }
  static Ints16 row(const Code* k) { return load_codes(k); }
  static Vec add(Ints16 q, Ints16 k, Vec sum) { return add_products(q, k, sum); }

  static Ints16 half_query(const Query* q) { return load_half_ints(q); }
  static Ints16 half_row(const Code* k) { return load_half_codes(k); }
  static Vec half_add(Ints16 q, Ints16 k, Vec sum) { return add(q, k, sum); }
  static Vec finish(const Vec (&sums)[kLanes]) { return to_floats(reduce_ints(sums)); }
};

// The largest magnitude of a row as bits, which order as the numbers do; infinities and NaN are at
// least kInfiniteBits.
constexpr std::int32_t kInfiniteBits = 0x7f800000;

inline std::int32_t largest_bits(const float* row, int head_dim) {
  std::int32_t top = 0;
  for (int i = 0; i < head_dim; ++i) {
    const std::int32_t bits = __builtin_bit_cast(std::int32_t, row[i]) & 0x7fffffff;
    top = top > bits ? top : bits;
  }
  return top;
}

// integers[i] = row[i] * factor, to the nearest within +-bound. `bound` is below 2^22.
template <class T>
void to_integers(const float* row, int head_dim, float factor, float bound, T* integers) {
  for (int i = 0; i < head_dim; i += kLanes) {
    float lanes[kLanes];
    const Vec x = max(load(row + i) * broadcast(factor), broadcast(-bound));
    store(lanes, round(zero() - max(zero() - x, broadcast(-bound))));
    for (int j = 0; j < kLanes; ++j) {
      integers[i + j] = static_cast<T>(static_cast<std::int32_t>(lanes[j]));
    }
  }
}

inline float power_of_two(int exponent) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(exponent + 127) << 23);
}

void prepare_query(const float* q, int head_dim, float* prepared) {
  const std::int32_t top = largest_bits(q, head_dim);
  auto* ints = reinterpret_cast<std::int16_t*>(prepared);
  if (top >= kInfiniteBits) {
    for (int i = 0; i < head_dim; ++i) ints[i] = 0;
    prepared[head_dim - 1] = __builtin_nanf("");
    return;
  }
  const int above = (top >> 23) - 126;  // the least power of two above the row
  const int exponent = (above < kLeastExponent ? kLeastExponent : above) - kQueryBits;
  to_integers(q, head_dim, power_of_two(-exponent), 1 << kQueryBits, ints);
  prepared[head_dim - 1] = power_of_two(exponent);
}

// --- scales ------------------------------------------------------------------------------------

void split_words(const std::uint32_t* words, int count, float* k_scale, float* v_scale) {
  float both[2 * kTile];
  const auto* halves = reinterpret_cast<const Half*>(words);
  int i = 0;
  for (; i + kLanes <= 2 * count; i += kLanes) store(both + i, load(halves + i));
  if (i < 2 * count) {
    Half rest[kLanes] = {};
    __builtin_memcpy(rest, halves + i, (2 * count - i) * sizeof(Half));
    store(both + i, load(rest));
  }
  for (int t = 0; t < count; ++t) {
    k_scale[t] = both[2 * t];
    v_scale[t] = both[2 * t + 1];
  }
  for (int t = count; t < kTile; ++t) k_scale[t] = v_scale[t] = 0.0f;
}

void multiply(float* x, const float* factors, float factor, int count) {
  for (int t = 0; t < count; ++t) x[t] *= factors[t] * factor;
}

// --- codes are made ----------------------------------------------------------------------------

std::uint16_t quantize(const float* row, int head_dim, std::int8_t* codes) {
  constexpr std::uint16_t kNan = 0x7e00;
  const std::int32_t top = largest_bits(row, head_dim);
  Half scales[kLanes];
  store(scales, broadcast(__builtin_bit_cast(float, top) / 127.0f));
  const bool finite = top < kInfiniteBits && scales[0].bits < 0x7c00;
  const float scale = first(load(scales));
  if (!finite) {
    for (int i = 0; i < head_dim; ++i) codes[i] = 0;
    return kNan;
  }
  // The bound matters where the scale was rounded down, by much if it is subnormal.
  to_integers(row, head_dim, scale > 0 ? 1.0f / scale : 0.0f, 127.0f, codes);
  return scales[0].bits;
}

void turn(float* row, int head_dim) {
  int half = 1;
  for (; half < head_dim && half < kLanes; half *= 2) {
    for (int i = 0; i < head_dim; i += 2 * half) {
      for (int j = i; j < i + half; ++j) {
        const float a = row[j], b = row[j + half];
        row[j] = a + b;
        row[j + half] = a - b;
      }
    }
  }
  for (; half < head_dim; half *= 2) {
    for (int i = 0; i < head_dim; i += 2 * half) {
      for (int j = i; j < i + half; j += kLanes) {
        const Vec a = load(row + j), b = load(row + j + half);
        store(row + j, a + b);
        store(row + j + half, a - b);
      }
    }
  }
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  for (int i = 0; i < head_dim; ++i) row[i] *= factor;
}

// --- in the order of elements ------------------------------------------------------------------

template <class T>
void widen_row(const void* row_, int head_dim, float* out) {
  const T* row = static_cast<const T*>(row_);
  for (int i = 0; i < head_dim; i += kLanes) store(out + i, load(row + i));
}

template <class T>
void narrow_row(const float* row, float factor, int head_dim, void* out_) {
  T* out = static_cast<T*>(out_);
  for (int i = 0; i < head_dim; i += kLanes) store(out + i, load(row + i) * broadcast(factor));
}
