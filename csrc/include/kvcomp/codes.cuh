// K and V in eight bits as tensor cores take them: codes become fp16 in registers, which holds each
// of them exactly, and their scales stay apart.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"

namespace kvcomp {

// The scales that a word holds: x of K, y of V.
__device__ inline float2 scales_of(uint32_t word) {
  __half2 scales;
  memcpy(&scales, &word, sizeof scales);
  return __half22float2(scales);
}

// Bytes kFirst and kSecond of four codes as a pair of fp16: 0x64 above a byte u makes 1024 + u.
template <int kFirst, int kSecond>
__device__ inline unsigned widen_codes(unsigned codes) {
  constexpr unsigned k1024 = 0x64646464u, k1152 = 0x64806480u;
  const unsigned biased = codes ^ 0x80808080u;  // code + 128, unsigned
  const unsigned pair = __byte_perm(biased, k1024, 0x4040 | kSecond << 8 | kFirst);
  __half2 above, base;
  memcpy(&above, &pair, sizeof above);
  memcpy(&base, &k1152, sizeof base);
  const __half2 exact = __hsub2(above, base);
  unsigned word;
  memcpy(&word, &exact, sizeof word);
  return word;
}

// How a row of q meets codes: as integers of up to 14 bits and a sign times a step, the least power
// of two that allows it. fp16 holds those of a row of 16 bits exactly.
class QueryStep {
 public:
  // `top`: the largest magnitude of the row as bits.
  __device__ explicit QueryStep(uint32_t top) {
    constexpr int kBits = 14, kLeastExponent = -100;
    const int above = static_cast<int>(top >> 23) - 126;  // of the power of two above the row
    const int exponent = max(above, kLeastExponent) - kBits;
    const bool finite = top < 0x7f800000u;
    step_ = finite ? power_of_two(exponent) : NAN;
    inverse_ = finite ? power_of_two(-exponent) : 0.0f;
  }

  __device__ float step() const { return step_; }
  __device__ float integer(float q) const { return inverse_ == 0 ? 0.0f : rintf(q * inverse_); }

 private:
  __device__ static float power_of_two(int exponent) {
    return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
  }

  float step_, inverse_;
};

// As bits, which order as the numbers do.
__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

}  // namespace kvcomp
