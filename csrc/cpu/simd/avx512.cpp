#include <immintrin.h>

#include <cstdint>

#include "rows.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace kvcomp::simd {
namespace {

#include "avx512.inl"

inline Vec add_products(Ints16 a, Ints16 b, Vec sum) {
  const __m512i products = _mm512_madd_epi16(a, b);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(sum.x), products))};
}

#include "rows.inl"

}  // namespace

const Rows& avx512_rows() {
  static constexpr Rows table = make_rows("avx512");
  return table;
}

}  // namespace kvcomp::simd
