// Dot products of codes in registers, for any vector width; Unit, defined before, supplies
//   Vector, kRows       a register of int32 sums and how many rows it covers
//   kQueries            queries held in registers at once
//   kScratch            bytes per dimension and query of its own form of the query codes
//   Items items(codes)  the codes of kRows rows, four dimensions each
//   Query query(tile, quads, j, quad), add(sum, items, query), zero(), store()
struct Dots {
  static constexpr int kTile = 8;
  static int64_t scratch_bytes(int64_t quads) { return kMaxTile * quads * 4 * Unit::kScratch; }
  static void pack(const Table& table, Tile& tile) { Unit::pack(table.quads, tile); }

  struct Session {
    Session(const Table& t, const Tile& q) : table(t), tile(q) {}
    const Table& table;
    const Tile& tile;

    void group(const uint8_t* codes, int32_t (*dots)[kGroupRows]) const {
      int j = 0;
      const int n = tile.count;
      for (; j + Unit::kQueries <= n; j += Unit::kQueries) rows<Unit::kQueries>(codes, j, dots);
      if constexpr (Unit::kQueries > 4)
        for (; j + 4 <= n; j += 4) rows<4>(codes, j, dots);
      for (; j + 2 <= n; j += 2) rows<2>(codes, j, dots);
      for (; j < n; ++j) rows<1>(codes, j, dots);
    }

    // Unrolled by pragma: the sums must be registers, and the compiler alone leaves some in memory.
    template <int kQueries>
    void rows(const uint8_t* codes, int j, int32_t (*dots)[kGroupRows]) const {
      constexpr int kVectors = Unit::kVectors;
      const int64_t quads = table.quads;
      for (int64_t r = 0; r < kGroupRows; r += kVectors * Unit::kRows) {
        const uint8_t* from[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const int64_t row = r + v * Unit::kRows;
          from[v] = codes + (row / kBlockRows) * quads * 64 + (row % kBlockRows) * 4;
        }
        typename Unit::Vector sum[kQueries][kVectors];
#pragma GCC unroll 8
        for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sum[q][v] = Unit::zero();
        }
        for (int64_t d = 0; d < quads; ++d) {
          typename Unit::Items items[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) items[v] = Unit::items(from[v] + d * 64);
#pragma GCC unroll 8
          for (int q = 0; q < kQueries; ++q) {
            const typename Unit::Query query = Unit::query(tile, quads, j + q, d);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[q][v] = Unit::add(sum[q][v], items[v], query);
          }
        }
#pragma GCC unroll 8
        for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v)
            Unit::store(dots[j + q] + r + v * Unit::kRows, sum[q][v]);
        }
      }
    }
  };
};
