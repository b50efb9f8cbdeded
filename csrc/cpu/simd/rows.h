// The inner loops over rows that every instruction set provides, and the choice among them. The
// loops are written once, in rows.inl, over the Vec that each of scalar.cpp, avx2.cpp, avx512.cpp
// and avx512bf16.cpp defines; amx.cpp has its own for what tiles of numbers are made for. These
// files are compiled with instructions that the machine may lack, so they include nothing but this
// and keep everything else to themselves.
#pragma once

#include <cstdint>

namespace kvcomp::simd {

inline constexpr int kTile = 64;  // tokens between two rescalings; a multiple of every vector
inline constexpr int kCentreBlock = 12;   // a multiple of the centres that `nearest` takes at once
inline constexpr int kMostCentre = 1024;  // elements of a row that `nearest` takes
inline constexpr int kMostQuery = 512;    // elements of a query that meets codes
inline constexpr int kRowStep = 32;  // a multiple of the elements of a row that are read at once

inline constexpr std::int64_t padded(std::int64_t width) {
  return (width + kRowStep - 1) / kRowStep * kRowStep;
}

// Storage of the 16-bit types.
struct Half {
  std::uint16_t bits;
};
struct Bfloat16 {
  std::uint16_t bits;
};
// An element of a row in eight bits, see QuantizeRowsParams.
struct Code {
  std::int8_t value;
};

// Queries that meet codes are integers of so many bits and a sign, times a power of two; a row
// below 2^kLeastExponent counts as one of that size.
inline constexpr int kQueryBits = 14;
inline constexpr int kLeastExponent = -100;

// Row t of a tile starts at rows[t]: every layout of K and V, paged or not, comes down to this.
// Lists have as many pointers as the longest tile, a multiple of 16; past its own count a tile
// repeats one of its rows.
using RowPointers = const void* const*;

// A few rows through a matrix of weights, of one element type.
struct Linear {
  int most_rows;  // at once

  // Floats that prepared rows take.
  std::int64_t (*size)(int num_rows, int width);

  // x[r] [width] for r < num_rows <= most_rows, in the order and type that `multiply` reads.
  void (*prepare)(const void* const* x, int num_rows, int width, float* prepared);

  // y[r * stride_y + o] = <x[r], w[o]> + bias[o] for o < count and r < num_rows; w[o] starts at
  // weight + o * stride and has `width` elements, bias may be null. An element of y is the same
  // bits whatever num_rows, count and its place among them are.
  void (*multiply)(const float* prepared, int num_rows, const void* weight, std::int64_t stride,
                   int width, std::int64_t count, const void* bias, void* y, std::int64_t stride_y);
};

// Loops over rows of one element type. D is head_dim: a multiple of 16.
struct TypedRows {
  // q [D] -> prepared [D floats of space], in the order and type that qk multiplies with.
  void (*prepare_q)(const void* q, int head_dim, float* prepared);

  // logits[h][t] = scale * <q[h], rows[t]> for t < count; logits [num_heads, kTile]. Each row is
  // read once for all heads; meanwhile the rows of `fetch` are brought into L1.
  void (*qk)(const float* prepared_q, int num_heads, int head_dim, RowPointers rows, int count,
             RowPointers fetch, float scale, float* logits);

  // acc[h] = acc[h] * rescale[h] + sum over t of probs[h][t] * rows[t]; acc [num_heads, D] holds a
  // row's elements in the order of the vector loads.
  void (*pv)(const float* probs, int num_heads, int head_dim, RowPointers rows, int count,
             RowPointers fetch, const float* rescale, float* acc);

  // out [D] = acc [D] * factor.
  void (*store)(const float* acc, float factor, int head_dim, void* out);

  // out [D] = a * weight_a + b * weight_b.
  void (*blend)(const void* a, float weight_a, const void* b, float weight_b, int head_dim,
                void* out);

  // ids[t] = the first centre with the largest <rows[t] - mean, centre>, dots[t] that product; t <
  // count <= kTile, which is also the room of ids and dots. mean and centres [num_centres, D] are
  // in the order of acc; num_centres is a multiple of kCentreBlock and below 2^24.
  void (*nearest)(RowPointers rows, int count, const float* mean, const float* centres,
                  int num_centres, int head_dim, std::int32_t* ids, float* dots);

  // Elements i and i + half of a row turn by an angle, i < half, given its cos and sin.
  void (*rotate)(void* row, int half, const float* cos, const float* sin);

  // sums = <a, a>, <a, b> and <b, b>.
  void (*products)(const void* a, const void* b, int head_dim, float* sums);

  Linear linear;

  // A row to floats and back, times `factor`, in the order of its elements.
  void (*widen)(const void* row, int head_dim, float* out);
  void (*narrow)(const float* row, float factor, int head_dim, void* out);

  // For many heads that share their rows. q [D] -> prepared [D floats of space], and a whole tile
  // of rows -> packed [D, kTile floats of space], as qk_packed multiplies them.
  void (*prepare_shared_q)(const void* q, int head_dim, float* prepared);
  void (*pack)(RowPointers rows, int head_dim, float* packed);

  // As qk, over all kTile rows of a packed tile.
  void (*qk_packed)(const float* prepared_q, int num_heads, int head_dim, const float* packed,
                    float scale, float* logits);

  // As pv, for the first `width` elements of the rows; acc [num_heads, width].
  void (*pv_shared)(const float* probs, int num_heads, int width, RowPointers rows, int count,
                    const float* rescale, float* acc);

