// What becomes of a step's logits: page scores, and hits with their replay. Part of rows.inl.

// --- kept logits -------------------------------------------------------------------------------

void stream(const float* from, int count, float* to) {
  constexpr int kLine = 64 / sizeof(float);
  int i = 0;
  if (reinterpret_cast<std::uintptr_t>(to) % 64 == 0) {
    for (; i + kLine <= count; i += kLine) {
      UNROLL for (int j = i; j < i + kLine; j += kLanes) store_past(to + j, load(from + j));
    }
  }
  if (i < count) __builtin_memcpy(to + i, from + i, (count - i) * sizeof(float));
}

// --- page scores -------------------------------------------------------------------------------

void token_scores(const float* logits, std::int64_t stride, const float* lse, int num_heads,
                  int count, bool use_max, float* tokens) {
  for (int t = 0; t < count; t += kLanes) store(tokens + t, broadcast(use_max ? -kInfinity : 0));
  for (int h = 0; h < num_heads; ++h, logits += stride) {  // head by head: reads are in sequence
    const Vec shift = broadcast(lse[h] == -kInfinity ? kInfinity : lse[h]);  // all masked: 0
    for (int t = 0; t < count; t += kLanes) {
      const int n = min(count - t, kLanes);
      const Vec exponent = (n == kLanes ? load(logits + t) : load_first(logits + t, n)) - shift;
      const Vec score = load(tokens + t);
      store(tokens + t, use_max ? max(score, exponent) : score + exp(exponent));
    }
  }
  // The exp of the largest exponent is the largest exp: one exp per token for the maximum.
  for (int t = 0; use_max && t < count; t += kLanes) store(tokens + t, exp(load(tokens + t)));
}

float sum(const float* x, int count) {
  Vec total = zero();
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) total = total + load(x + i);
  if (i < count) total = total + load_first(x + i, count - i);
  return reduce_add(total);
}

// --- hits --------------------------------------------------------------------------------------

void hit_bits(const float* logits, std::int64_t stride, const float* lse, int num_heads, int count,
              float log_threshold, std::uint32_t* words) {
  const int whole = count / 32, rest = count % 32;
  const Vec limit = broadcast(log_threshold);
  for (int w = 0; w < whole + (rest > 0); ++w) words[w] = 0;
  for (int h = 0; h < num_heads; ++h, logits += stride) {  // head by head: reads are in sequence
    const Vec shift = broadcast(lse[h] == -kInfinity ? kInfinity : lse[h]);  // all masked: no hit
    const float* x = logits;
    for (int w = 0; w < whole; ++w, x += 32) {
      std::uint32_t bits = words[w];
      UNROLL for (int i = 0; i < 32; i += kLanes) bits |= at_least(load(x + i) - shift, limit) << i;
      words[w] = bits;
    }
    for (int i = 0; i < rest; i += kLanes) {
      const int n = min(rest - i, kLanes);
      words[whole] |= (at_least(load_first(x + i, n) - shift, limit) & ((1u << n) - 1)) << i;
    }
  }
}

struct Bits {  // the lanes of 32 tokens
  std::uint32_t bit[32] = {};
  constexpr Bits() {
    for (int i = 0; i < 32; ++i) bit[i] = 1u << i;
  }
};
constexpr Bits kBits;

void replay(const std::uint32_t* hits, std::int64_t stride, int num_steps, int first_step,
            std::int32_t* last_hit, std::int32_t* longest) {
  constexpr int kVectors = 32 / kLanes;
  Ints bit[kVectors], last[kVectors], interval[kVectors];
  __builtin_memcpy(bit, kBits.bit, sizeof bit);
  __builtin_memcpy(last, last_hit, sizeof last);
  __builtin_memcpy(interval, longest, sizeof interval);
  for (int s = 0; s < num_steps; ++s) {
    const Ints word = Ints{} + static_cast<std::int32_t>(hits[s * stride]);
    const Ints step = Ints{} + (first_step + s);
    UNROLL for (int v = 0; v < kVectors; ++v) {
      const Ints hit = (word & bit[v]) == bit[v], silent = step - last[v];
      const Ints longer = silent > interval[v] ? silent : interval[v];
      interval[v] = hit ? longer : interval[v];
      last[v] = hit ? step : last[v];
    }
  }
  __builtin_memcpy(last_hit, last, sizeof last);
  __builtin_memcpy(longest, interval, sizeof interval);
}
