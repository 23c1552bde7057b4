// Eight fp64 lanes in two registers, and the comparison of dots, for AVX2.
struct Lanes {
  static constexpr int kDirectQueries = 1;
  __m256d low, high;

  static Lanes zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Lanes load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
  static Lanes of_floats(__m256 x) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)),
            _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
  }
  static Lanes widen(const float* p) { return of_floats(_mm256_loadu_ps(p)); }
  static Lanes widen(const double* p) { return load(p); }
  static Lanes widen(const int16_t* p) {
    const __m256i x =
        _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_cvtepi32_pd(_mm256_castsi256_si128(x)),
            _mm256_cvtepi32_pd(_mm256_extracti128_si256(x, 1))};
  }
  static Lanes widen(const Bf16* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return of_floats(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)));
  }
  static Lanes widen(const Half* p) {
    return of_floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Lanes fma(const Lanes& a, const Lanes& b, const Lanes& sum) {
    return {_mm256_fmadd_pd(a.low, b.low, sum.low), _mm256_fmadd_pd(a.high, b.high, sum.high)};
  }
  double total() const {
    const __m256d four = _mm256_add_pd(low, high);
    const __m128d two =
        _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

inline uint32_t reach8(const int32_t* dots, __m256i need) {
  const __m256i below =
      _mm256_cmpgt_epi32(need, _mm256_load_si256(reinterpret_cast<const __m256i*>(dots)));
  return ~uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(below))) & 0xff;
}

inline uint32_t reach(const int32_t* dots, int32_t need) {
  const __m256i least = _mm256_set1_epi32(need);
  return reach8(dots, least) | reach8(dots + 8, least) << 8 | reach8(dots + 16, least) << 16 |
         reach8(dots + 24, least) << 24;
}

inline bool subtile_thresholds(const BlockBound& bound, const Tile& tile, const double* shift,
                               int first, int32_t* need) {
  const __m256d scale = _mm256_set1_pd(bound.inverse_scale), error_b = _mm256_set1_pd(bound.error),
                norm_b = _mm256_set1_pd(bound.norm), rounding = _mm256_set1_pd(kRounding);
  int unreachable = 0xf;
  for (int j = first; j < first + kSubtile; j += 4) {
    const __m256d norm = _mm256_load_pd(tile.norm + j), error = _mm256_load_pd(tile.error + j);
    __m256d t = _mm256_sub_pd(_mm256_load_pd(tile.threshold + j), _mm256_load_pd(shift + j));
    t = _mm256_mul_pd(t, _mm256_load_pd(tile.inverse_scale + j));
    t = _mm256_fmsub_pd(t, scale, rounding);
    t = _mm256_fnmadd_pd(norm, error_b, t);
    t = _mm256_fnmadd_pd(error, norm_b, t);
    unreachable &= _mm256_movemask_pd(
        _mm256_cmp_pd(_mm256_mul_pd(norm, _mm256_add_pd(norm_b, error_b)), t, _CMP_LT_OQ));
    t = _mm256_add_pd(t, _mm256_load_pd(tile.offset + j));
    t = _mm256_max_pd(t, _mm256_set1_pd(-2147483648.0));  // NaN becomes the second operand
    t = _mm256_min_pd(t, _mm256_set1_pd(2147483647.0));
    // Towards zero: at most the ceiling.
    _mm_store_si128(reinterpret_cast<__m128i*>(need + j - first), _mm256_cvttpd_epi32(t));
  }
  return unreachable != 0xf;
}
