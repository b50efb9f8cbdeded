// Vec with 16 lanes: of avx512.cpp and avx512bf16.cpp.

constexpr int kLanes = 16;
constexpr int kSums = 16;
constexpr int kTall = 12;

struct Vec {
  __m512 x;
};
struct Pair {
  Vec a, b;
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.x, 0)}; }
inline Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.x, n.x)}; }
inline Vec keep_above(Vec value, Vec x, float low) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.x, _mm512_set1_ps(low), _CMP_NLE_UQ);
  return {_mm512_maskz_mov_ps(keep, value.x)};
}
inline float first(Vec a) { return _mm512_cvtss_f32(a.x); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.x); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.x); }

// Lane i is the sum of v[i]: sums of pairs of lanes, then of pairs of those, then across.
template <class Add>
inline Vec reduce(const Vec (&v)[kLanes], Add add) {
  __m512 fours[4];
  UNROLL for (int i = 0; i < 4; ++i) {
    const __m512 a = v[4 * i].x, b = v[4 * i + 1].x, c = v[4 * i + 2].x, d = v[4 * i + 3].x;
    const __m512d ab = _mm512_castps_pd(add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    fours[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                   _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  const auto halves = [&](__m512 a, __m512 b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return {halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]))};
}
inline Vec reduce(const Vec (&v)[kLanes]) {
  return reduce(v, [](__m512 a, __m512 b) { return a + b; });
}
inline Vec reduce_ints(const Vec (&v)[kLanes]) {
  return reduce(v, [](__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  });
}

// Row i becomes column i: squares of four within the quarters, then the quarters.
inline void transpose(Vec (&v)[kLanes]) {
  __m512 squares[kLanes];
  UNROLL for (int i = 0; i < kLanes; i += 4) {
    const __m512 ab_low = _mm512_unpacklo_ps(v[i].x, v[i + 1].x);
    const __m512 ab_high = _mm512_unpackhi_ps(v[i].x, v[i + 1].x);
    const __m512 cd_low = _mm512_unpacklo_ps(v[i + 2].x, v[i + 3].x);
    const __m512 cd_high = _mm512_unpackhi_ps(v[i + 2].x, v[i + 3].x);
    squares[i] = _mm512_shuffle_ps(ab_low, cd_low, 0x44);
    squares[i + 1] = _mm512_shuffle_ps(ab_low, cd_low, 0xee);
    squares[i + 2] = _mm512_shuffle_ps(ab_high, cd_high, 0x44);
    squares[i + 3] = _mm512_shuffle_ps(ab_high, cd_high, 0xee);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    const __m512 a = squares[i], b = squares[i + 4], c = squares[i + 8], d = squares[i + 12];
    const __m512 ab_even = _mm512_shuffle_f32x4(a, b, 0x88);
    const __m512 ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd);
    const __m512 cd_even = _mm512_shuffle_f32x4(c, d, 0x88);
    const __m512 cd_odd = _mm512_shuffle_f32x4(c, d, 0xdd);
    v[i].x = _mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
    v[i + 4].x = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    v[i + 8].x = _mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
    v[i + 12].x = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
  }
}
inline Vec where_above(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_mov_ps(y.x, _mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ), x.x)};
}

inline unsigned above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ); }
inline unsigned at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GE_OQ); }
inline unsigned equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_EQ_OQ); }
// Compressed in a register and stored whole: the compressing store is slow on some machines.
inline int compress(float* out, unsigned mask, Vec v) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, v.x));
  return __builtin_popcount(mask);
}
inline int compress_ids(std::int32_t* out, unsigned mask, int first) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(first), lane);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, ids));
  return __builtin_popcount(mask);
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps((1u << n) - 1, p)}; }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v.x); }
inline void store_past(float* p, Vec v) { _mm512_stream_ps(p, v.x); }

inline __m256i load_bits(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void store_bits(void* p, __m256i bits) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
}
inline Vec load(const Half* p) { return {_mm512_cvtph_ps(load_bits(p))}; }
inline void store(Half* p, Vec v) { store_bits(p, _mm512_cvtps_ph(v.x, 0)); }

// The high halves of 32-bit lanes, rounded to nearest even; NaN stays NaN.
inline __m512i round_bf16(Vec v) {
  const __m512i bits = _mm512_castps_si512(v.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v.x, v.x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
inline Vec load(const Bfloat16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits(p)), 16))};
}
inline void store(Bfloat16* p, Vec v) {
  store_bits(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(v), 16)));
}

// Codes, and the integers that they are multiplied with; lanes of a sum hold int32 until to_floats.
using Ints16 = __m512i;
inline __m128i load_16_codes(const Code* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline Vec load(const Code* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16_codes(p)))};
}
inline Ints16 load_codes(const Code* p) { return _mm512_cvtepi8_epi16(load_bits(p)); }
inline Ints16 load_half_codes(const Code* p) {
  return _mm512_zextsi256_si512(_mm256_cvtepi8_epi16(load_16_codes(p)));
}
inline Ints16 load_ints(const std::int16_t* p) { return _mm512_loadu_si512(p); }
inline Ints16 load_half_ints(const std::int16_t* p) { return _mm512_zextsi256_si512(load_bits(p)); }
inline Vec to_floats(Vec ints) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(ints.x))}; }
inline void store_ints(std::int16_t* p, Vec v) {
  store_bits(p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v.x)));
}
inline Ints16 broadcast_ints(const std::int16_t* p) {
  std::int32_t both;
  __builtin_memcpy(&both, p, sizeof both);
  return _mm512_set1_epi32(both);
}
// Of 32 elements the quarters 0 and 2, then 1 and 3.
inline void interleave_codes(const Code* a, const Code* b, Ints16& low, Ints16& high) {
  low = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(load_bits(a), load_bits(b)));
  high = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(load_bits(a), load_bits(b)));
}
inline Ints16 interleave_half_codes(const Code* a_, const Code* b_) {
  const __m128i a = load_16_codes(a_), b = load_16_codes(b_);
  return _mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
}
inline void in_order(Vec& low, Vec& high) {
  const __m512 first = _mm512_shuffle_f32x4(low.x, high.x, 0x44);
  high.x = _mm512_shuffle_f32x4(low.x, high.x, 0xee);
  low.x = first;
}

template <class T>
inline Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
template <class T>
inline void store_pair(T* p, Pair v) {
  store(p, v.a);
  store(p + kLanes, v.b);
}
// Even elements, then odd ones: one instruction each, where the natural order takes two.
inline Pair load_pair(const Bfloat16* p) {
  const __m512i bits = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)))}};
}
inline void store_pair(Bfloat16* p, Pair v) {
  const __m512i odd = _mm512_and_si512(round_bf16(v.b), _mm512_set1_epi32(-65536));
  _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(round_bf16(v.a), 16), odd));
}
