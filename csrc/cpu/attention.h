// Attention of the newest tokens of each sequence over its cache: decode_attention is the case of
// one token, append_attention that of several.
#pragma once

#include "kvcomp/params.h"

namespace kvcomp::cpu {

void attend(const AppendAttentionParams& params);

}  // namespace kvcomp::cpu
