// Which of a block's dots reach need, when all of them are in memory already: what a Session's
// reach() returns.
inline uint64_t reached_by(const Tile& tile, const int32_t* need, const int32_t (*dots)[kBlockRows],
                           uint32_t* rows) {
  uint64_t reached = 0;
  for (int j = 0; j < tile.count; ++j) {
    rows[j] = reach(dots[j], need[j]);
    reached |= uint64_t(rows[j] != 0) << j;
  }
  return reached;
}
