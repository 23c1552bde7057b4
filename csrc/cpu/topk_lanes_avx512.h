// Eight fp64 lanes in one register, and the comparison of dots, for AVX-512.
struct Lanes {
  static constexpr int kDirectQueries = 4;
  __m512d v;

  static Lanes zero() { return {_mm512_setzero_pd()}; }
  static Lanes load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Lanes widen(const double* p) { return load(p); }
  static Lanes widen(const int16_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_pd(_mm256_cvtepi16_epi32(x))};
  }
  static Lanes widen(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static Lanes widen(const Bf16* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)))};
  }
  static Lanes widen(const Half* p) {
    return {_mm512_cvtps_pd(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static Lanes fma(const Lanes& a, const Lanes& b, const Lanes& sum) {
    return {_mm512_fmadd_pd(a.v, b.v, sum.v)};
  }
  double total() const {
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
    const __m128d two =
        _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

inline uint32_t reach(const int32_t* dots, int32_t need) {
  const __m512i least = _mm512_set1_epi32(need);
  return uint32_t(_mm512_cmpge_epi32_mask(_mm512_load_si512(dots), least)) |
         uint32_t(_mm512_cmpge_epi32_mask(_mm512_load_si512(dots + 16), least)) << 16;
}

inline bool subtile_thresholds(const BlockBound& bound, const Tile& tile, const double* shift, int j,
                               int32_t* need) {
  const __m512d scale = _mm512_set1_pd(bound.inverse_scale), error_b = _mm512_set1_pd(bound.error),
                norm_b = _mm512_set1_pd(bound.norm), rounding = _mm512_set1_pd(kRounding);
  const __m512d norm = _mm512_load_pd(tile.norm + j), error = _mm512_load_pd(tile.error + j);
  __m512d t = _mm512_sub_pd(_mm512_load_pd(tile.threshold + j), _mm512_load_pd(shift + j));
  t = _mm512_mul_pd(t, _mm512_load_pd(tile.inverse_scale + j));
  t = _mm512_fmsub_pd(t, scale, rounding);
  t = _mm512_fnmadd_pd(norm, error_b, t);
  t = _mm512_fnmadd_pd(error, norm_b, t);
  const __mmask8 unreachable =
      _mm512_cmp_pd_mask(_mm512_mul_pd(norm, _mm512_add_pd(norm_b, error_b)), t, _CMP_LT_OQ);
  t = _mm512_add_pd(t, _mm512_load_pd(tile.offset + j));
  t = _mm512_max_pd(t, _mm512_set1_pd(-2147483648.0));  // NaN becomes the second operand
  t = _mm512_min_pd(t, _mm512_set1_pd(2147483647.0));
  // Towards zero: at most the ceiling.
  _mm256_store_si256(reinterpret_cast<__m256i*>(need), _mm512_cvttpd_epi32(t));
  return unreachable != 0xff;
}
