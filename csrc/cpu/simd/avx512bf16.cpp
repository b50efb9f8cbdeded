// AVX-512 with dot products of pairs: of bf16, exact and added in fp32, and of integers.
#include <immintrin.h>

#include <cstdint>

#include "rows.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace kvcomp::simd {
namespace {

#include "avx512.inl"

inline Vec add_products(Ints16 a, Ints16 b, Vec sum) {
  return {_mm512_castsi512_ps(_mm512_dpwssd_epi32(_mm512_castps_si512(sum.x), a, b))};
}

template <class T>
struct Dot;

template <>
struct Dot<Bfloat16> {
  using Query = Bfloat16;
  static constexpr int kStep = 32;

  static void prepare(const Bfloat16* q, int head_dim, Query* prepared) {
    for (int i = 0; i < head_dim; ++i) prepared[i] = q[i];
  }
  static __m512i row(const Bfloat16* k) { return _mm512_loadu_si512(k); }
  static __m512i query(const Query* q) { return row(q); }
  static Vec add(__m512i q, __m512i k, Vec sum) {
    return {_mm512_dpbf16_ps(sum.x, (__m512bh)q, (__m512bh)k)};
  }

  static __m512i half_row(const Bfloat16* k) { return _mm512_zextsi256_si512(load_bits(k)); }
  static __m512i half_query(const Query* q) { return half_row(q); }
  static Vec half_add(__m512i q, __m512i k, Vec sum) { return add(q, k, sum); }
  static Vec finish(const Vec (&sums)[kLanes]) { return reduce(sums); }
};

template <class T>
struct Packed;

template <>
struct Packed<Bfloat16> {
  static constexpr int kElements = 2;

  static Vec steps(const Bfloat16* row) { return {_mm512_castsi512_ps(_mm512_loadu_si512(row))}; }
  static Vec add(Vec q, Vec k, Vec sum) {
    return {_mm512_dpbf16_ps(sum.x, (__m512bh)_mm512_castps_si512(q.x),
                             (__m512bh)_mm512_castps_si512(k.x))};
  }
};

#include "rows.inl"

}  // namespace

const Rows& avx512bf16_rows() {
  static constexpr Rows table = make_rows("avx512bf16");
  return table;
}

}  // namespace kvcomp::simd
