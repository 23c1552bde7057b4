// Intel AMX: 16 queries x 16 rows x 64 dimensions in one instruction. A block of codes is already
// laid out as two right-hand tiles side by side; the left-hand tile is rows of query codes.
#include <immintrin.h>

#include "cpu/topk_kernels.h"

namespace deeprec::topk {
namespace {

#include "cpu/topk_items.h"
#include "cpu/topk_lanes_avx512.h"
#include "cpu/topk_reached.h"
#include "cpu/topk_unit_vnni.h"

namespace vnni {
#include "cpu/topk_dots.h"
}

// Fewer queries than this leave most of a tile empty: a row of it costs as much as a full one.
constexpr int kSmallestTile = 5;

struct Dots {
  static int tile(int64_t) { return 32; }
  static int64_t scratch_bytes(int64_t) { return 0; }
  static void pack(const Table&, Tile&) {}

  class Session {
   public:
    Session(const Table& table, const Tile& tile)
        : few_(table, tile), tile_(tile), quads_(table.quads), steps_(table.steps),
          depth_(table.quads / table.steps) {
      if (tile.count < kSmallestTile) return;
      Config config{};
      config.palette = 1;
      for (int t = 0; t < 8; ++t) {
        const bool queries = t == 4 || t == 5;
        config.rows[t] = uint8_t(t < 6 ? 16 : depth_);
        config.bytes[t] = uint16_t(queries ? depth_ * 4 : 64);
      }
      // GCC 12 thinks that the next line reads eight bytes, and would drop the other stores.
      asm volatile("" : : "r"(&config) : "memory");
      _tile_loadconfig(&config);
    }
    ~Session() {
      if (tile_.count >= kSmallestTile) _tile_release();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    void block(const uint8_t* codes, int32_t (*dots)[kBlockRows]) const {
      if (tile_.count < kSmallestTile) return few_.block(codes, dots);
      const int row_bytes = kBlockRows * sizeof(int32_t);
      if (tile_.count <= 16) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t s = 0; s < steps_; ++s) {
          load_step(codes, s);
          _tile_dpbsud(0, 4, 6);
          _tile_dpbsud(1, 4, 7);
        }
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t s = 0; s < steps_; ++s) {
          load_step(codes, s);
          _tile_loadd(5, tile_.codes + 16 * quads_ * 4 + s * depth_ * 4, quads_ * 4);
          _tile_dpbsud(0, 4, 6);
          _tile_dpbsud(1, 4, 7);
          _tile_dpbsud(2, 5, 6);
          _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(2, dots[16], row_bytes);
        _tile_stored(3, dots[16] + 16, row_bytes);
      }
      _tile_stored(0, dots[0], row_bytes);
      _tile_stored(1, dots[0] + 16, row_bytes);
    }

    uint64_t reach(const uint8_t* codes, uint64_t live, const int32_t* need,
                   int32_t (*dots)[kBlockRows], uint32_t* rows) const {
      if (tile_.count < kSmallestTile) return few_.reach(codes, live, need, dots, rows);
      block(codes, dots);
      return reached_by(tile_, need, dots, rows);
    }

   private:
    struct alignas(64) Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    };

    void load_step(const uint8_t* codes, int64_t s) const {
      _tile_loadd(4, tile_.codes + s * depth_ * 4, quads_ * 4);
      const uint8_t* step = codes + s * depth_ * kBlockRows * 4;
      _tile_loadd(6, step, kBlockRows * 4);
      _tile_loadd(7, step + 64, kBlockRows * 4);
    }

    vnni::Dots::Session few_;
    const Tile& tile_;
    const int64_t quads_, steps_, depth_;
  };
};

#include "cpu/topk_body.h"

}  // namespace

const Kernels* amx_kernels() { return &kKernels; }

}  // namespace deeprec::topk
