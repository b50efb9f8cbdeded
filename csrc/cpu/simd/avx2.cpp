#include <immintrin.h>

#include <cstdint>

#include "rows.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace kvcomp::simd {
namespace {

constexpr int kLanes = 8;
constexpr int kSums = 8;
constexpr int kTall = 6;

struct Vec {
  __m256 x;
};
struct Pair {
  Vec a, b;
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.x, b.x)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.x, _MM_FROUND_TO_NEAREST_INT | 8)}; }
inline Vec scale2(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.x), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
inline Vec keep_above(Vec value, Vec x, float low) {
  return {_mm256_and_ps(value.x, _mm256_cmp_ps(x.x, _mm256_set1_ps(low), _CMP_NLE_UQ))};
}
inline float first(Vec a) { return _mm256_cvtss_f32(a.x); }
inline float reduce_add(Vec a) {
  const __m128 four = _mm256_castps256_ps128(a.x) + _mm256_extractf128_ps(a.x, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return _mm_cvtss_f32(two + _mm_movehdup_ps(two));
}
inline float reduce_max(Vec a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ps(two, _mm_movehdup_ps(two)));
}

// Lane i is the sum of v[i]. Horizontal additions would be shorter, and slower: of integers, any
// order of adding gives the same.
inline Vec reduce_ints(const Vec (&v)[kLanes]) {
  const auto add = [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); };
  const auto pair = [&](int i) {  // pairs of lanes of v[i] and of v[i + 1], in turn
    const __m256i a = _mm256_castps_si256(v[i].x), b = _mm256_castps_si256(v[i + 1].x);
    return add(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  };
  const auto four = [&](int i) {  // halves of v[i] to v[i + 3]
    const __m256i a = pair(i), b = pair(i + 2);
    return add(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  };
  const __m256i low = four(0), high = four(4);
  return {_mm256_castsi256_ps(
      add(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)))};
}
inline Vec reduce(const Vec (&v)[kLanes]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0].x, v[1].x), _mm256_hadd_ps(v[2].x, v[3].x));
  const __m256 high =
      _mm256_hadd_ps(_mm256_hadd_ps(v[4].x, v[5].x), _mm256_hadd_ps(v[6].x, v[7].x));
  return {_mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31)};
}

// Row i becomes column i: squares of four within the halves, then the halves.
inline void transpose(Vec (&v)[kLanes]) {
  __m256 squares[kLanes];
  UNROLL for (int i = 0; i < kLanes; i += 4) {
    const __m256 ab_low = _mm256_unpacklo_ps(v[i].x, v[i + 1].x);
    const __m256 ab_high = _mm256_unpackhi_ps(v[i].x, v[i + 1].x);
    const __m256 cd_low = _mm256_unpacklo_ps(v[i + 2].x, v[i + 3].x);
    const __m256 cd_high = _mm256_unpackhi_ps(v[i + 2].x, v[i + 3].x);
    squares[i] = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
    squares[i + 1] = _mm256_shuffle_ps(ab_low, cd_low, 0xee);
    squares[i + 2] = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
    squares[i + 3] = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    v[i].x = _mm256_permute2f128_ps(squares[i], squares[i + 4], 0x20);
    v[i + 4].x = _mm256_permute2f128_ps(squares[i], squares[i + 4], 0x31);
  }
}
inline Vec where_above(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.x, x.x, _mm256_cmp_ps(a.x, b.x, _CMP_GT_OQ))};
}

inline unsigned above(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.x, b.x, _CMP_GT_OQ));
}
inline unsigned at_least(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.x, b.x, _CMP_GE_OQ));
}
inline unsigned equal(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.x, b.x, _CMP_EQ_OQ));
}

// For each mask, the marked lanes first: what AVX-512 does in one instruction.
struct LaneOrders {
  std::uint8_t lanes[256][8] = {};
  constexpr LaneOrders() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask][count++] = static_cast<std::uint8_t>(lane);
      }
    }
  }
};
constexpr LaneOrders kLaneOrders;

