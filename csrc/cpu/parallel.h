// What the CPU kernels share: the number of threads worth using, memory kept between calls, and
// the loops of an element type.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "kvcomp/params.h"
#include "simd/rows.h"

namespace kvcomp::cpu {

// Threads for a task of `work` units when a thread is worth waking for `grain` of them. Obeys
// torch.set_num_threads (in a new Python thread, once any op of torch has run there); 1 inside
// somebody else's parallel region.
inline int num_threads(std::int64_t work, std::int64_t grain) {
  if (work < 2 * grain || omp_in_parallel()) return 1;
  return static_cast<int>(std::min<std::int64_t>(omp_get_max_threads(), work / grain));
}

// Grow-only floats of the calling thread, aligned to a cache line and not initialised.
class Workspace {
 public:
  float* get(std::size_t count) {
    if (count > size_) {
      size_ = 0;
      memory_.reset(static_cast<float*>(::operator new(count * sizeof(float), kAlignment)));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<float, Free> memory_;
  std::size_t size_ = 0;
};

inline const simd::TypedRows& typed(const simd::Rows& rows, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::f32: return rows.f32;
    case ScalarType::f16: return rows.f16;
    case ScalarType::bf16:
    case ScalarType::i8: break;
  }
  return rows.bf16;
}

inline int size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::f32: return 4;
    case ScalarType::i8: return 1;
    case ScalarType::f16:
    case ScalarType::bf16: break;
  }
  return 2;
}

}  // namespace kvcomp::cpu
