// Thresholds that leave a given number or weight above them. Part of rows.inl.

// --- selection ---------------------------------------------------------------------------------

inline Vec load_ranking(const float* x, int n) {  // NaN becomes -inf; lanes past n are 0
  return max(n == kLanes ? load(x) : load_first(x, n), broadcast(-kInfinity));
}

// Floats in their order have a place among the unsigned integers; its bits are found one by one.
inline float float_at(std::uint32_t place) {
  const bool negative = place < 0x80000000u;
  if (place < 0x007fffffu) return -kInfinity;  // what would be NaN
  return __builtin_bit_cast(float, negative ? ~place : place & 0x7fffffffu);
}

float nth_largest(const float* x, int count, int rank, int* num_above) {
  const auto count_if = [&](auto test) {
    int matches = 0;
    for (int i = 0; i < count; i += kLanes) {
      const int n = min(count - i, kLanes);
      matches += __builtin_popcount(test(load_ranking(x + i, n)) & ((1u << n) - 1));
    }
    return matches;
  };
  std::uint32_t place = 0;
  for (std::uint32_t bit = 0x80000000u; bit; bit >>= 1) {
    const Vec limit = broadcast(float_at(place | bit));
    const int matches = count_if([&](Vec v) { return at_least(v, limit); });
    if (matches == rank && rank < count && place != 0) {  // the float before splits them already
      *num_above = rank;
      return float_at((place | bit) - 1);
    }
    if (matches >= rank) place |= bit;
  }
  const Vec limit = broadcast(float_at(place));
  *num_above = count_if([&](Vec v) { return above(v, limit); });
  return float_at(place);
}

int bracket(const float* x, int count, float low, float high, float* inside, int* num_above) {
  const Vec lo = broadcast(low), hi = broadcast(high);
  int num_inside = 0, above_high = 0;
  for (int i = 0; i < count; i += kLanes) {
    const int n = min(count - i, kLanes);
    const Vec v = load_ranking(x + i, n);
    const unsigned exists = (1u << n) - 1;
    const unsigned over = above(v, hi) & exists;
    above_high += __builtin_popcount(over);
    num_inside += compress(inside + num_inside, exists & ~over & ~above(lo, v), v);
  }
  *num_above = above_high;
  return num_inside;
}

int select(const float* x, int count, float threshold, int num_equal, int first_id,
           std::int32_t* ids) {
  const Vec limit = broadcast(threshold);
  int selected = 0;
  for (int i = 0; i < count; i += kLanes) {
    const int n = min(count - i, kLanes);
    const Vec v = load_ranking(x + i, n);
    const unsigned exists = (1u << n) - 1;
    unsigned take = above(v, limit) & exists, ties = equal(v, limit) & exists;
    for (; ties && num_equal > 0; ties &= ties - 1, --num_equal) take |= ties & -ties;
    selected += compress_ids(ids + selected, take, first_id + i);
  }
  return selected;
}

// Ints wherever they lie.
using IntsAt __attribute__((vector_size(kLanes * 4), aligned(4), may_alias)) = std::int32_t;

inline const IntsAt& ints_at(const std::int32_t* p) { return *reinterpret_cast<const IntsAt*>(p); }
inline IntsAt& ints_at(std::int32_t* p) { return *reinterpret_cast<IntsAt*>(p); }

// Signed integers in the order of the floats, and back.
inline std::int32_t flip(std::int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// Keys and weights, of which only those between the bounds of a bisection are kept.
struct Weighed {
  std::int32_t *key, *weight;
  int count;

  std::int32_t at_least(std::int32_t limit) const {
    Ints total = {};
    for (int i = 0; i < count; i += kLanes) {
      total += (ints_at(key + i) >= limit) & ints_at(weight + i);
    }
    std::int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
    return sum;
  }

  void keep(std::int32_t low, std::int32_t high) {
    int kept = 0;
    for (int i = 0; i < count; i += kLanes) {
      const Ints k = ints_at(key + i), w = ints_at(weight + i);
      // As floats, for the sake of masks: 1 where a key is kept.
      const Ints inside = (k >= low) & (k <= high) & (w > 0) & 0x3f800000;
      const unsigned mask = above(__builtin_bit_cast(Vec, inside), zero());
      compress(reinterpret_cast<float*>(weight) + kept, mask, __builtin_bit_cast(Vec, w));
      kept += compress(reinterpret_cast<float*>(key) + kept, mask, __builtin_bit_cast(Vec, k));
    }
    count = kept;
    ints_at(weight + count) = Ints{};  // what the last vector holds beyond weighs nothing
  }
};

float weighted_threshold(const float* x, const std::int32_t* bounds, int count, std::int32_t budget,
                         std::int32_t* space, std::int32_t* left) {
  Weighed all{space, space + count + 16, count};
  const int whole = count / kLanes * kLanes;
  Ints least = Ints{} + 0x7fffffff, most = ~least;
  for (int i = 0; i < whole; i += kLanes) {
    const auto bits = __builtin_bit_cast(Ints, load_ranking(x + i, kLanes) + zero());  // no -0
    const Ints key = bits ^ (bits >> 31 & 0x7fffffff);
    ints_at(all.key + i) = key;
    ints_at(all.weight + i) = ints_at(bounds + i + 1) - ints_at(bounds + i);
    least = key < least ? key : least;
    most = key > most ? key : most;
  }
  std::int32_t low = 0x7fffffff, high = -low;
  for (int lane = 0; lane < kLanes && whole; ++lane) {
    low = least[lane] < low ? least[lane] : low;
    high = most[lane] > high ? most[lane] : high;
  }
  ints_at(all.weight + whole) = Ints{};
  for (int i = whole; i < count; ++i) {
    const float value = x[i] >= -kInfinity ? x[i] + 0.0f : -kInfinity;
    const std::int32_t key = flip(__builtin_bit_cast(std::int32_t, value));
    all.key[i] = key;
    all.weight[i] = bounds[i + 1] - bounds[i];
    low = key < low ? key : low;
    high = key > high ? key : high;
  }

  std::int32_t above_high = 0;  // the weight of keys that have been put aside: all above the rest
  for (int pass = 1; low < high; ++pass) {
    const auto distance = static_cast<std::uint32_t>(high) - static_cast<std::uint32_t>(low);
    const auto middle = static_cast<std::int32_t>(high - distance / 2);
    const std::int32_t weight = above_high + all.at_least(middle);
    if (weight >= budget) {
      low = middle;
    } else {
      high = middle - 1;
    }
    if (pass % 4 == 0 && all.count > kLanes) {
      above_high += high < 0x7fffffff ? all.at_least(high + 1) : 0;
      all.keep(low, high);
    }
  }
  *left = budget - above_high - all.at_least(low + 1);
  return __builtin_bit_cast(float, flip(low));
}
