#include <immintrin.h>

#include <cstdint>

#include "rows.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace kvcomp::simd {
namespace {

#include "avx512.inl"
#include "rows.inl"

}  // namespace

const Rows& avx512_rows() {
  static constexpr Rows table = make_rows("avx512");
  return table;
}

}  // namespace kvcomp::simd
