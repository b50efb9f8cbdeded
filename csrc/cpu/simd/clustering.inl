// Rows against centres, and rows against rows. Part of rows.inl.

// --- nearest centre ----------------------------------------------------------------------------

constexpr int kPanel = 2 * kLanes;  // tokens whose best centre is sought together
static_assert(kTile % kPanel == 0 && kCentreBlock % kTall == 0);

// panel [D, kPanel] = rows - mean, transposed: a lane is a token.
template <class T>
void pack(RowPointers rows, const float* mean, int head_dim, float* panel) {
  const auto pack_block = [=](int i, int from, auto load_row) {
    const Vec offset = load(mean + i);
    Vec block[kLanes];
    UNROLL for (int t = 0; t < kLanes; ++t) {
      block[t] = load_row(static_cast<const T*>(rows[from + t])) - offset;
    }
    transpose(block);
    UNROLL for (int n = 0; n < kLanes; ++n) store(panel + (i + n) * kPanel + from, block[n]);
  };
  for (int from = 0; from < kPanel; from += kLanes) {
    int i = 0;
    for (; i + 2 * kLanes <= head_dim; i += 2 * kLanes) {
      pack_block(i, from, [i](const T* row) { return load_pair(row + i).a; });
      pack_block(i + kLanes, from, [i](const T* row) { return load_pair(row + i).b; });
    }
    if (i < head_dim) pack_block(i, from, [i](const T* row) { return load(row + i); });
  }
}

// kTall x 2 vectors of products stay in registers, and so never exist as a matrix. The panel is
// read from L1, the centres pass through once a panel.
void nearest_of_panel(const float* panel, const float* centres, int num_centres, int head_dim,
                      std::int32_t* ids, float* dots) {
  Vec best[2] = {broadcast(-kInfinity), broadcast(-kInfinity)}, id[2] = {zero(), zero()};
  for (int c = 0; c < num_centres; c += kTall) {
    const float* centre = centres + static_cast<std::int64_t>(c) * head_dim;
    Vec sums[kTall][2];
    UNROLL for (int r = 0; r < kTall; ++r) sums[r][0] = sums[r][1] = zero();
    for (int i = 0; i < head_dim; ++i) {
      const Vec x0 = load(panel + i * kPanel), x1 = load(panel + i * kPanel + kLanes);
      UNROLL for (int r = 0; r < kTall; ++r) {
        const Vec w = broadcast(centre[r * head_dim + i]);
        sums[r][0] = fma(w, x0, sums[r][0]);
        sums[r][1] = fma(w, x1, sums[r][1]);
      }
    }
    UNROLL for (int r = 0; r < kTall; ++r) {
      const Vec this_id = broadcast(static_cast<float>(c + r));
      UNROLL for (int n = 0; n < 2; ++n) {
        id[n] = where_above(sums[r][n], best[n], this_id, id[n]);
        best[n] = max(sums[r][n], best[n]);
      }
    }
  }
  float id_of[kPanel];
  UNROLL for (int n = 0; n < 2; ++n) {
    store(id_of + n * kLanes, id[n]);
    store(dots + n * kLanes, best[n]);
  }
  for (int t = 0; t < kPanel; ++t) ids[t] = static_cast<std::int32_t>(id_of[t]);
}

template <class T>
void nearest(RowPointers rows, int count, const float* mean, const float* centres, int num_centres,
             int head_dim, std::int32_t* ids, float* dots) {
  alignas(64) float panel[kPanel * kMostCentre];
  for (int t = 0; t < count; t += kPanel) {
    pack<T>(rows + t, mean, head_dim, panel);
    nearest_of_panel(panel, centres, num_centres, head_dim, ids + t, dots + t);
  }
}

// --- similarity --------------------------------------------------------------------------------

template <class T>
void products(const void* a_, const void* b_, int head_dim, float* sums) {
  const T *a = static_cast<const T*>(a_), *b = static_cast<const T*>(b_);
  Vec aa = zero(), ab = zero(), bb = zero();
  const auto add = [&](Vec x, Vec y) {
    aa = fma(x, x, aa);
    ab = fma(x, y, ab);
    bb = fma(y, y, bb);
  };
  int i = 0;
  for (; i + 2 * kLanes <= head_dim; i += 2 * kLanes) {
    const Pair x = load_pair(a + i), y = load_pair(b + i);
    add(x.a, y.a);
    add(x.b, y.b);
  }
  if (i < head_dim) add(load(a + i), load(b + i));
  sums[0] = reduce_add(aa);
  sums[1] = reduce_add(ab);
  sums[2] = reduce_add(bb);
}
