// The head sizes that attention is compiled for: the one list of them. Python has it as
// kvcomp._C.head_sizes.
#pragma once

#include <iterator>
#include <type_traits>
#include <utility>

namespace kvcomp {

inline constexpr int kHeadSizes[] = {32, 64, 80, 96, 128, 256, 512};

// Columns of K and of V, where they differ; never of codes.
struct UnlikeSizes {
  int key, value;
};
inline constexpr UnlikeSizes kUnlikeSizes[] = {{192, 128}};  // MiMo-V2-Flash

template <int n>
using HeadSize = std::integral_constant<int, n>;

// start(HeadSize<D>{}, HeadSize<Dv>{}) where K has D columns and V has Dv. kUnlike: which may
// differ.
template <bool kUnlike, typename Start>
void with_head_sizes(int key, int value, const Start& start) {
  const auto at = [&](auto of_k, auto of_v) {
    if (key == of_k() && value == of_v()) start(of_k, of_v);
  };
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (at(HeadSize<kHeadSizes[i]>{}, HeadSize<kHeadSizes[i]>{}), ...);
  }(std::make_integer_sequence<int, static_cast<int>(std::size(kHeadSizes))>());
  if constexpr (kUnlike) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (at(HeadSize<kUnlikeSizes[i].key>{}, HeadSize<kUnlikeSizes[i].value>{}), ...);
    }(std::make_integer_sequence<int, static_cast<int>(std::size(kUnlikeSizes))>());
  }
}

}  // namespace kvcomp