  // out = x / sqrt(|x|^2 * over + eps) * weight. All have `width` elements, a multiple of kRowStep;
  // over is 1 / the number of those that count, behind which x is 0. out may be x.
  void (*norm)(const void* x, const void* weight, int width, float over, float eps, void* out);
};

// Loops over rows of codes.
struct CodeRows {
  // Floats that a prepared query takes.
  int (*query_size)(int head_dim);

  // q [D] -> prepared: integers for qk, and what one of them is worth, NaN where an element is not
  // finite.
  void (*prepare_q)(const float* q, int head_dim, float* prepared);

  // As those of TypedRows, of codes and with their scales, whose lists are as long as a tile. acc
  // is in an order of its own, and `arrange` puts a row of it into the order of elements, in place.
  void (*qk)(const float* prepared_q, int num_heads, int head_dim, RowPointers rows, int count,
             RowPointers fetch, float scale, const float* k_scale, float* logits);
  void (*pv)(const float* probs, const float* scales, int num_heads, int head_dim, RowPointers rows,
             int count, RowPointers fetch, const float* rescale, float* acc);
  void (*arrange)(float* acc, int head_dim);

  // acc [D] += sum over t of weights[t] * rows[t], in fp32.
  void (*add)(const float* weights, int head_dim, RowPointers rows, int count, float* acc);

  // The scales of K and V in words, count <= kTile, behind them zeros to kTile.
  void (*split_words)(const std::uint32_t* words, int count, float* k_scale, float* v_scale);

  // row [D] -> codes [D]; returns the fp16 scale with which they were made, NaN where an element is
  // not finite or the scale would not be.
  std::uint16_t (*quantize)(const float* row, int head_dim, std::int8_t* codes);

  // row [D] times the Walsh-Hadamard matrix over sqrt(D), D a power of two; its own inverse.
  void (*turn)(float* row, int head_dim);
};

struct Rows {
  const char* isa;
  TypedRows f32, f16, bf16;
  CodeRows codes;

  // logits[h][t] = cap * tanh(logits[h][t] / cap), t < count; logits [num_heads, kTile].
  void (*cap)(float* logits, int num_heads, int count, float cap);

  // One step of the online softmax, per head: logits [num_heads, kTile] become exp(logit - max),
  // max and sum advance, rescale = exp(old max - new max) corrects what was accumulated before.
  void (*softmax)(float* logits, int num_heads, int count, float* max, float* sum, float* rescale);

  // acc[i] = acc[i] * factor + x[i] * weight for i < count, count a multiple of 16.
  void (*accumulate)(float* acc, float factor, const float* x, float weight, int count);

  // to[t] = from[t], t < count, whole lines of `to` past the caches. Until the thread synchronises
  // by a fence, others need not see them.
  void (*stream)(const float* from, int count, float* to);

  // tokens[t] = max (or sum) over heads of exp(logits[h * stride + t] - lse[h]), t < count. tokens
  // has room for a multiple of 16.
  void (*token_scores)(const float* logits, std::int64_t stride, const float* lse, int num_heads,
                       int count, bool use_max, float* tokens);
  float (*sum)(const float* x, int count);

  // Bit t % 32 of words[t / 32], t < count: whether logits[h * stride + t] reaches lse[h] +
  // log_threshold under any head. The rest of the last word is 0.
  void (*hit_bits)(const float* logits, std::int64_t stride, const float* lse, int num_heads,
                   int count, float log_threshold, std::uint32_t* words);

  // 32 tokens live through num_steps steps: bit i of hits[s * stride] says whether token i is hit
  // at first_step + s. A hit sets longest to the largest interval between hits, then last_hit.
  void (*replay)(const std::uint32_t* hits, std::int64_t stride, int num_steps, int first_step,
                 std::int32_t* last_hit, std::int32_t* longest);

  // Three steps of a selection, in which NaN counts as -inf.
  // The rank-th largest of x, 1 <= rank <= count, or a value between it and the next; and how many
  // are larger. Up to 32 passes: for few x.
  float (*nth_largest)(const float* x, int count, int rank, int* num_above);

  // The values with low <= x <= high, in order, and how many lie above high. `inside` has room for
  // count + 16 and may be x.
  int (*bracket)(const float* x, int count, float low, float high, float* inside, int* num_above);

  // first + i for every x[i] above threshold and for the first num_equal that equal it, ascending.
  // `ids` has room for 16 more than it receives.
  int (*select)(const float* x, int count, float threshold, int num_equal, int first,
                std::int32_t* ids);

  // x[i] weighs bounds[i + 1] - bounds[i] >= 0. The largest value whose equals and what lies above
  // weigh at least `budget`, where all of x does; and what of the budget those above leave. `space`
  // holds 2 * (count + 16).
  float (*weighted_threshold)(const float* x, const std::int32_t* bounds, int count,
                              std::int32_t budget, std::int32_t* space, std::int32_t* left);
};

const Rows& scalar_rows();
const Rows& avx2_rows();
const Rows& avx512_rows();
const Rows& avx512bf16_rows();
const Rows& amx_rows();

// The best set that this machine has and KVCOMP_ISA (scalar, avx2, avx512, avx512bf16, amx) allows;
// the variable is read once. Throws std::invalid_argument on another value.
const Rows& rows();

}  // namespace kvcomp::simd
