// Four byte products a lane in one AVX-512 VNNI instruction.
struct Unit {
  using Vector = __m512i;
  using Items = __m512i;
  using Query = __m512i;
  static constexpr int kRows = 16, kVectors = 2, kQueries = 8, kScratch = 0;

  static void pack(int64_t, Tile&) {}
  static Vector zero() { return _mm512_setzero_si512(); }
  static Items items(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Query query(const Tile& tile, int64_t quads, int j, int64_t quad) {
    int32_t codes;
    __builtin_memcpy(&codes, tile.codes + (j * quads + quad) * 4, sizeof codes);
    return _mm512_set1_epi32(codes);
  }
  static Vector add(Vector sum, Items x, Query q) { return _mm512_dpbusd_epi32(sum, x, q); }
  static void store(int32_t* p, Vector x) { _mm512_store_si512(p, x); }
};
