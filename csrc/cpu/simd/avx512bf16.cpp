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
struct Values;

struct Places {  // of a pair in two rows: the first and every `step`-th element behind it
  alignas(64) std::int16_t at[32];
  constexpr Places(int first, int step) : at() {
    for (int i = 0; i < 16; ++i) {
      at[2 * i] = static_cast<std::int16_t>(first + step * i);
      at[2 * i + 1] = static_cast<std::int16_t>(32 + first + step * i);
    }
  }
};
constexpr Places kEven{0, 2}, kOdd{1, 2}, kFirst{0, 1};

// Two rows at once: their weights are rounded to bf16, which the values are already.
template <>
struct Values<Bfloat16> {
  static constexpr int kRows = 2;
  struct Weights {
    alignas(64) Bfloat16 of[kTile];
  };

  static void weigh(const float* probs, int count, Weights& weights) {
    for (int t = 0; t < count; t += 2 * kLanes) {
      const Pair p = {load(probs + t), load(probs + t + kLanes)};
      _mm512_store_si512(weights.of + t, (__m512i)_mm512_cvtne2ps_pbh(p.b.x, p.a.x));
    }
    if (count % 2) weights.of[count] = {};
  }
  static Vec weight(const Weights& weights, int t) {
    float both;
    __builtin_memcpy(&both, weights.of + t, sizeof both);
    return broadcast(both);
  }
  template <int R>
  static Pair pair(const Bfloat16* const* rows) {
    const __m512i a = _mm512_loadu_si512(rows[0]);
    const __m512i b = R == 2 ? _mm512_loadu_si512(rows[R - 1]) : _mm512_setzero_si512();
    return {between(a, kEven, b), between(a, kOdd, b)};  // as load_pair orders them
  }
  template <int R>
  static Vec half(const Bfloat16* const* rows) {
    const __m512i a = _mm512_zextsi256_si512(load_bits(rows[0]));
    const __m512i b =
        R == 2 ? _mm512_zextsi256_si512(load_bits(rows[R - 1])) : _mm512_setzero_si512();
    return between(a, kFirst, b);
  }
  static Vec add(Vec weight, Vec v, Vec sum) {
    return {_mm512_dpbf16_ps(sum.x, (__m512bh)_mm512_castps_si512(weight.x),
                             (__m512bh)_mm512_castps_si512(v.x))};
  }

 private:
  static Vec between(__m512i a, const Places& places, __m512i b) {
    return {_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, _mm512_load_si512(places.at), b))};
  }
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
// and then
#include "codes_bytes.inl"

constexpr Rows with_bytes(Rows rows) {
  rows.codes = code_rows<AsBytes>();
  return rows;
}

}  // namespace

const Rows& avx512bf16_rows() {
  static constexpr Rows table = with_bytes(make_rows("avx512bf16"));
  return table;
}

}  // namespace kvcomp::simd
