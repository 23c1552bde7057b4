// Dot products of codes in registers, for any vector width; Unit, defined before, supplies
//   Vector, kRows       a register of int32 sums and how many rows it covers
//   kVectors, kQueries  registers of rows and queries held at once
//   kScratch            bytes per dimension and query of its own form of the query codes
//   Items items(codes)  the codes of kRows rows, four dimensions each
//   Query query(tile, quads, j, quad), add(sum, items, query), zero(), store()
//   Below               which sums are all below their thresholds: add(sum, need), all()
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
      for (int j = 0; j < tile.count; j += kSubtile) subtile(codes, j, nullptr, dots);
    }

    uint64_t reach(const uint8_t* codes, uint64_t live, const int32_t* need,
                   int32_t (*dots)[kBlockRows]) const {
      uint64_t reached = 0;
      for (; live; live &= live - 1)
        reached |= subtile(codes, __builtin_ctzll(live) * kSubtile, need, dots);
      return reached;
    }

    uint64_t subtile(const uint8_t* codes, int j, const int32_t* need,
                     int32_t (*dots)[kBlockRows]) const {
      const int end = tile.count < j + kSubtile ? tile.count : j + kSubtile;
      uint64_t reached = 0;
      for (; j + Unit::kQueries <= end; j += Unit::kQueries)
        reached |= rows<Unit::kQueries>(codes, j, need, dots);
      if constexpr (Unit::kQueries > 4)
        for (; j + 4 <= end; j += 4) reached |= rows<4>(codes, j, need, dots);
      for (; j + 2 <= end; j += 2) reached |= rows<2>(codes, j, need, dots);
      for (; j < end; ++j) reached |= rows<1>(codes, j, need, dots);
      return reached;
    }

    // Returns which queries had their dots stored: without thresholds all, with them all of these
    // or none. Unrolled by pragma: the sums must be registers, and the compiler alone leaves some
    // in memory.
    template <int kQueries>
    [[gnu::noinline]] uint64_t rows(const uint8_t* codes, int j, const int32_t* need,
                  int32_t (*dots)[kBlockRows]) const {
      constexpr int kVectors = Unit::kVectors;
      const uint64_t these = ((uint64_t(1) << kQueries) - 1) << j;
      const int64_t quads = table.quads;
      uint64_t reached = 0;
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
          typename Unit::Below below[kVectors];  // independent chains
#pragma GCC unroll 8
          for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) below[v].add(sum[q][v], need[j + q]);
          }
          bool none = true;
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) none &= below[v].all();
          // A block of several passes stores all of them, or its rows would be of another block.
          if (none && kVectors * Unit::kRows == kBlockRows) continue;
          if (!none) reached = these;
        } else {
          reached = these;
        }
#pragma GCC unroll 8
        for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v)
            Unit::store(dots[j + q] + r + v * Unit::kRows, sum[q][v]);
        }
      }
      return reached;
    }
  };
};
