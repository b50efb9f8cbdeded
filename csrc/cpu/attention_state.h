// The running softmax of rows of q, and the memory in which a thread of the CPU attention works.
#pragma once

#include <cstddef>
#include <limits>

#include "parallel.h"

namespace kvcomp::cpu {

using simd::kTile;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr std::size_t lines(std::size_t floats) { return (floats + 15) / 16 * 16; }

// The running softmax of the rows of a walk.
struct State {
  float *max, *sum, *acc;  // [rows], [rows], [rows, Dv]

  State(float* memory, int rows) : max(memory), sum(memory + rows), acc(memory + lines(2 * rows)) {}

  static std::size_t size(int rows, int value_dim) {
    return lines(2 * rows) + lines(std::size_t(rows) * value_dim);
  }
};

// What a part works with besides the states of the walks that its borders cut.
struct Scratch {
  State walk, span;             // of the spans so far, and of the one in work
  float *q, *logits, *rescale;  // prepared q [rows, query_size], [rows, kTile], [rows]

  Scratch(float* memory, int rows, int query_size, int value_dim)
      : walk(memory, rows),
        span(memory + State::size(rows, value_dim), rows),
        q(memory + 2 * State::size(rows, value_dim)),
        logits(q + lines(std::size_t(rows) * query_size)),
        rescale(logits + std::size_t(rows) * kTile) {}

  static std::size_t size(int rows, int query_size, int value_dim) {
    return 2 * State::size(rows, value_dim) + lines(std::size_t(rows) * query_size) +
           std::size_t(rows) * kTile + lines(rows);
  }
};

}  // namespace kvcomp::cpu
