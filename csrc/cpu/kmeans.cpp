// Spherical k-means of each head's keys.
//
// Tokens are compared with centres a panel at a time, and the products stay in registers. After the
// first iterations few clusters still change, and a product with a centre that did not move is what
// it was: all tokens are compared with the centres that moved, and only those whose own centre
// moved away from them with the others too. The labels are bit for bit those of comparing all.
//
// Then the tokens are sorted by label, and a centre is the sum of its members in their order,
// whatever the number of threads. Where there are many windows a thread takes whole ones, otherwise
// the threads share one.
//
// FLOPs: at most 2 * tokens * clusters * D per head, window and iteration, plus the sums. Memory:
// the centres twice and some integers a token; keys are centred as they are packed.
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

using simd::kCentreBlock;
using simd::kTile;

constexpr std::int64_t kGrain = 1 << 20;  // products that are worth a thread

int clusters_of(int tokens, int cluster_size) {
  const std::int64_t twice = std::int64_t{2} * tokens + cluster_size;
  return std::max(1, static_cast<int>(twice / (std::int64_t{2} * cluster_size)));
}

// Tokens [first, first + tokens) of a head, in clusters [base, base + clusters).
struct Window {
  int batch, head, first, tokens, base, clusters;
};

// The tokens of a window by label, then by age.
struct Members {
  std::vector<std::int32_t> tokens, ends;

  void clear(int num_tokens, int num_clusters) {
    tokens.resize(num_tokens);
    ends.assign(num_clusters + 1, 0);
  }
  void sort(const std::int32_t* labels) {
    const auto num_tokens = static_cast<int>(tokens.size());
    std::fill(ends.begin(), ends.end(), 0);
    for (int t = 0; t < num_tokens; ++t) ++ends[labels[t] + 1];
    for (std::size_t c = 1; c < ends.size(); ++c) ends[c] += ends[c - 1];
    for (int t = 0; t < num_tokens; ++t) tokens[ends[labels[t]]++] = t;
  }

  int begin(int cluster) const { return cluster ? ends[cluster - 1] : 0; }
  int size(int cluster) const { return ends[cluster] - begin(cluster); }
  const std::int32_t* of(int cluster) const { return tokens.data() + begin(cluster); }
  bool same(int cluster, const Members& other) const {
    const int count = size(cluster);
    return count == other.size(cluster) &&
           std::equal(of(cluster), of(cluster) + count, other.of(cluster));
  }
};

// Memory kept between calls by the thread that clusters a window.
struct Scratch {
  Workspace floats;
  Members now, before;
  std::vector<float> dots;
  std::vector<std::int32_t> group, open;
  std::vector<std::uint8_t> moved, settled;
};

class Clustering {
 public:
  Clustering(const KmeansParams& p, const Window& w, Scratch& scratch)
      : p_(p),
        w_(w),
        s_(scratch),
        loops_(typed(simd::rows(), p.dtype)),
        dim_(p.head_dim),
        stride_(p.stride_k_t * size_of(p.dtype)),
        keys_(static_cast<const char*>(p.keys) +
              (w.batch * p.stride_k_b + w.head * p.stride_k_h + w.first * p.stride_k_t) *
                  size_of(p.dtype)),
        labels_(p.labels + (std::int64_t{w.batch} * p.num_heads + w.head) * p.num_tokens +
                w.first) {
    mean_ = s_.floats.get((std::size_t{1} + kSlices + 2 * w.clusters + kCentreBlock) * dim_);
    slices_ = mean_ + dim_;
    centres_ = slices_ + kSlices * dim_;
    group_ = centres_ + std::int64_t{w.clusters} * dim_;
    s_.now.clear(w.tokens, w.clusters);
    s_.before.clear(w.tokens, w.clusters);
    s_.dots.assign(w.tokens, -std::numeric_limits<float>::infinity());
    s_.settled.resize(w.tokens);
    s_.moved.assign(w.clusters, true);
  }

  void run() {
    std::fill_n(labels_, w_.tokens, 0);
    find_mean();
    for_each_cluster([this](int cluster) {
      const auto token = static_cast<std::int32_t>(std::int64_t{cluster} * w_.tokens / w_.clusters);
      set_centre(cluster, &token, 1);
    });
    for (int i = 0; i < p_.iterations; ++i) {
      if (i > 0 && !move_centres()) break;
      assign();
      std::swap(s_.now, s_.before);
      s_.now.sort(labels_);
    }
    for_each_cluster([this](int cluster) { write(cluster); });
    for (int t = 0; t < w_.tokens; ++t) labels_[t] += w_.base;
  }

