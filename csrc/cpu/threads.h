// How many threads may work.
#pragma once

namespace deeprec {

// `asked`, at least one; one in a child of fork(), which has none of its parent's OpenMP threads and
// would wait for them forever.
int usable_threads(int asked);

}  // namespace deeprec
