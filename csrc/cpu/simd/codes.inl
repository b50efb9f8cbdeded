// Rows in eight bits: made, multiplied with queries, and added up. Part of rows.inl.
//
// Codes and queries are multiplied as integers, which is exact; scales come in afterwards, at the
// logits and at the probabilities. No row is ever turned back into floats in memory.

// --- q k^T -------------------------------------------------------------------------------------

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

// integers[i] = row[i] * factor, to the nearest within +-bound. `bound` is below 2^15.
template <class T>
void to_integers(const float* row, int head_dim, float factor, float bound, T* integers) {
  for (int i = 0; i < head_dim; i += kLanes) {
    std::int16_t lanes[kLanes];
    const Vec x = max(load(row + i) * broadcast(factor), broadcast(-bound));
    store_ints(lanes, zero() - max(zero() - x, broadcast(-bound)));
    for (int j = 0; j < kLanes; ++j) integers[i + j] = static_cast<T>(lanes[j]);
  }
}

inline float power_of_two(int exponent) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(exponent + 127) << 23);
}

// q as integers of kQueryBits and a sign; returns what one of them is worth, NaN where an element
// is not finite.
inline float integer_query(const float* q, int head_dim, std::int16_t* ints) {
  const std::int32_t top = largest_bits(q, head_dim);
  if (top >= kInfiniteBits) {
    for (int i = 0; i < head_dim; ++i) ints[i] = 0;
    return __builtin_nanf("");
  }
  const int above = (top >> 23) - 126;  // the least power of two above the row
  const int exponent = (above < kLeastExponent ? kLeastExponent : above) - kQueryBits;
  to_integers(q, head_dim, power_of_two(-exponent), 1 << kQueryBits, ints);
  return power_of_two(exponent);
}

// A prepared query: its integers, and its unit at the end.
inline void prepare_query(const float* q, int head_dim, float* prepared) {
  const float unit = integer_query(q, head_dim, reinterpret_cast<std::int16_t*>(prepared));
  prepared[head_dim - 1] = unit;
}

// H heads against kLanes / H rows at a time, as qk_heads. D is head_dim, or 0 for any. A sum's
// lanes are int32, and so are the sums of lanes: all of a row, at most 512 products of 2^14 and
// 127, stays below 2^31.
template <int H, int D>
void qk_codes_heads(const float* prepared_q, int any_dim, RowPointers rows, int count,
                    Fetch& all_fetch, float scale, const float* k_scale, float* logits) {
  constexpr int R = kLanes / (H == 3 ? 4 : H), kStep = 2 * kLanes;
  const int head_dim = D ? D : any_dim;
  const auto* q = reinterpret_cast<const std::int16_t*>(prepared_q);
  Fetch fetch = all_fetch;  // in registers
  for (int t = 0; t < count; t += R) {
    Vec sums[kLanes];
    UNROLL for (int i = 0; i < kLanes; ++i) sums[i] = zero();
    const auto add = [&](int i, auto load_k, auto load_q) {
      if constexpr (R < H) {  // what there is less of stays in registers, beside the sums
        Ints16 k[R];
        UNROLL for (int r = 0; r < R; ++r) k[r] = load_k(static_cast<const Code*>(rows[t + r]) + i);
        UNROLL for (int h = 0; h < H; ++h) {
          const Ints16 x = load_q(q + h * 2 * head_dim + i);
          UNROLL for (int r = 0; r < R; ++r) {
            sums[h * R + r] = add_products(x, k[r], sums[h * R + r]);
          }
        }
      } else {
        Ints16 x[H];
        UNROLL for (int h = 0; h < H; ++h) x[h] = load_q(q + h * 2 * head_dim + i);
        UNROLL for (int r = 0; r < R; ++r) {
          const Ints16 k = load_k(static_cast<const Code*>(rows[t + r]) + i);
          UNROLL for (int h = 0; h < H; ++h) {
            sums[h * R + r] = add_products(x[h], k, sums[h * R + r]);
          }
        }
      }
    };
    if constexpr (D > 0) fetch.rows_beside<R, D>();
    int i = 0;
    UNROLL for (; i + kStep <= head_dim; i += kStep) {
      UNROLL for (int r = 0; D == 0 && r < R; ++r) fetch.beside<kStep>(i);
      add(i, load_codes, load_ints);
    }
    if (i < head_dim) {
      UNROLL for (int r = 0; r < R; ++r) fetch.beside<kLanes>(i);
      add(i, load_half_codes, load_half_ints);
    }
    float block[kLanes];
    store(block, to_floats(reduce_ints(sums)));
    UNROLL for (int h = 0; h < H; ++h) {
      __builtin_memcpy(logits + h * kTile + t, block + h * R, R * sizeof(float));
    }
  }
  all_fetch = fetch;
  for (int h = 0; h < H; ++h) {
    const Vec unit = broadcast(prepared_q[(h + 1) * head_dim - 1] * scale);
    float* x = logits + h * kTile;
    for (int t = 0; t < count; t += kLanes) store(x + t, load(x + t) * (load(k_scale + t) * unit));
  }
}

// Way: how codes are multiplied, see AsPairs. The common sizes of a head have code of their own.
template <class Way>
void qk_codes(const float* prepared_q, int num_heads, int head_dim, RowPointers rows, int count,
              RowPointers fetch_rows, float scale, const float* k_scale, float* logits) {
  Fetch fetch(fetch_rows, head_dim);
  for_heads<4>(num_heads, [&](int h, auto heads) {
    const auto multiply = [&](auto dim) {
      Way::template multiply<heads.value, dim.value>(prepared_q + h * Way::query_size(head_dim),
                                                     head_dim, rows, count, fetch, scale, k_scale,
                                                     logits + h * kTile);
    };
    switch (head_dim) {
      case 64: multiply(Count<64>{}); break;
      case 128: multiply(Count<128>{}); break;
      default: multiply(Count<0>{});
    }
    fetch = {};  // later heads find the rows in L1
  });
}

// --- scales ------------------------------------------------------------------------------------

void split_words(const std::uint32_t* words, int count, float* k_scale, float* v_scale) {
  Half low[kTile], high[kTile];
  for (int t = 0; t < count; ++t) {
    low[t] = {static_cast<std::uint16_t>(words[t])};
    high[t] = {static_cast<std::uint16_t>(words[t] >> 16)};
  }
  for (int t = count; t < kTile; ++t) low[t] = high[t] = {};
  for (int t = 0; t < kTile; t += kLanes) {
    store(k_scale + t, load(low + t));
    store(v_scale + t, load(high + t));
  }
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
