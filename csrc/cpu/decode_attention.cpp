// One query per sequence, the last of its tokens.
#include "attention.h"
#include "kernels.h"

namespace kvcomp::cpu {

void decode_attention(const DecodeAttentionParams& params) {
  AppendAttentionParams one{};
  one.attention = params;
  one.num_queries = 1;
  attend(one);
}

}  // namespace kvcomp::cpu
