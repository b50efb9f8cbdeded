// What the functions of kvcomp/matrix.cuh mean.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/async_copy.h"
#include "emulator/block.h"
#include "emulator/half.h"

namespace kvcomp {

inline void copy_async(void* shared, const void* from, bool wanted,
                       emulator::Where where = emulator::Where::current()) {
  emulator::async_copy::ask(shared, from, 16, wanted, where);
}
inline void copy_word_async(void* shared, const void* from, bool wanted,
                            emulator::Where where = emulator::Where::current()) {
  emulator::async_copy::ask(shared, from, 4, wanted, where);
}
inline void end_copy_group() { emulator::async_copy::end_group(); }
template <int kLater>
void wait_for_copies() {
  emulator::async_copy::wait(kLater);
}

namespace emulator {

inline float to_float(std::uint16_t bits, __half) { return __half2float({bits}); }
inline float to_float(std::uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }

inline std::uint16_t half_word(unsigned word, int half) {
  return static_cast<std::uint16_t>(word >> 16 * half);
}

struct MatrixRows {
  const std::uint16_t* row;
  unsigned fragment[4];
};

// element(matrix, row, column) of the four matrices, to the lanes that hold it.
template <bool kTransposed>
void distribute(Lanes<MatrixRows> lanes) {
  const auto element = [&](int matrix, int row, int column) -> unsigned {
    if (kTransposed) std::swap(row, column);
    return lanes[8 * matrix + row]->row[column];
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4, column = lane % 4 * 2;
      lanes[lane]->fragment[i] = element(i, row, column) | element(i, row, column + 1) << 16;
    }
  }
}

template <bool kTransposed>
void load_matrices(unsigned (&fragment)[4], const void* row, const char* what, Where where) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
    fail(std::string(what) + ": a row that is not aligned to 16 bytes", &where);
  }
  const MatrixRows mine = warp_collective<MatrixRows>(
      what, ~0u, {static_cast<const std::uint16_t*>(row), {}},
      [](Lanes<MatrixRows> lanes) { distribute<kTransposed>(lanes); }, where);
  std::memcpy(fragment, mine.fragment, sizeof fragment);
}

template <typename T>
struct Product {
  float c[4];
  unsigned a[4], b[2];

  static void evaluate(Lanes<Product> lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
          a[row + i % 2 * 8][column + half + i / 2 * 8] =
              to_float(half_word(lanes[lane]->a[i], half), T{});
        }
        for (int i = 0; i < 2; ++i) {  // row and column change places
          b[column + half + i * 8][row] = to_float(half_word(lanes[lane]->b[i], half), T{});
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = lanes[lane]->c[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lanes[lane]->c[i] = sum;
      }
    }
  }
};

}  // namespace emulator

inline void load_matrices(unsigned (&fragment)[4], const void* row,
                          emulator::Where where = emulator::Where::current()) {
  emulator::load_matrices<false>(fragment, row, "load_matrices", where);
}
inline void load_matrices_transposed(unsigned (&fragment)[4], const void* row,
                                     emulator::Where where = emulator::Where::current()) {
  emulator::load_matrices<true>(fragment, row, "load_matrices_transposed", where);
}

inline unsigned transpose_matrix(unsigned fragment,
                                 emulator::Where where = emulator::Where::current()) {
  const auto evaluate = [](emulator::Lanes<unsigned> lanes) {
    std::uint16_t matrix[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        matrix[lane / 4][lane % 4 * 2 + half] = emulator::half_word(*lanes[lane], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const unsigned low = matrix[lane % 4 * 2][lane / 4];
      *lanes[lane] = low | unsigned{matrix[lane % 4 * 2 + 1][lane / 4]} << 16;
    }
  };
  return emulator::warp_collective<unsigned>("transpose_matrix", ~0u, fragment, evaluate, where);
}

template <typename T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], T,
                  emulator::Where where = emulator::Where::current()) {
  using Product = emulator::Product<T>;
  Product mine;
  std::memcpy(mine.c, c, sizeof c);
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  mine = emulator::warp_collective<Product>(
      "multiply_add", ~0u, mine, [](emulator::Lanes<Product> lanes) { Product::evaluate(lanes); },
      where);
  std::memcpy(c, mine.c, sizeof c);
}

}  // namespace kvcomp