 private:
  static constexpr int kSlices = 16;  // of the window, summed apart: the same for any threads
  static constexpr int kMaxDim = simd::kMostCentre;

  float* centre(int cluster) { return centres_ + std::int64_t{cluster} * dim_; }
  const void* key(int token) const { return keys_ + token * stride_; }

  template <class F>
  void for_each_cluster(F f) {
    const int threads = num_threads(std::int64_t{8} * w_.tokens * dim_, kGrain);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16) if (threads > 1)
    for (int cluster = 0; cluster < w_.clusters; ++cluster) f(cluster);
  }

  // sum [D] = the keys token_of(0) ... token_of(count - 1), in the order of pv.
  template <class F>
  void add_keys(int count, F token_of, float* sum) {
    static constexpr auto kOnes = [] {
      std::array<float, kTile> ones{};
      ones.fill(1.0f);
      return ones;
    }();
    std::memset(sum, 0, dim_ * sizeof(float));
    for (int from = 0; from < count; from += kTile) {
      const void* rows[kTile];
      const int n = std::min(count - from, kTile);
      for (int i = 0; i < n; ++i) rows[i] = key(token_of(from + i));
      loops_.pv(kOnes.data(), 1, dim_, rows, n, nullptr, kOnes.data(), sum);
    }
  }

  void find_mean() {
    const int threads = num_threads(std::int64_t{8} * w_.tokens * dim_, kGrain);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int slice = 0; slice < kSlices; ++slice) {
      const auto from = static_cast<int>(std::int64_t{slice} * w_.tokens / kSlices);
      const auto to = static_cast<int>(std::int64_t{slice + 1} * w_.tokens / kSlices);
      add_keys(to - from, [from](int i) { return from + i; }, slices_ + slice * dim_);
    }
    for (int d = 0; d < dim_; ++d) {
      float sum = 0;
      for (int slice = 0; slice < kSlices; ++slice) sum += slices_[slice * dim_ + d];
      mean_[d] = sum / static_cast<float>(w_.tokens);
    }
  }

  // The normalised mean of centred keys.
  void set_centre(int cluster, const std::int32_t* tokens, int count) {
    float* x = centre(cluster);
    add_keys(count, [tokens](int i) { return tokens[i]; }, x);
    const float scale = 1.0f / static_cast<float>(count);
    float squares[8] = {};
    for (int d = 0; d < dim_; d += 8) {
      for (int i = 0; i < 8; ++i) {
        x[d + i] = x[d + i] * scale - mean_[d + i];
        squares[i] += x[d + i] * x[d + i];
      }
    }
    float square = 0;
    for (float part : squares) square += part;
    const float factor = square > 0 ? 1.0f / std::sqrt(square) : 0.0f;
    for (int d = 0; d < dim_; ++d) x[d] *= factor;
  }

  // Whether any did: otherwise the labels are final.
  bool move_centres() {
    for_each_cluster([this](int cluster) {
      const int count = s_.now.size(cluster);
      s_.moved[cluster] = count > 0 && !s_.now.same(cluster, s_.before);
      if (s_.moved[cluster]) set_centre(cluster, s_.now.of(cluster), count);
    });
    return std::find(s_.moved.begin(), s_.moved.end(), true) != s_.moved.end();
  }

  void assign() {
    gather_centres(true);
    const auto all = [](int i) { return i; };
    search(w_.tokens, all, [this](int token, float dot, int cluster) {
      // Centres that stayed come after the token's label and dot of the last time.
      const int label = labels_[token];
      const bool ahead = is_before(dot, cluster, s_.dots[token], label);
      const bool stayed = !s_.moved[label];
      if (!stayed || ahead) take(token, dot, cluster);
      s_.settled[token] = stayed || ahead;
    });
    gather_centres(false);
    if (s_.group.empty()) return;
    s_.open.clear();
    for (int t = 0; t < w_.tokens; ++t) {
      if (!s_.settled[t]) s_.open.push_back(t);
    }
    const auto open = [this](int i) { return s_.open[i]; };
    search(static_cast<int>(s_.open.size()), open, [this](int token, float dot, int cluster) {
      if (is_before(dot, cluster, s_.dots[token], labels_[token])) take(token, dot, cluster);
    });
  }

  static bool is_before(float dot, int cluster, float other_dot, int other) {
    return dot > other_dot || (dot == other_dot && cluster < other);
  }
  void take(int token, float dot, int cluster) {
    s_.dots[token] = dot;
    labels_[token] = cluster;
  }

  // group_: the centres that moved, or the others, up to a multiple of kCentreBlock.
  void gather_centres(bool moved) {
    s_.group.clear();
    for (int cluster = 0; cluster < w_.clusters; ++cluster) {
      if (s_.moved[cluster] == moved) s_.group.push_back(cluster);
    }
    float* to = group_;
    for (int cluster : s_.group) to = std::copy_n(centre(cluster), dim_, to);
    for (auto i = s_.group.size(); i % kCentreBlock != 0; ++i) to = std::copy_n(group_, dim_, to);
  }

  // found(token, dot, cluster) for each of the tokens: the first nearest centre of the group.
  template <class F, class G>
  void search(int count, F token_of, G found) {
    const auto size = static_cast<int>(s_.group.size());
    const int padded = (size + kCentreBlock - 1) / kCentreBlock * kCentreBlock;
    const int threads = num_threads(std::int64_t{count} * padded * dim_, kGrain);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int from = 0; from < count; from += kTile) {
      const void* rows[kTile];
      std::int32_t ids[kTile];
      float dots[kTile];
      const int n = std::min(count - from, kTile);
      for (int i = 0; i < kTile; ++i) rows[i] = key(token_of(from + std::min(i, n - 1)));
      loops_.nearest(rows, n, mean_, group_, padded, dim_, ids, dots);
      for (int i = 0; i < n; ++i) found(token_of(from + i), dots[i], s_.group[ids[i]]);
    }
  }

  void write(int cluster) {
    const std::int64_t row =
        (std::int64_t{w_.batch} * p_.num_heads + w_.head) * p_.num_clusters + w_.base + cluster;
    const int count = s_.now.size(cluster);
    const std::int32_t* tokens = s_.now.of(cluster);
    float sum[kMaxDim];
    add_keys(count, [tokens](int i) { return tokens[i]; }, sum);
    loops_.store(sum, 1.0f / static_cast<float>(std::max(count, 1)), dim_,
                 static_cast<char*>(p_.centroids) + row * dim_ * size_of(p_.dtype));
    p_.sizes[row] = count;
  }

  const KmeansParams& p_;
  const Window& w_;
  Scratch& s_;
  const simd::TypedRows& loops_;
  const int dim_;
  const std::int64_t stride_;  // bytes
  const char* keys_;
  std::int32_t* labels_;  // counted from 0 until the end
  float* mean_;           // [D], as all floats here in the order of pv
  float* slices_;         // [kSlices, D]
  float* centres_;        // [clusters, D]
  float* group_;          // those of s_.group, with room for kCentreBlock more
};

