// The loops of rows.h, written once, here and in the files that this includes. An ISA file defines
// what follows, in an unnamed namespace, and then includes this:
//
//   kLanes, Vec     that many floats: + - *, zero(), broadcast(float), fma(a, b, c), round(x),
//                   max(a, b) (b where either is NaN), scale2(x, n) = x * 2^n,
//                   keep_above(value, x, low) (0 where x <= low), first(x), reduce_add(x),
//                   reduce_max(x), and reduce(Vec[kLanes]), whose lane i is the sum of vector i;
//                   reduce_ints, of lanes of int32
//                   transpose(Vec[kLanes]), where_above(a, b, x, y) = a > b ? x : y
//   masks           above(a, b), at_least(a, b), equal(a, b): bit i is lane i;
//                   compress(float*, mask, Vec) and compress_ids(int32*, mask, first id): write
//                   the marked lanes, return how many
//   memory          load(p) and store(p, Vec) of each element type; store_past(float*, Vec), past
//                   the caches, to whole lines; load_first(float*, n) with
//                   zeros after n; load_pair(p) and store_pair(p, Pair) of 2 * kLanes elements in
//                   whatever order is cheapest, for codes their own
//   Ints16          2 * kLanes int16: load_codes and load_ints, load_half_codes and load_half_ints
//                   (kLanes of them, then zeros), add_products(a, b, sum): sums of pairs, added to
//                   lanes of int32; to_floats(Vec of those)
//                   store_ints(int16*, Vec), to the nearest; broadcast_ints(p): two of them, again
//                   and again; interleave_codes(p, q, low, high) and interleave_half_codes(p, q):
//                   element by element; in_order(a, b): sums with low and with high
//   kSums           sums that pv holds at once, a power of two: enough to hide an fma's latency
//   kTall           centres that nearest holds at once, a divisor of kCentreBlock
//   UNROLL          before a loop whose arrays must end up in registers

// --- arithmetic --------------------------------------------------------------------------------

constexpr float kInfinity = __builtin_huge_valf();

using Ints __attribute__((vector_size(kLanes * 4))) = std::int32_t;

template <int N>
struct Count {  // a number as a type
  static constexpr int value = N;
};

inline int min(int a, int b) { return a < b ? a : b; }

// exp(x) for x <= 0 within 2 ulp; 0 below the normal range, so that -inf gives 0 exactly.
inline Vec exp(Vec x) {
  constexpr float kLow = -87.336544f;  // log of the smallest normal float
  const Vec in_range = max(broadcast(kLow), x);
  const Vec n = round(in_range * broadcast(1.44269504f));
  Vec r = fma(n, broadcast(-0.693145752f), in_range);  // log 2 in two parts
  r = fma(n, broadcast(-1.42860677e-6f), r);
  Vec p = broadcast(1.393373346e-3f);  // (exp(r) - 1 - r) / r^2, Chebyshev fit, error 1e-8
  p = fma(p, r, broadcast(8.363235385e-3f));
  p = fma(p, r, broadcast(4.166646416e-2f));
  p = fma(p, r, broadcast(1.666657664e-1f));
  p = fma(p, r, broadcast(5.000000014e-1f));
  p = fma(p, r * r, r) + broadcast(1.0f);
  return keep_above(scale2(p, n), x, kLow);
}

#include "attention.inl"
#include "clustering.inl"
#include "codes.inl"
#include "codes_values.inl"
#include "latent.inl"
#include "linear.inl"
#include "logits.inl"
#include "norm.inl"
#include "selection.inl"

// --- rows changed in place ---------------------------------------------------------------------

template <class T>
void rotate(void* row_, int half, const float* cos, const float* sin) {
  const auto turn = [](T* first, T* second, Vec c, Vec s) {
    const Vec x = load(first), y = load(second);
    store(first, x * c - y * s);
    store(second, fma(x, s, y * c));
  };
  T* row = static_cast<T*>(row_);
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    turn(row + i, row + half + i, load(cos + i), load(sin + i));
  }
  if (const int n = half - i; n > 0) {
    T first[kLanes] = {}, second[kLanes] = {};
    const auto bytes = n * sizeof(T);
    __builtin_memcpy(first, row + i, bytes);
    __builtin_memcpy(second, row + half + i, bytes);
    turn(first, second, load_first(cos + i, n), load_first(sin + i, n));
    __builtin_memcpy(row + i, first, bytes);
    __builtin_memcpy(row + half + i, second, bytes);
  }
}

// --- the table ---------------------------------------------------------------------------------

template <class T>
constexpr TypedRows typed_rows() {
  constexpr Linear linear{kLinearRows, &linear_size, &prepare_linear<T>, &multiply_linear<T>};
  return {&prepare_q<T>, &qk<T>,        &pv<T>,         &store_row<T>,
          &blend<T>,     &nearest<T>,   &rotate<T>,     &products<T>,
          linear,        &widen_row<T>, &narrow_row<T>, &prepare_shared_q<T>,
          &pack<T>,      &qk_packed<T>, &pv_shared<T>,  &norm<T>};
}

constexpr Rows make_rows(const char* isa) {
  return {isa,
          typed_rows<float>(),
          typed_rows<Half>(),
          typed_rows<Bfloat16>(),
          code_rows<AsPairs>(),
          &cap,
          &softmax,
          &accumulate,
          &stream,
          &token_scores,
          &sum,
          &hit_bits,
          &replay,
          &nth_largest,
          &bracket,
          &select,
          &weighted_threshold};
}
