// Plain C++, for any machine: eight floats that the compiler may turn into whatever it knows.
#include <cstdint>

#include "rows.h"

#define UNROLL  // the lanes are loops already

namespace kvcomp::simd {
namespace {

constexpr int kLanes = 8;
constexpr int kSums = 8;
constexpr int kTall = 2;

struct Vec {
  float x[kLanes];
};
struct Pair {
  Vec a, b;
};

template <class F>
inline Vec lanes(F f) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v.x[i] = f(i);
  return v;
}
inline std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline Vec operator+(Vec a, Vec b) {
  return lanes([&](int i) { return a.x[i] + b.x[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return lanes([&](int i) { return a.x[i] - b.x[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return lanes([&](int i) { return a.x[i] * b.x[i]; });
}
inline Vec broadcast(float x) {
  return lanes([&](int) { return x; });
}
inline Vec zero() { return broadcast(0.0f); }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) {
  return lanes([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
inline Vec round(Vec a) {  // |x| < 2^22: what is below 1 falls off the end of the sum
  constexpr float kShift = 12582912.0f;
  return lanes([&](int i) { return (a.x[i] + kShift) - kShift; });
}
inline Vec scale2(Vec a, Vec n) {
  return lanes([&](int i) {
    if (n.x[i] != n.x[i]) return n.x[i];
    return a.x[i] * float_of(static_cast<std::uint32_t>(static_cast<int>(n.x[i]) + 127) << 23);
  });
}
inline Vec keep_above(Vec value, Vec x, float low) {
  return lanes([&](int i) { return x.x[i] <= low ? 0.0f : value.x[i]; });
}
inline float first(Vec a) { return a.x[0]; }
inline float reduce_add(Vec a) {
  return ((a.x[0] + a.x[4]) + (a.x[2] + a.x[6])) + ((a.x[1] + a.x[5]) + (a.x[3] + a.x[7]));
}
inline float reduce_max(Vec a) {
  float top = a.x[0];
  for (int i = 1; i < kLanes; ++i) top = top > a.x[i] ? top : a.x[i];
  return top;
}
inline Vec reduce(const Vec (&v)[kLanes]) {
  return lanes([&](int i) { return reduce_add(v[i]); });
}
inline Vec reduce_ints(const Vec (&v)[kLanes]) {
  return lanes([&](int i) {
    std::uint32_t sum = 0;
    for (const float x : v[i].x) sum += bits_of(x);
    return float_of(sum);
  });
}

inline void transpose(Vec (&v)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = v[i].x[j];
      v[i].x[j] = v[j].x[i];
      v[j].x[i] = x;
    }
  }
}
inline Vec where_above(Vec a, Vec b, Vec x, Vec y) {
  return lanes([&](int i) { return a.x[i] > b.x[i] ? x.x[i] : y.x[i]; });
}

template <class F>
inline unsigned mask_of(F f) {
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<unsigned>(f(i)) << i;
  return mask;
}
inline unsigned above(Vec a, Vec b) {
  return mask_of([&](int i) { return a.x[i] > b.x[i]; });
}
inline unsigned at_least(Vec a, Vec b) {
  return mask_of([&](int i) { return a.x[i] >= b.x[i]; });
}
inline unsigned equal(Vec a, Vec b) {
  return mask_of([&](int i) { return a.x[i] == b.x[i]; });
}
inline int compress(float* out, unsigned mask, Vec v) {
  int count = 0;
  for (; mask; mask &= mask - 1) out[count++] = v.x[__builtin_ctz(mask)];
  return count;
}
inline int compress_ids(std::int32_t* out, unsigned mask, int first) {
  int count = 0;
  for (; mask; mask &= mask - 1) out[count++] = first + __builtin_ctz(mask);
  return count;
}

inline Vec load(const float* p) {
  return lanes([&](int i) { return p[i]; });
}
inline Vec load_first(const float* p, int n) {
  return lanes([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store(float* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v.x[i];
}
inline void store_past(float* p, Vec v) { store(p, v); }

inline float widen(Bfloat16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }
inline Bfloat16 narrow(float x, Bfloat16) {
  const std::uint32_t bits = bits_of(x);
  if (x != x) return {0x7fc0};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// fp16 has 5 bits of exponent and 10 of fraction: moved into the place of fp32's, its value is
// 2^112 too small, and one multiplication mends that for normal and subnormal numbers alike.
inline float widen(Half x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  const float value = magnitude >= 0x0f800000u ? float_of(magnitude | 0x7f800000u)  // inf, NaN
                                               : float_of(magnitude) * 0x1p112f;
  return float_of(bits_of(value) | sign);
}
inline Half narrow(float x, Half) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the steps of fp16 are those of fp32 at 0.5: the addition rounds.
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<std::uint16_t>(half | sign)};
}

inline float widen(Code x) { return x.value; }

template <class T>
inline Vec load(const T* p) {
  return lanes([&](int i) { return widen(p[i]); });
}
template <class T>
inline void store(T* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow(v.x[i], T{});
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

// Codes, and the integers that they are multiplied with; lanes of a sum hold int32 until to_floats.
struct Ints16 {
  std::int16_t x[2 * kLanes];
};
inline Ints16 load_some_ints(const std::int16_t* p, int count) {
  Ints16 ints{};
  for (int i = 0; i < count; ++i) ints.x[i] = p[i];
  return ints;
}
inline Ints16 load_some_codes(const Code* p, int count) {
  Ints16 ints{};
  for (int i = 0; i < count; ++i) ints.x[i] = p[i].value;
  return ints;
}
inline Ints16 load_codes(const Code* p) { return load_some_codes(p, 2 * kLanes); }
inline Ints16 load_half_codes(const Code* p) { return load_some_codes(p, kLanes); }
inline Ints16 load_ints(const std::int16_t* p) { return load_some_ints(p, 2 * kLanes); }
inline Ints16 load_half_ints(const std::int16_t* p) { return load_some_ints(p, kLanes); }
inline Vec add_products(Ints16 a, Ints16 b, Vec sum) {
  return lanes([&](int i) {
    const int products = a.x[2 * i] * b.x[2 * i] + a.x[2 * i + 1] * b.x[2 * i + 1];
    return float_of(bits_of(sum.x[i]) + static_cast<std::uint32_t>(products));
  });
}
inline Vec to_floats(Vec ints) {
  return lanes(
      [&](int i) { return static_cast<float>(static_cast<std::int32_t>(bits_of(ints.x[i]))); });
}
inline void store_ints(std::int16_t* p, Vec v) {
  v = round(v);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int16_t>(v.x[i]);
}
inline Ints16 broadcast_ints(const std::int16_t* p) {
  Ints16 ints;
  for (int i = 0; i < 2 * kLanes; ++i) ints.x[i] = p[i % 2];
  return ints;
}
inline Ints16 interleave_half_codes(const Code* a, const Code* b) {
  Ints16 ints;
  for (int i = 0; i < kLanes; ++i) {
    ints.x[2 * i] = a[i].value;
    ints.x[2 * i + 1] = b[i].value;
  }
  return ints;
}
inline void interleave_codes(const Code* a, const Code* b, Ints16& low, Ints16& high) {
  low = interleave_half_codes(a, b);
  high = interleave_half_codes(a + kLanes, b + kLanes);
}
inline void in_order(Vec&, Vec&) {}

#include "rows.inl"

}  // namespace

const Rows& scalar_rows() {
  static constexpr Rows table = make_rows("scalar");
  return table;
}

}  // namespace kvcomp::simd