// What no window covers.
void clear(const KmeansParams& p, int batch, int head, int num_used) {
  const std::int64_t row = std::int64_t{batch} * p.num_heads + head;
  std::int32_t* labels = p.labels + row * p.num_tokens;
  std::fill(labels, labels + p.first[batch], -1);
  std::fill(labels + p.last[batch], labels + p.num_tokens, -1);
  std::int32_t* sizes = p.sizes + row * p.num_clusters;
  std::fill(sizes + num_used, sizes + p.num_clusters, 0);
  const std::int64_t row_bytes = std::int64_t{p.head_dim} * size_of(p.dtype);
  std::memset(static_cast<char*>(p.centroids) + (row * p.num_clusters + num_used) * row_bytes, 0,
              (p.num_clusters - num_used) * row_bytes);
}

}  // namespace

void kmeans(const KmeansParams& p) {
  std::vector<Window> windows;
  std::int64_t work = 0;
  for (int batch = 0; batch < p.batch; ++batch) {
    for (int head = 0; head < p.num_heads; ++head) {
      int base = 0;
      for (std::int64_t first = p.first[batch]; first < p.last[batch]; first += p.window) {
        const auto tokens =
            static_cast<int>(std::min<std::int64_t>(p.last[batch] - first, p.window));
        const int clusters = clusters_of(tokens, p.cluster_size);
        windows.push_back({batch, head, static_cast<int>(first), tokens, base, clusters});
        base += clusters;
        work += std::int64_t{tokens} * clusters * p.head_dim * p.iterations;
      }
      clear(p, batch, head, base);
    }
  }
  const auto num_windows = static_cast<int>(windows.size());
  int threads = num_threads(work, kGrain);
  if (num_windows < 4 * threads) threads = 1;  // out here: they share each window
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int i = 0; i < num_windows; ++i) {
    thread_local Scratch scratch;
    Clustering(p, windows[i], scratch).run();
  }
}

}  // namespace kvcomp::cpu
