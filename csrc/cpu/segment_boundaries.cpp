// One step of the rule that cuts sequences into segments: a handful of numbers per sequence.
#include "kernels.h"

namespace kvcomp::cpu {

void segment_boundaries(const SegmentBoundariesParams& p) {
  for (int b = 0; b < p.batch; ++b) {
    const float similarity = p.similarity[b];
    const int newest = p.lengths[b] - 1;
    int units = p.num_units[b], indexed = p.num_indexed[b];
    std::int32_t* starts = p.starts + b * p.stride_starts_b;

    const int open = newest - starts[units];
    const bool turned = similarity < p.cut_below && open >= p.shortest;
    const bool close = open > 0 && (turned || open >= p.longest);
    if (close) {
      ++units;
      for (int h = 0; h < p.num_heads; ++h) starts[h * p.stride_starts_h + units] = newest;
    }
    const bool trigger = similarity < p.retrieve_below ||
                         newest - starts[indexed] >= std::int64_t{p.local} + p.longest;
    while (trigger && indexed < units && newest - starts[indexed] > p.local) ++indexed;

    p.closed[b] = close ? open : 0;
    p.triggered[b] = trigger;
    p.num_units[b] = units;
    p.num_indexed[b] = indexed;
  }
}

}  // namespace kvcomp::cpu