inline __m256i lane_order(unsigned mask) {
  return _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneOrders.lanes[mask])));
}
inline int compress(float* out, unsigned mask, Vec v) {
  _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(v.x, lane_order(mask)));
  return __builtin_popcount(mask);
}
inline int compress_ids(std::int32_t* out, unsigned mask, int first) {
  const __m256i ids = _mm256_add_epi32(_mm256_set1_epi32(first), lane_order(mask));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), ids);
  return __builtin_popcount(mask);
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load_first(const float* p, int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
}
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v.x); }
inline void store_past(float* p, Vec v) { _mm256_stream_ps(p, v.x); }

inline __m128i load_bits(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store_bits(void* p, __m128i bits) { _mm_storeu_si128(static_cast<__m128i*>(p), bits); }
inline Vec load(const Half* p) { return {_mm256_cvtph_ps(load_bits(p))}; }
inline void store(Half* p, Vec v) { store_bits(p, _mm256_cvtps_ph(v.x, 0)); }

// The high halves of 32-bit lanes, rounded to nearest even; NaN stays NaN.
inline __m256i round_bf16(Vec v) {
  const __m256i bits = _mm256_castps_si256(v.x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.x, v.x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
inline Vec load(const Bfloat16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(p)), 16))};
}
inline void store(Bfloat16* p, Vec v) {
  const __m256i high = _mm256_srli_epi32(round_bf16(v), 16);
  store_bits(p, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

// Codes, and the integers that they are multiplied with; lanes of a sum hold int32 until to_floats.
using Ints16 = __m256i;
inline __m128i load_8_codes(const Code* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
inline Vec load(const Code* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8_codes(p)))};
}
inline Ints16 load_codes(const Code* p) { return _mm256_cvtepi8_epi16(load_bits(p)); }
inline Ints16 load_half_codes(const Code* p) { return _mm256_cvtepi8_epi16(load_8_codes(p)); }
inline Ints16 load_ints(const std::int16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Ints16 load_half_ints(const std::int16_t* p) { return _mm256_zextsi128_si256(load_bits(p)); }
// In assembly, so that sums stay in their registers and products are not made ahead: GCC 12 makes
// more of them than there are registers, and a sum that waits for memory costs ten cycles a step.
inline Vec add_products(Ints16 a, Ints16 b, Vec sum) {
  asm volatile("vpaddd %1, %0, %0" : "+x"(sum.x) : "x"(_mm256_madd_epi16(a, b)));
  return sum;
}
inline Vec to_floats(Vec ints) { return {_mm256_cvtepi32_ps(_mm256_castps_si256(ints.x))}; }
inline void store_ints(std::int16_t* p, Vec v) {
  const __m256i ints = _mm256_cvtps_epi32(v.x);
  store_bits(p, _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1)));
}
inline Ints16 broadcast_ints(const std::int16_t* p) {
  std::int32_t both;
  __builtin_memcpy(&both, p, sizeof both);
  return _mm256_set1_epi32(both);
}
inline void interleave_codes(const Code* a, const Code* b, Ints16& low, Ints16& high) {
  low = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(load_bits(a), load_bits(b)));
  high = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(load_bits(a), load_bits(b)));
}
inline Ints16 interleave_half_codes(const Code* a, const Code* b) {
  return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(load_8_codes(a), load_8_codes(b)));
}
inline void in_order(Vec&, Vec&) {}

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
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)))}};
}
inline void store_pair(Bfloat16* p, Pair v) {
  const __m256i odd = _mm256_and_si256(round_bf16(v.b), _mm256_set1_epi32(-65536));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_or_si256(_mm256_srli_epi32(round_bf16(v.a), 16), odd));
}

#include "rows.inl"

}  // namespace

const Rows& avx2_rows() {
  static constexpr Rows table = make_rows("avx2");
  return table;
}

}  // namespace kvcomp::simd
