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
  // Written out because GCC 12 copies the sum to another register and back.
  static Vector add(Vector sum, Items x, Query q) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(q));
    return sum;
  }
  static uint32_t reach(Vector sum, int32_t need) {
    return _mm512_cmpge_epi32_mask(sum, _mm512_set1_epi32(need));
  }
  static void store(int32_t* p, Vector x) { _mm512_store_si512(p, x); }
};
