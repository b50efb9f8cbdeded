// A matrix of weights against a few rows, in tiles. Part of amx.cpp.
//
// 32 outputs by up to 32 rows of x are four tiles of sums, which run through the weights from their
// first elements to their last: for every number of rows in the same way, so that the sums of a row
// do not depend on it.

constexpr int kLinearRows = 2 * kSide;

inline int linear_steps(int width) { return (width + kStep - 1) / kStep; }

inline std::int64_t linear_size(int num_rows, int width) {
  return std::int64_t{(num_rows + kSide - 1) / kSide} * linear_steps(width) * kSquare;
}

// Of 16 rows at a time: step by step a square whose row p holds pair p of each.
void prepare_linear(const void* const* x, int num_rows, int width, float* prepared) {
  for (int first = 0; first < num_rows; first += kSide) {
    for (int i = 0; i < width; i += kStep, prepared += kSquare) {
      const __mmask32 present = width - i < kStep ? (1u << (width - i)) - 1 : ~0u;
      Vec square[kSide];
      UNROLL for (int r = 0; r < kSide; ++r) {
        square[r] = zero();
        if (first + r < num_rows) {
          const auto* row = static_cast<const Bfloat16*>(x[first + r]) + i;
          square[r].x = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(present, row));
        }
      }
      transpose(square);
      UNROLL for (int p = 0; p < kSide; ++p) store(prepared + p * kSide, square[p]);
    }
  }
}

// The weights of the next outputs on their way into L2, line by line as they lie in memory, while
// those of the present ones are multiplied.
class NextWeights {
 public:
  NextWeights(const Bfloat16* weight, std::int64_t stride, int width, std::int64_t count)
      : row_(reinterpret_cast<const char*>(weight)),
        stride_(stride * 2),
        bytes_(width * 2),
        left_(count) {}

  [[gnu::always_inline]] void fetch(int lines) {
    for (int i = 0; i < lines && left_ > 0; ++i) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += 64;
      if (at_ >= bytes_) {
        at_ = 0;
        row_ += stride_;
        --left_;
      }
    }
  }

 private:
  const char* row_;
  std::int64_t stride_;
  int bytes_, at_ = 0;
  std::int64_t left_;  // rows
};

// Up to 16 outputs from one square of sums, whose row o holds those of all rows of x.
inline void write_outputs(const Square& sums, int num_rows, int count, const Bfloat16* bias,
                          Bfloat16* y, std::int64_t stride_y) {
  Vec rows[kSide];
  sums.read(rows);
  transpose(rows);
  const auto present = static_cast<__mmask16>((1u << count) - 1);
  Vec added = zero();
  if (bias) {
    const __m256i bits = _mm256_maskz_loadu_epi16(present, bias);
    added.x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  UNROLL for (int r = 0; r < kSide; ++r) {
    if (r < num_rows) {
      const __m512i bits = _mm512_srli_epi32(round_bf16(rows[r] + added), 16);
      _mm256_mask_storeu_epi16(y + r * stride_y, present, _mm512_cvtepi32_epi16(bits));
    }
  }
}

// 16 weights, 32 elements of each, as a tile takes them.
struct Rows16 {
  const void* data;
  std::int64_t stride;  // bytes

  // Those from output o and element i on, of a matrix with `count` outputs. What it lacks is 0.
  static Rows16 at(const Bfloat16* weight, std::int64_t stride, int width, std::int64_t count,
                   std::int64_t o, int i, Square& edge) {
    const Bfloat16* data = weight + o * stride + i;
    if (count - o >= kSide && width - i >= kStep) return {data, stride * 2};
    const __mmask32 present = width - i < kStep ? (1u << (width - i)) - 1 : ~0u;
    for (int r = 0; r < kSide; ++r) {
      Vec row = zero();
      if (o + r < count) {
        row.x = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(present, data + r * stride));
      }
      store(edge.words + r * kSide, row);
    }
    written();
    return {edge.words, kSide * 4};
  }
};

template <int B>  // sixteens of rows of x
void multiply_blocks(const float* x, int num_rows, const Bfloat16* weight, std::int64_t stride,
                     int width, std::int64_t count, const Bfloat16* bias, Bfloat16* y,
                     std::int64_t stride_y) {
  // Tiles: sums 0 and 1 of the first outputs, 2 and 3 of the second; x 4 and 5; weights 6 and 7.
  const int columns[2] = {B == 1 ? num_rows : kSide, B == 1 ? kSide : num_rows - kSide};
  Shapes shapes;
  for (int b = 0; b < 2; ++b) {
    shapes.set(b, kSide, columns[b]);
    shapes.set(2 + b, kSide, columns[b]);
    shapes.set(4 + b, kSide, columns[b]);
    shapes.set(6 + b, kSide, kSide);
  }
  shapes.load();

  const int steps = linear_steps(width);
  NextWeights next(weight, stride, width, count);
  next.fetch(2 * kSide * steps);
  Square edges[2], sums[2][2] = {};
  for (std::int64_t o = 0; o < count; o += 2 * kSide) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < steps; ++s) {
      const Rows16 a = Rows16::at(weight, stride, width, count, o, s * kStep, edges[0]);
      const Rows16 b = Rows16::at(weight, stride, width, count, o + kSide, s * kStep, edges[1]);
      _tile_loadd(4, x + s * kSquare, kSide * 4);
      _tile_loadd(6, a.data, a.stride);
      _tile_dpbf16ps(0, 6, 4);
      _tile_loadd(7, b.data, b.stride);
      _tile_dpbf16ps(2, 7, 4);
      if constexpr (B == 2) {
        _tile_loadd(5, x + (steps + s) * kSquare, kSide * 4);
        _tile_dpbf16ps(1, 6, 5);
        _tile_dpbf16ps(3, 7, 5);
      }
      next.fetch(2 * kSide);
    }
    _tile_stored(0, sums[0][0].words, kSide * 4);
    _tile_stored(2, sums[1][0].words, kSide * 4);
    if constexpr (B == 2) {
      _tile_stored(1, sums[0][1].words, kSide * 4);
      _tile_stored(3, sums[1][1].words, kSide * 4);
    }
    for (int half = 0; half < 2; ++half) {
      const std::int64_t first = o + half * kSide;
      if (first >= count) break;
      const int present = static_cast<int>(count - first < kSide ? count - first : kSide);
      for (int b = 0; b < B; ++b) {
        write_outputs(sums[half][b], columns[b], present, bias ? bias + first : nullptr,
                      y + b * kSide * stride_y + first, stride_y);
      }
    }
  }
}

void multiply_linear(const float* x, int num_rows, const void* weight, std::int64_t stride,
                     int width, std::int64_t count, const void* bias, void* y,
                     std::int64_t stride_y) {
  const auto multiply = num_rows <= kSide ? &multiply_blocks<1> : &multiply_blocks<2>;
  multiply(x, num_rows, static_cast<const Bfloat16*>(weight), stride, width, count,
           static_cast<const Bfloat16*>(bias), static_cast<Bfloat16*>(y), stride_y);
}
