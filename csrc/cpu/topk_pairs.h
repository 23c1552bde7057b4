// Without a four-way byte product, codes are multiplied as 16-bit pairs: even dimensions of a
// quad against (q0, q2), odd ones against (q1, q3). 255 * 127 * 2 stays far inside int32.
inline void pack_pairs(int64_t quads, Tile& tile) {
  int16_t* out = static_cast<int16_t*>(tile.scratch);
  for (int64_t j = 0; j < tile.count; ++j) {
    for (int64_t d = 0; d < quads; ++d) {
      const int8_t* q = tile.codes + (j * quads + d) * 4;
      int16_t* pair = out + (j * quads + d) * 4;
      pair[0] = q[0];
      pair[1] = q[2];
      pair[2] = q[1];
      pair[3] = q[3];
    }
  }
}

inline const int32_t* pairs_of(const Tile& tile, int64_t quads, int j, int64_t quad) {
  return static_cast<const int32_t*>(tile.scratch) + (j * quads + quad) * 2;
}
