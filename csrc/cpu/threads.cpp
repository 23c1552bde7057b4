#include "cpu/threads.h"

#include <pthread.h>

namespace deeprec {
namespace {

bool g_forked = false;
const int g_at_fork = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

}  // namespace

int usable_threads(int asked) { return g_forked || asked < 1 ? 1 : asked; }

}  // namespace deeprec
