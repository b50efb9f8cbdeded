#include "attention.h"
#include "kernels.h"

namespace kvcomp::cpu {

void append_attention(const AppendAttentionParams& params) { attend(params); }

}  // namespace kvcomp::cpu
