// Dot products of codes in registers, for any vector width; Unit, defined before, supplies
//   Vector, kRows       a register of int32 sums and how many rows it covers
//   kVectors, kQueries  registers of rows and queries held at once
//   kScratch            bytes per dimension and query of its own form of the query codes
//   Items items(codes)  the codes of kRows rows, four dimensions each
//   Query query(tile, quads, j, quad), add(sum, items, query), zero(), store()
//   reach(sum, need)    which of the sums are at least need, as a bit mask
struct Dots {
  // The codes of a tile and of a block stay in the first-level cache (32 KB) while they meet:
  // fetching a block from the second level once for eight queries costs a sixth of the time.
  static constexpr int64_t kTileBytes = 12 << 10;
  static int tile(int64_t quads) {
    const int64_t subtiles = kTileBytes / (quads * 4 * kSubtile);
    return int(subtiles < 1 ? 1 : subtiles < kMaxTile / kSubtile ? subtiles
                                                                 : kMaxTile / kSubtile) * kSubtile;
  }
  static int64_t scratch_bytes(int64_t quads) { return kMaxTile * quads * 4 * Unit::kScratch; }
  static void pack(const Table& table, Tile& tile) { Unit::pack(table.quads, tile); }

  struct Session {
    Session(const Table& t, const Tile& q) : table(t), tile(q) {}
    const Table& table;
    const Tile& tile;

    void block(const uint8_t* codes, int32_t (*dots)[kBlockRows]) const {
      for (int j = 0; j < tile.count; j += kSubtile) subtile(codes, j, nullptr, dots, nullptr);
    }

    uint64_t reach(const uint8_t* codes, uint64_t live, const int32_t* need,
                   int32_t (*dots)[kBlockRows], uint32_t* reaching) const {
      uint64_t reached = 0;
      for (; live; live &= live - 1)
        reached |= subtile(codes, __builtin_ctzll(live) * kSubtile, need, dots, reaching);
      return reached;
    }

    uint64_t subtile(const uint8_t* codes, int j, const int32_t* need,
                     int32_t (*dots)[kBlockRows], uint32_t* reaching) const {
      const int end = tile.count < j + kSubtile ? tile.count : j + kSubtile;
      uint64_t reached = 0;
      for (; j + Unit::kQueries <= end; j += Unit::kQueries)
        reached |= rows<Unit::kQueries>(codes, j, need, dots, reaching);
      if constexpr (Unit::kQueries > 4)
        for (; j + 4 <= end; j += 4) reached |= rows<4>(codes, j, need, dots, reaching);
      for (; j + 2 <= end; j += 2) reached |= rows<2>(codes, j, need, dots, reaching);
      for (; j < end; ++j) reached |= rows<1>(codes, j, need, dots, reaching);
      return reached;
    }

    // Returns which queries have dots that reach need; without need, all dots are stored.
    // Unrolled by pragma: the sums must be registers, and the compiler alone leaves some
    // in memory.
    template <int kQueries>
    [[gnu::noinline]] uint64_t rows(const uint8_t* codes, int j, const int32_t* need,
                                    int32_t (*dots)[kBlockRows], uint32_t* reaching) const {
      constexpr int kVectors = Unit::kVectors;
      const int64_t quads = table.quads;
      uint32_t found[kQueries] = {};
      for (int64_t r = 0; r < kBlockRows; r += kVectors * Unit::kRows) {
        const uint8_t* from = codes + r * 4;
        typename Unit::Vector sum[kQueries][kVectors];
#pragma GCC unroll 8
        for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sum[q][v] = Unit::zero();
        }
        for (int64_t d = 0; d < quads; ++d, from += kBlockRows * 4) {
          typename Unit::Items items[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) items[v] = Unit::items(from + v * Unit::kRows * 4);
#pragma GCC unroll 8
          for (int q = 0; q < kQueries; ++q) {
            const typename Unit::Query query = Unit::query(tile, quads, j + q, d);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[q][v] = Unit::add(sum[q][v], items[v], query);
          }
        }
        if (need) {
          uint32_t any = 0;
#pragma GCC unroll 8
          for (int q = 0; q < kQueries; ++q) {
            uint32_t bits = 0;
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v)
              bits |= Unit::reach(sum[q][v], need[j + q]) << v * Unit::kRows;
            found[q] |= bits << r;
            any |= bits;
          }
          if (!any) continue;
        }
#pragma GCC unroll 8
        for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v)
            Unit::store(dots[j + q] + r + v * Unit::kRows, sum[q][v]);
        }
      }
      if (!need) return 0;
      uint64_t reached = 0;
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        reaching[j + q] = found[q];
        reached |= uint64_t(found[q] != 0) << q;
      }
      return reached << j;
    }
  };
};
