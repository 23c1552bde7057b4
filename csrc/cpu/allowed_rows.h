#pragma once

#include <cstdint>

namespace deeprec {

// Permitted ids of every row, ascending within a row; an empty row is unrestricted, and
// offsets == nullptr means that all rows are.
struct AllowedRows {
  const int64_t* offsets = nullptr;
  const int64_t* ids = nullptr;

  bool restricts(int64_t row) const { return offsets && offsets[row] < offsets[row + 1]; }
};

}  // namespace deeprec
