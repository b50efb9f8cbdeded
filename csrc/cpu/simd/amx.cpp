// AVX-512 with tiles: products of matrices of bf16, exact and added in fp32.
//
// A tile has up to 16 rows of 64 bytes. Weights come into one as they lie, a row of 32 elements
// for each output, and meet tiles with the rows of x: their pairs of elements, a column for each.
#include <immintrin.h>

#include <cstdint>

#include "rows.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace kvcomp::simd {
namespace {

#include "avx512.inl"
// and then
#include "tiles.inl"
#include "tiles_linear.inl"

Rows make_rows() {
  Rows rows = avx512bf16_rows();
  rows.isa = "amx";
  rows.bf16.linear = {kLinearRows, &linear_size, &prepare_linear, &multiply_linear};
  return rows;
}

}  // namespace

const Rows& amx_rows() {
  static const Rows table = make_rows();
  return table;
}

}  // namespace kvcomp::simd
