// decode_attention and append_attention over K and V in eight bits: their kernels with warps that
// take codes.
//
// Bytes: (2 * D + 4) * T per KV head, else as for 16-bit rows.
#pragma once

#include "kvcomp/decode_attention.cuh"
#include "kvcomp/decode_codes_warp.cuh"

namespace kvcomp {

// start(T{}) with the type of p's codes.
template <typename Start>
void with_codes(const DecodeAttentionParams& p, const Start& start) {
  p.q_dtype == ScalarType::f32 ? start(CodesInFull{}) : start(Codes{});
}

}  // namespace kvcomp
