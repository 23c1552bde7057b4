#include "cpu/topk_kernels.h"

namespace deeprec::topk {
namespace {

#include "cpu/topk_items.h"

struct Lanes {
  static constexpr int kDirectQueries = 1;
  double v[8];

  static Lanes zero() { return Lanes{}; }
  static Lanes load(const double* p) {
    Lanes x;
    for (int j = 0; j < 8; ++j) x.v[j] = p[j];
    return x;
  }
  static Lanes widen(const double* p) { return load(p); }
  static Lanes widen(const int16_t* p) {
    Lanes x;
    for (int j = 0; j < 8; ++j) x.v[j] = p[j];
    return x;
  }
  template <class T>
  static Lanes widen(const T* p) {
    Lanes x;
    for (int j = 0; j < 8; ++j) x.v[j] = double(to_float(p[j]));
    return x;
  }
  static Lanes fma(const Lanes& a, const Lanes& b, const Lanes& sum) {
    Lanes x;
    for (int j = 0; j < 8; ++j) x.v[j] = sum.v[j] + a.v[j] * b.v[j];
    return x;
  }
  double total() const {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
};

inline uint32_t reach(const int32_t* dots, int32_t need) {
  uint32_t mask = 0;
  for (int r = 0; r < int(kBlockRows); ++r) mask |= uint32_t(dots[r] >= need) << r;
  return mask;
}

#include "cpu/topk_reached.h"

struct Dots {
  static int tile(int64_t) { return kSubtile; }
  static int64_t scratch_bytes(int64_t) { return 0; }
  static void pack(const Table&, Tile&) {}

  struct Session {
    Session(const Table& t, const Tile& q) : table(t), tile(q) {}
    const Table& table;
    const Tile& tile;

    void block(const uint8_t* codes, int32_t (*dots)[kBlockRows]) const {
      for (int j = 0; j < tile.count; ++j) {
        const int8_t* query = tile.codes + j * table.quads * 4;
        for (int64_t r = 0; r < kBlockRows; ++r) {
          const uint8_t* row = codes + r * 4;
          int32_t sum = 0;
          for (int64_t d = 0; d < table.quads; ++d)
            for (int i = 0; i < 4; ++i)
              sum += int32_t(row[d * kBlockRows * 4 + i]) * query[d * 4 + i];
          dots[j][r] = sum;
        }
      }
    }

    uint64_t reach(const uint8_t* codes, uint64_t, const int32_t* need,
                   int32_t (*dots)[kBlockRows], uint32_t* rows) const {
      block(codes, dots);
      return reached_by(tile, need, dots, rows);
    }
  };
};

inline bool subtile_thresholds(const BlockBound& bound, const Tile& tile, const double* shift,
                               int first, int32_t* need) {
  const double scale = bound.inverse_scale, error_b = bound.error, norm_b = bound.norm;
  bool reachable = false;
  for (int j = first; j < first + kSubtile; ++j) {
    const double t = (tile.threshold[j] - shift[j]) * tile.inverse_scale[j] * scale -
                     tile.norm[j] * error_b - tile.error[j] * norm_b - kRounding;
    reachable |= !(tile.norm[j] * (norm_b + error_b) < t);
    const double dot = t + tile.offset[j];
    // Towards zero: at most the ceiling.
    need[j - first] = !(dot > -2147483648.0) ? INT32_MIN
                      : dot < 2147483647.0   ? int32_t(dot)
                                             : INT32_MAX;
  }
  return reachable;
}

#include "cpu/topk_body.h"

}  // namespace

const Kernels* scalar_kernels() { return &kKernels; }

}  // namespace deeprec::topk
