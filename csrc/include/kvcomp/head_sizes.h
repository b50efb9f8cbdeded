// The head sizes that attention is compiled for: the one list of them. Python has it as
// kvcomp._C.head_sizes.
#pragma once

#include <iterator>
#include <type_traits>
#include <utility>

namespace kvcomp {

inline constexpr int kHeadSizes[] = {32, 64, 80, 96, 128, 256, 512};

// Columns of K and of V, where they differ: on a CPU, and by Triton.
struct UnlikeSizes {
  int key, value;
};
inline constexpr UnlikeSizes kUnlikeSizes[] = {{192, 128}};  // MiMo-V2-Flash

// start(std::integral_constant<int, D>{}) where head_dim is the head size D.
template <typename Start>
void with_head_size(int head_dim, const Start& start) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((head_dim == kHeadSizes[i] ? start(std::integral_constant<int, kHeadSizes[i]>{}) : void()),
     ...);
  }(std::make_integer_sequence<int, static_cast<int>(std::size(kHeadSizes))>());
}

}  // namespace kvcomp
