// Rows in eight bits with a dot product of four bytes. Included after rows.inl by an instruction
// set that has one, in place of qk and pv of codes.inl and codes_values.inl, with the same
// integers.
//
// Queries and weights are split into two bytes, and both multiply the codes as they lie: no code is
// widened. Rows of four tokens are interleaved, codes of keys in fours and codes of values one by
// one, so that lanes of a sum belong to tokens or to columns, and few sums are added across lanes.
//
// The instruction multiplies unsigned bytes with signed ones. Weights are not negative. Codes of
// keys are, and get 128 more: 128 times the sum of the query is subtracted again, all modulo 2^32.

using Bytes = __m512i;  // four to a lane of a sum, which is an int32
constexpr int kBytes = 64;

inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes load_first_bytes(const void* p, int n) {  // and zeros
  return _mm512_maskz_loadu_epi8(n >= kBytes ? ~0ull : (1ull << n) - 1, p);
}
inline Bytes broadcast_four(const std::uint8_t* p) {
  std::int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}
// In assembly, because GCC 12 copies every sum into another register and back.
inline Bytes add_products_of_bytes(Bytes of_unsigned, Bytes of_signed, Bytes sum) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(of_unsigned), "v"(of_signed));
  return sum;
}
inline Bytes join(Bytes high, Bytes low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}
// Quarters 0 + 1 and 2 + 3 of a, then of b.
inline Bytes add_quarters(Bytes a, Bytes b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// --- q k^T -------------------------------------------------------------------------------------

// A prepared query: its unit, what 128 more in the codes add to a product, and for every kBytes
// elements four vectors of high bytes and of low ones in turn. Vector i has the elements 4 * i to
// 4 * i + 3 of each quarter, four times.
struct ByteQuery {
  float unit;
  std::int32_t surplus;
  alignas(64) std::int8_t bytes[];
};

inline int byte_query_size(int head_dim) {  // floats
  return (sizeof(ByteQuery) + 8 * kBytes * ((head_dim + kBytes - 1) / kBytes)) / sizeof(float);
}

inline void prepare_byte_query(const float* q, int head_dim, float* prepared) {
  std::int16_t ints[kMostQuery] = {};
  auto& query = *reinterpret_cast<ByteQuery*>(prepared);
  query.unit = integer_query(q, head_dim, ints);
  query.surplus = 0;
  for (int i = 0; i < head_dim; ++i) query.surplus += 128 * ints[i];
  std::int8_t* out = query.bytes;
  for (int i = 0; i < head_dim; i += kBytes) {
    Bytes high = {}, low = {};
    UNROLL for (int half = 0; half < 2; ++half) {
      const __m512i x = load_ints(ints + i + half * 32);
      const __m512i above = _mm512_srai_epi16(_mm512_add_epi16(x, _mm512_set1_epi16(128)), 8);
      high = _mm512_mask_broadcast_i64x4(high, half ? 0xf0 : 0x0f, _mm512_cvtepi16_epi8(above));
      low = _mm512_mask_broadcast_i64x4(low, half ? 0xf0 : 0x0f, _mm512_cvtepi16_epi8(x));
    }
    const auto store_vector = [&](auto vector) {
      constexpr auto same = static_cast<_MM_PERM_ENUM>(vector.value * 0x55);  // of a quarter's four
      _mm512_store_si512(out, _mm512_shuffle_epi32(high, same));
      _mm512_store_si512(out + kBytes, _mm512_shuffle_epi32(low, same));
      out += 2 * kBytes;
    };
    store_vector(Count<0>{});
    store_vector(Count<1>{});
    store_vector(Count<2>{});
    store_vector(Count<3>{});
  }
}

// Codes from `column` on of four rows, 128 more each: vector i has the codes 4 * i to 4 * i + 3 of
// each quarter, of one row after another.
inline void load_keys(RowPointers rows, int column, int head_dim, Bytes (&out)[4]) {
  Bytes row[4];
  UNROLL for (int r = 0; r < 4; ++r) {
    const Code* codes = static_cast<const Code*>(rows[r]) + column;
    const int rest = head_dim - column;
    row[r] = rest >= kBytes ? load_bytes(codes) : load_first_bytes(codes, rest);
    row[r] = _mm512_xor_si512(row[r], _mm512_set1_epi8(-128));
  }
  const Bytes ab_low = _mm512_unpacklo_epi32(row[0], row[1]);
  const Bytes ab_high = _mm512_unpackhi_epi32(row[0], row[1]);
  const Bytes cd_low = _mm512_unpacklo_epi32(row[2], row[3]);
  const Bytes cd_high = _mm512_unpackhi_epi32(row[2], row[3]);
  out[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
  out[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
  out[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
  out[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}

// Products of H heads with eight tokens at a time, times `scale` and what codes and queries are
// worth.
template <int H, int D>
void qk_bytes_heads(const float* prepared_q, int any_dim, RowPointers rows, int count,
                    Fetch& all_fetch, float scale, const float* k_scale, float* logits) {
  constexpr int P = (H + 1) / 2;  // pairs of heads
  const int head_dim = D ? D : any_dim;
  const ByteQuery* query[2 * P];
  __m512 unit[P];
  __m512i surplus[P];
  UNROLL for (int p = 0; p < P; ++p) {
    UNROLL for (int i = 0; i < 2; ++i) {
      const int h = min(2 * p + i, H - 1), size = byte_query_size(head_dim);
      query[2 * p + i] = reinterpret_cast<const ByteQuery*>(prepared_q + h * size);
    }
    const ByteQuery &a = *query[2 * p], &b = *query[2 * p + 1];
    constexpr __mmask16 kUpper = 0xff00;
    unit[p] =
        _mm512_mask_mov_ps(_mm512_set1_ps(a.unit * scale), kUpper, _mm512_set1_ps(b.unit * scale));
    surplus[p] = _mm512_mask_set1_epi32(_mm512_set1_epi32(a.surplus), kUpper, b.surplus);
  }
  Fetch fetch = all_fetch;  // in registers
  for (int t = 0; t < count; t += 8) {
    Bytes high[H][2], low[H][2];
    UNROLL for (int h = 0; h < H; ++h) {
      UNROLL for (int g = 0; g < 2; ++g) high[h][g] = low[h][g] = _mm512_setzero_si512();
    }
    UNROLL for (int column = 0; column < head_dim; column += kBytes) {
      Bytes k[2][4];
      UNROLL for (int g = 0; g < 2; ++g) load_keys(rows + t + 4 * g, column, head_dim, k[g]);
      UNROLL for (int i = 0; i < 4; ++i) {
        if constexpr (D == 0) {
          UNROLL for (int j = 0; j < 2; ++j) fetch.beside<kBytes>(column);
        } else {
          fetch.rows_beside<2 * kBytes / D, D>();
        }
        UNROLL for (int h = 0; h < H; ++h) {
          const std::int8_t* q = query[h]->bytes + column * 8 + i * 2 * kBytes;
          const Bytes q_high = load_bytes(q), q_low = load_bytes(q + kBytes);
          UNROLL for (int g = 0; g < 2; ++g) {
            high[h][g] = add_products_of_bytes(k[g][i], q_high, high[h][g]);
            low[h][g] = add_products_of_bytes(k[g][i], q_low, low[h][g]);
          }
        }
      }
    }
    const __m512 worth = _mm512_castpd_ps(
        _mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(k_scale + t))));
    UNROLL for (int p = 0; p < P; ++p) {
      Bytes quarters[2];  // of two heads: 0 + 1 and 2 + 3 of the first four tokens, then the others
      UNROLL for (int i = 0; i < 2; ++i) {
        const int h = min(2 * p + i, H - 1);
        quarters[i] = add_quarters(join(high[h][0], low[h][0]), join(high[h][1], low[h][1]));
      }
      const Bytes sums = _mm512_sub_epi32(add_quarters(quarters[0], quarters[1]), surplus[p]);
      const __m512 x = _mm512_cvtepi32_ps(sums) * (unit[p] * worth);
      float* out = logits + 2 * p * kTile + t;
      _mm256_storeu_ps(out, _mm512_castps512_ps256(x));
      if (2 * p + 1 < H) _mm256_storeu_ps(out + kTile, _mm512_extractf32x8_ps(x, 1));
    }
  }
  all_fetch = fetch;
}

// --- probs v -----------------------------------------------------------------------------------

// As Weights, in two bytes each.
struct ByteWeights {
  std::uint8_t high[kTile], low[kTile];
  float unit;
  bool whole;

  void put(int t, Vec x) {
    const __m512i ints = _mm512_cvtps_epi32(x.x);
    const __m128i bytes[] = {_mm512_cvtepi32_epi8(_mm512_srli_epi32(ints, 8)),
                             _mm512_cvtepi32_epi8(ints)};
    __builtin_memcpy(high + t, &bytes[0], kLanes);
    __builtin_memcpy(low + t, &bytes[1], kLanes);
  }
};

// N of the four vectors that kBytes columns make, for H heads. Vector i has the columns 4 * i to
// 4 * i + 3 of each quarter, four tokens of each.
template <int H, int N, int D>
void add_bytes_block(const ByteWeights* weights, int any_dim, RowPointers rows, int count,
                     Fetch& all_fetch, const float* rescale, int column, int part, float* acc) {
  const int head_dim = D ? D : any_dim;
  Bytes high[H][N], low[H][N];
  UNROLL for (int h = 0; h < H; ++h) {
    UNROLL for (int n = 0; n < N; ++n) high[h][n] = low[h][n] = _mm512_setzero_si512();
  }
  Fetch fetch = all_fetch;              // in registers
  for (int t = 0; t < count; t += 4) {  // behind the count the list goes on, with weight 0
    if constexpr (D > 0) {
      fetch.rows_beside<N * kBytes / D, D>();
    } else {
      UNROLL for (int i = 0; i < N; ++i) fetch.beside<kBytes>(0);
    }
    const auto row = [&](int i) { return static_cast<const Code*>(rows[t + i]) + column; };
    const Bytes a = load_bytes(row(0)), b = load_bytes(row(1));
    const Bytes c = load_bytes(row(2)), d = load_bytes(row(3));
    Bytes v[N];
    if (N == 4 || part == 0) {
      const Bytes ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
      v[0] = _mm512_unpacklo_epi16(ab, cd);
      v[1] = _mm512_unpackhi_epi16(ab, cd);
    }
    if (N == 4 || part > 0) {
      const Bytes ab = _mm512_unpackhi_epi8(a, b), cd = _mm512_unpackhi_epi8(c, d);
      v[N - 2] = _mm512_unpacklo_epi16(ab, cd);
      v[N - 1] = _mm512_unpackhi_epi16(ab, cd);
    }
    UNROLL for (int h = 0; h < H; ++h) {
      const Bytes w_high = broadcast_four(weights[h].high + t);
      const Bytes w_low = broadcast_four(weights[h].low + t);
      UNROLL for (int n = 0; n < N; ++n) {
        high[h][n] = add_products_of_bytes(w_high, v[n], high[h][n]);
        low[h][n] = add_products_of_bytes(w_low, v[n], low[h][n]);
      }
    }
  }
  all_fetch = fetch;
  UNROLL for (int h = 0; h < H; ++h) {
    const Vec unit = broadcast(weights[h].unit), alpha = broadcast(rescale[h]);
    float* out = acc + h * head_dim + column + part * N * kLanes;
    UNROLL for (int n = 0; n < N; ++n) {
      const Vec old = load(out + n * kLanes) * alpha;
      const Vec sum = {_mm512_cvtepi32_ps(join(high[h][n], low[h][n]))};
      store(out + n * kLanes, fma(sum, unit, old));
    }
  }
}

// As AsPairs.
struct AsBytes {
  static int query_size(int head_dim) { return byte_query_size(head_dim); }
  static void prepare(const float* q, int head_dim, float* prepared) {
    prepare_byte_query(q, head_dim, prepared);
  }

  template <int H, int D>
  static void multiply(const float* prepared_q, int head_dim, RowPointers rows, int count,
                       Fetch& fetch, float scale, const float* k_scale, float* logits) {
    qk_bytes_heads<H, D>(prepared_q, head_dim, rows, count, fetch, scale, k_scale, logits);
  }

  template <int H>
  static unsigned add(const float* probs, const float* scales, int head_dim, RowPointers rows,
                      int count, Fetch& fetch, const float* rescale, float* acc) {
    constexpr int N = H <= 2 ? 4 : 2;  // as many as there are registers for their sums
    ByteWeights weights[H];
    unsigned left = 0;
    UNROLL for (int h = 0; h < H; ++h) {
      weigh(probs + h * kTile, scales, count, weights[h]);
      left |= !weights[h].whole << h;
    }
    int column = 0;
    const auto add_columns = [&](auto dim) {
      for (; column + kBytes <= head_dim; column += kBytes) {
        for (int part = 0; part < 4 / N; ++part) {
          add_bytes_block<H, N, dim.value>(weights, head_dim, rows, count, fetch, rescale, column,
                                           part, acc);
        }
      }
    };
    switch (head_dim) {
      case 64: add_columns(Count<64>{}); break;
      case 128: add_columns(Count<128>{}); break;
      default: add_columns(Count<0>{});
    }
    if (column < head_dim) {
      AsPairs::add<H>(probs, scales, head_dim, rows, count, fetch, rescale, acc, column);
    }
    return left;
  }

  // Puts a row of sums into the order of elements, and from it into that of the sums.
  static void arrange(float* acc, int head_dim) {
    for (; head_dim >= kBytes; head_dim -= kBytes, acc += kBytes) {
      __m512 v[4];
      UNROLL for (int n = 0; n < 4; ++n) v[n] = _mm512_loadu_ps(acc + n * kLanes);
      const __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x88);
      const __m512 b = _mm512_shuffle_f32x4(v[0], v[1], 0xdd);
      const __m512 c = _mm512_shuffle_f32x4(v[2], v[3], 0x88);
      const __m512 d = _mm512_shuffle_f32x4(v[2], v[3], 0xdd);
      _mm512_storeu_ps(acc, _mm512_shuffle_f32x4(a, c, 0x88));
      _mm512_storeu_ps(acc + kLanes, _mm512_shuffle_f32x4(b, d, 0x88));
      _mm512_storeu_ps(acc + 2 * kLanes, _mm512_shuffle_f32x4(a, c, 0xdd));
      _mm512_storeu_ps(acc + 3 * kLanes, _mm512_shuffle_f32x4(b, d, 0xdd));
    }
  }
};
