// The body of the top-k kernels; included by every topk_ISA.cpp inside its own namespace, after
// it has defined
//   Lanes   eight fp64 lanes: zero, load (fp64), widen (item type), fma, total
//   Dots    dot products of codes: tile, scratch_bytes, pack, and Session, set up once a scan:
//           block() fills dots[query][row] for the rows of one block; reach() finds the rows whose
//           dots reach need, for the queries of live subtiles at least: it returns which queries
//           have any, and for those fills rows[query], a bit mask, and their rows' dots
//   reach   which of a query's dots reach a threshold, as a bit mask
//   subtile_thresholds   the integers that the dots of a subtile's queries must reach in a block,
//           and whether any row of it can (topk_kernels.h has the formulas)
// The order of the exact score is the contract of ops/reference/topk.py: lane j of 8 adds the
// dimensions d = j (mod 8) ascending; lanes are summed ((0+4)+(2+6))+((1+5)+(3+7)); one rounding
// to fp32. Products of two fp32 are exact in fp64, so fma and multiply-add agree.

// Rows scored together, to hide the latency of the additions.
constexpr int kRowsAtOnce = 4;

template <class T, int kRows, class Out>
inline void score_rows(const T* const* x, int64_t dim, const double* query, Out* out) {
  Lanes sum[kRows];
  for (int r = 0; r < kRows; ++r) sum[r] = Lanes::zero();
  const int64_t whole = dim & ~int64_t(7);
  for (int64_t d = 0; d < whole; d += 8) {
    const Lanes q = Lanes::load(query + d);
    for (int r = 0; r < kRows; ++r) sum[r] = Lanes::fma(Lanes::widen(x[r] + d), q, sum[r]);
  }
  if (whole != dim) {
    const Lanes q = Lanes::load(query + whole);  // zero beyond dim
    for (int r = 0; r < kRows; ++r) {
      T tail[8] = {};
      for (int64_t d = whole; d < dim; ++d) tail[d - whole] = x[r][d];
      sum[r] = Lanes::fma(Lanes::widen(tail), q, sum[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = Out(sum[r].total());
}

template <class T, class Out>
void score_ids(const ItemRows& rows, const double* query, const uint32_t* ids, int64_t n,
               Out* out) {
  const T* base = static_cast<const T*>(rows.data);
  constexpr int64_t kAhead = 8;  // rows fetched before they are needed: they lie anywhere
  const int64_t bytes = rows.dim * int64_t(sizeof(T));
  const auto fetch = [&](int64_t from, int64_t to) {
    for (int64_t a = from; a < to && a < n; ++a) {
      const char* row = reinterpret_cast<const char*>(base + int64_t(ids[a]) * rows.stride);
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte);
    }
  };
  fetch(0, kAhead);
  int64_t i = 0;
  for (; i + kRowsAtOnce <= n; i += kRowsAtOnce) {
    fetch(i + kAhead, i + kAhead + kRowsAtOnce);
    const T* x[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) x[r] = base + int64_t(ids[i + r]) * rows.stride;
    score_rows<T, kRowsAtOnce>(x, rows.dim, query, out + i);
  }
  for (; i < n; ++i) {
    const T* x = base + int64_t(ids[i]) * rows.stride;
    score_rows<T, 1>(&x, rows.dim, query, out + i);
  }
}

void fine(const int16_t* codes, int64_t dim, const double* query, const uint32_t* positions,
          int64_t n, double* out) {
  score_ids<int16_t>({codes, 0, dim, dim, Dtype::f32}, query, positions, n, out);
}

void score(const ItemRows& rows, const double* query, const uint32_t* ids, int64_t n, float* out) {
  switch (rows.type) {
    case Dtype::f32: return score_ids<float>(rows, query, ids, n, out);
    case Dtype::bf16: return score_ids<Bf16>(rows, query, ids, n, out);
    case Dtype::f16: return score_ids<Half>(rows, query, ids, n, out);
  }
}

template <class T, int kQueries, class Out>
inline void direct_tile(const T* const* x, int64_t dim, const double* const* queries,
                        Out out[][kRowsAtOnce]) {
  Lanes sum[kQueries][kRowsAtOnce];
  for (int q = 0; q < kQueries; ++q)
    for (int r = 0; r < kRowsAtOnce; ++r) sum[q][r] = Lanes::zero();
  const int64_t whole = dim & ~int64_t(7);
  for (int64_t d = 0; d < whole; d += 8) {
    Lanes row[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) row[r] = Lanes::widen(x[r] + d);
    for (int q = 0; q < kQueries; ++q) {
      const Lanes query = Lanes::load(queries[q] + d);
      for (int r = 0; r < kRowsAtOnce; ++r) sum[q][r] = Lanes::fma(row[r], query, sum[q][r]);
    }
  }
  if (whole != dim) {
    for (int r = 0; r < kRowsAtOnce; ++r) {
      T tail[8] = {};
      for (int64_t d = whole; d < dim; ++d) tail[d - whole] = x[r][d];
      const Lanes row = Lanes::widen(tail);
      for (int q = 0; q < kQueries; ++q)
        sum[q][r] = Lanes::fma(row, Lanes::load(queries[q] + whole), sum[q][r]);
    }
  }
  for (int q = 0; q < kQueries; ++q)
    for (int r = 0; r < kRowsAtOnce; ++r) out[q][r] = Out(sum[q][r].total());
}

template <class T>
void direct_rows(const ItemRows& rows, const uint32_t* order, const double* const* queries,
                 int count, const float* thresholds, int64_t begin, int64_t end, HitBuffer& hits) {
  const T* base = static_cast<const T*>(rows.data);
  constexpr int kQueries = Lanes::kDirectQueries;
  for (int64_t p = begin; p < end; p += kRowsAtOnce) {
    const int n = int(end - p < kRowsAtOnce ? end - p : kRowsAtOnce);
    const T* x[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int64_t position = r < n ? p + r : p;
      x[r] = base + (order ? int64_t(order[position]) : position) * rows.stride;
    }
    for (int q0 = 0; q0 < count; q0 += kQueries) {
      float out[kQueries][kRowsAtOnce];
      const int nq = count - q0 < kQueries ? count - q0 : kQueries;
      if (nq == kQueries) {
        direct_tile<T, kQueries>(x, rows.dim, queries + q0, out);
      } else {
        for (int q = 0; q < nq; ++q) direct_tile<T, 1>(x, rows.dim, queries + q0 + q, out + q);
      }
      for (int q = 0; q < nq; ++q) {
        for (int r = 0; r < n; ++r) {
          if (out[q][r] < thresholds[q0 + q]) continue;
          Hit& hit = hits.hits[hits.count++];
          hit.position = uint32_t(p + r);
          hit.query = q0 + q;
          hit.score = out[q][r];
        }
      }
    }
  }
}

void direct(const ItemRows& rows, const uint32_t* order, const double* const* queries, int count,
            const float* thresholds, int64_t begin, int64_t end, HitBuffer& hits) {
  switch (rows.type) {
    case Dtype::f32:
      return direct_rows<float>(rows, order, queries, count, thresholds, begin, end, hits);
    case Dtype::bf16:
      return direct_rows<Bf16>(rows, order, queries, count, thresholds, begin, end, hits);
    case Dtype::f16:
      return direct_rows<Half>(rows, order, queries, count, thresholds, begin, end, hits);
  }
}

void products(const double* rows, int64_t count, int64_t dim, const double* const* queries,
              int n_queries, double* out, int64_t stride) {
  constexpr int kQueries = Lanes::kDirectQueries;
  for (int64_t i = 0; i < count; i += kRowsAtOnce) {
    const int n = int(count - i < kRowsAtOnce ? count - i : kRowsAtOnce);
    const double* x[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) x[r] = rows + (r < n ? i + r : i) * dim;
    for (int q0 = 0; q0 < n_queries; q0 += kQueries) {
      double found[kQueries][kRowsAtOnce];
      const int nq = n_queries - q0 < kQueries ? n_queries - q0 : kQueries;
      if (nq == kQueries) {
        direct_tile<double, kQueries>(x, dim, queries + q0, found);
      } else {
        for (int q = 0; q < nq; ++q) direct_tile<double, 1>(x, dim, queries + q0 + q, found + q);
      }
      for (int q = 0; q < nq; ++q)
        for (int r = 0; r < n; ++r) out[(i + r) * stride + q0 + q] = found[q][r];
    }
  }
}

inline void pack_once(const Table& table, Tile& tile) {
  if (tile.packed) return;
  Dots::pack(table, tile);
  tile.packed = true;
}

inline uint64_t live_subtiles(const Table& table, const Tile& tile, int64_t block, int32_t* need) {
  const double* shift = shifts_of(table, tile, block);
  uint64_t live = 0;
  for (int j = 0; j < tile.count; j += kSubtile)
    live |= uint64_t(subtile_thresholds(table.bounds[block], tile, shift, j, need + j))
            << j / kSubtile;
  return live;
}

inline void append(HitBuffer& hits, int64_t block, int query, uint32_t rows, const int32_t* dots) {
  for (; rows; rows &= rows - 1) {
    const int r = __builtin_ctz(rows);
    Hit& hit = hits.hits[hits.count++];
    hit.position = uint32_t(block * kBlockRows + r);
    hit.query = query;
    hit.dot = dots[r];
  }
}

int64_t scan(const Table& table, Tile& tile, int64_t begin, int64_t end, HitBuffer& hits) {
  alignas(64) int32_t dots[kMaxTile][kBlockRows];
  alignas(64) int32_t need[kMaxTile];
  uint32_t rows[kMaxTile];
  pack_once(table, tile);
  const typename Dots::Session session(table, tile);
  int64_t skip = tile.sampled.next(begin);
  for (int64_t block = begin; block < end; ++block) {
    if (block == skip) {
      skip = tile.sampled.next(block + 1);
      continue;
    }
    if (hits.capacity - hits.count < tile.count * kBlockRows) return block;
    const uint64_t live = live_subtiles(table, tile, block, need);
    if (!live) continue;
    uint64_t reached = session.reach(table.codes + block * table.quads * 4 * kBlockRows, live, need,
                                     dots, rows);
    for (; reached; reached &= reached - 1) {
      const int j = __builtin_ctzll(reached);
      append(hits, block, j, rows[j], dots[j]);
    }
  }
  return end;
}

int64_t collect(const Table& table, const Tile& tile, const Sample& sample, int64_t begin,
                int64_t end, HitBuffer& hits) {
  alignas(64) int32_t need[kMaxTile];
  for (int64_t i = begin; i < end; ++i) {
    if (hits.capacity - hits.count < tile.count * kBlockRows) return i;
    const int64_t block = tile.sampled[i];
    const uint64_t live = live_subtiles(table, tile, block, need);
    const int32_t* dots = sample.dots + i * sample.pitch * kBlockRows;
    for (int j = 0; j < tile.count; ++j, dots += kBlockRows)
      if (live >> j / kSubtile & 1) append(hits, block, j, reach(dots, need[j]), dots);
  }
  return end;
}

inline void keep_best(const int32_t* __restrict dots, float base, float scale, int32_t first,
                      float* __restrict score, int32_t* __restrict position) {
  for (int r = 0; r < int(kBlockRows); ++r) {
    const float value = base + float(dots[r]) * scale;
    const bool better = value > score[r];
    score[r] = better ? value : score[r];
    position[r] = better ? first + r : position[r];
  }
}

void sample(const Table& table, Tile& tile, const Sample& out) {
  pack_once(table, tile);
  const typename Dots::Session session(table, tile);
  const int64_t sets = out.lanes / kBlockRows;
  for (int64_t i = 0; i < tile.sampled.count; ++i) {
    const int64_t block = tile.sampled[i];
    auto* dots = reinterpret_cast<int32_t(*)[kBlockRows]>(out.dots + i * out.pitch * kBlockRows);
    session.block(table.codes + block * table.quads * 4 * kBlockRows, dots);
    // Blocks have different scales and centers, so lanes compare whole scores. They are only a
    // preference: whoever uses the sample computes its bounds afresh.
    const double scale = 1.0 / table.bounds[block].inverse_scale;
    const double* shift = shifts_of(table, tile, block);
    for (int j = 0; j < tile.count; ++j) {
      const int64_t lane = j * out.lanes + (i % sets) * kBlockRows;
      const double base = shift[j] * tile.inverse_scale[j] - tile.offset[j] * scale;
      keep_best(dots[j], float(base), float(scale), int32_t(block * kBlockRows), out.score + lane,
                out.position + lane);
    }
  }
}

constexpr Kernels kKernels{Dots::tile, Dots::scratch_bytes, scan,  sample, collect,
                           products,   fine,                score, direct};
