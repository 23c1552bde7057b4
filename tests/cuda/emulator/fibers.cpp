#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATOR_FINDS_RACES)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#error "the emulator switches fibers in x86-64 assembly"
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // AddressSanitizer's frames are large
constexpr size_t kGuardBytes = 4096;

Block* current_block = nullptr;

// Saves the callee-saved registers of the System V ABI on this stack and loads those of another.
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
#endif
#if defined(EMULATOR_FINDS_RACES)
void* scheduler_fiber = nullptr;
#endif

void to_scheduler(bool dying = false) {
  Block& b = block();
  Thread& t = *b.current;
  (void)dying;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(dying ? nullptr : &t.fake_stack, scheduler_bottom,
                                 scheduler_size);
#endif
#if defined(EMULATOR_FINDS_RACES)
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stack(&t.stack_pointer, b.scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t.fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

void to_thread(Block& b, Thread& t) {
  b.current = &t;
#if defined(__SANITIZE_ADDRESS__)
  void* fake;
  __sanitizer_start_switch_fiber(&fake, t.stack, kStackBytes);
#endif
#if defined(EMULATOR_FINDS_RACES)
  __tsan_switch_to_fiber(t.fiber, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stack(&b.scheduler_stack, t.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  order_acquire(block().barriers[0].order + 1);  // shared memory was filled before
  (*block().body)();
  Thread& t = thread();
  if (!t.copies.empty()) fail("ends with cp.async in flight");
  t.done = true;
  --block().alive;
  order_release(block().barriers[0].order);  // what follows the launch follows its threads
  to_scheduler(true);
  std::abort();
}

// Stacks live as long as the process: a launch needs them again at once.
char* stack_of(int rank) {
  static char* pool = [] {
    const size_t bytes = (kStackBytes + kGuardBytes) * kMaxThreads;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for stacks");
    return static_cast<char*>(memory);
  }();
  static int guarded = 0;
  for (; guarded <= rank; ++guarded)
    mprotect(pool + size_t(guarded) * (kStackBytes + kGuardBytes), kGuardBytes, PROT_NONE);
  return pool + size_t(rank) * (kStackBytes + kGuardBytes) + kGuardBytes;
}

void start(Thread& t) {
  t.done = false;
  t.gate = nullptr;
  t.copies.clear();
  t.copy_group = 0;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(t.stack, kStackBytes);  // a failed launch never unwound
#endif
  // Staggered: equal offsets on every stack would fight for the same cache sets.
  void** top = reinterpret_cast<void**>(t.stack + kStackBytes - (t.rank % 61) * 320);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.stack_pointer = top;
}

class Turns {
 public:
  explicit Turns(int64_t count, uint64_t seed) : order_(size_t(count)), state_(seed * 2 + 1) {
    for (int64_t i = 0; i < count; ++i)
      order_[size_t(i)] = schedule().order == Order::reverse ? count - 1 - i : i;
    next_round();
  }
  void next_round() {
    if (schedule().order != Order::shuffled) return;
    for (size_t i = order_.size(); i > 1; --i) {
      state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;  // Knuth's MMIX
      std::swap(order_[i - 1], order_[(state_ >> 33) % i]);
    }
  }
  const std::vector<int64_t>& order() const { return order_; }

 private:
  std::vector<int64_t> order_;
  uint64_t state_;
};

std::string who(const Block& b) {
  return "block (" + std::to_string(b.index.x) + ", " + std::to_string(b.index.y) + ", " +
         std::to_string(b.index.z) + ")";
}

std::string deadlock(const Block& b) {
  std::string report = who(b) + ": deadlock;";
  int listed = 0;
  for (const Thread& t : b.all) {
    if (t.done) continue;
    if (++listed > 6) return report + " …";
    report += " thread " + std::to_string(t.rank) + " waits for " + t.what + " at " +
              describe(t.site) + ";";
  }
  return report;
}

void run_block(Block& b, Turns& turns) {
  std::memset(b.smem, 0xff, size_t(b.smem_bytes));
  b.alive = b.threads;
  for (Collective& c : b.collectives) c.arrived = 0;
  for (Barrier& r : b.barriers) r.arrived = 0;
  order_release(b.barriers[0].order + 1);
  for (Thread& t : b.all) start(t);
  for (;; turns.next_round()) {
    bool left = false, moved = false;
    for (int64_t rank : turns.order()) {
      Thread& t = b.all[size_t(rank)];
      if (t.done) continue;
      left = true;
      if (t.gate && *t.gate == t.ticket) continue;
      moved = true;
      to_thread(b, t);
      if (!b.error.empty()) throw Error(b.error);
    }
    if (!left) break;
    if (!moved) throw Error(deadlock(b));
  }
  order_acquire(b.barriers[0].order);
}

}  // namespace

bool same_place(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

Schedule& schedule() {
  static Schedule value;
  return value;
}

Block& block() {
  if (!current_block) throw Error("device code called outside a launch");
  return *current_block;
}

void fail(const std::string& message) {
  Block& b = block();
  if (b.error.empty())
    b.error = who(b) + " thread " + std::to_string(thread().rank) + ": " + message;
  thread().done = true;
  for (;;) to_scheduler();  // never resumed: the scheduler throws
}

void wait_while(const unsigned* gate, unsigned ticket, const char* what, const Site& site) {
  Thread& t = thread();
  t.gate = gate;
  t.ticket = ticket;
  t.what = what;
  t.site = site;
  while (*gate == ticket) to_scheduler();
  t.gate = nullptr;
}

namespace {
void land(const AsyncCopy& copy) {
  std::memcpy(copy.to, copy.from, size_t(copy.valid));
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, size_t(copy.bytes - copy.valid));
}
}  // namespace

void start_copy(AsyncCopy copy) {
  Thread& t = thread();
  copy.group = t.copy_group;
  t.copies.push_back(copy);
  if (schedule().eager_copies) land(copy);
}

void finish_copies(int pending) {
  Thread& t = thread();
  const int last = t.copy_group - pending;
  auto copy = t.copies.begin();
  for (; copy != t.copies.end() && copy->group < last; ++copy)
    if (!schedule().eager_copies) land(*copy);
  t.copies.erase(t.copies.begin(), copy);
}

void barrier(int id, int count, const Site& site) {
  Block& b = block();
  if (id < 0 || id >= kBarriers) fail("barrier id out of range at " + describe(site));
  Barrier& r = b.barriers[id];
  if (count == 0) {
    count = b.threads;
    if (b.alive != b.threads)
      fail("waits at " + describe(site) + " for a thread that has ended (early return)");
  }
  if (r.arrived && !same_place(r.site, site))
    fail("divergent barrier " + std::to_string(id) + ": threads wait at " + describe(r.site) +
         " and at " + describe(site));
  r.site = site;
  const unsigned generation = r.generation;
  char* order = &r.order[generation & 1];
  order_release(order);
  if (++r.arrived == count) {
    r.arrived = 0;
    ++r.generation;
  } else {
    wait_while(&r.generation, generation, "a barrier", site);
  }
  order_acquire(order);
}

void run(const char* name, dim3 grid, dim3 size, int smem, const std::function<void()>& body) {
  const int64_t threads = int64_t(size.x) * size.y * size.z;
  if (threads < 1 || threads > kMaxThreads)
    throw Error(std::string(name) + ": a block of " + std::to_string(threads) + " threads");
  if (smem < 0 || smem > kMaxSmem)
    throw Error(std::string(name) + ": " + std::to_string(smem) + " bytes of shared memory");
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
    throw Error(std::string(name) + ": grid too large");

  Block b{};
  b.size = size;
  b.grid = grid;
  b.threads = int(threads);
  b.smem_bytes = smem;
  b.body = &body;
  b.all.resize(size_t(threads));
  b.collectives.resize(size_t((threads + 31) / 32 * 32));
  // From malloc, so that AddressSanitizer guards its ends; at least one byte to be guarded.
  std::unique_ptr<unsigned char, decltype(&std::free)> memory(
      static_cast<unsigned char*>(std::aligned_alloc(128, size_t(smem + 128) / 128 * 128)),
      &std::free);
  b.smem = memory.get();
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(b.smem + smem, size_t(smem + 128) / 128 * 128 - size_t(smem));
#endif
#if defined(EMULATOR_FINDS_RACES)
  scheduler_fiber = __tsan_get_current_fiber();
#endif
  for (int rank = 0; rank < b.threads; ++rank) {
    Thread& t = b.all[size_t(rank)];
    t.rank = rank;
    t.lane = rank % 32;
    t.warp = rank / 32;
    t.index = {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
    t.stack = stack_of(rank);
#if defined(EMULATOR_FINDS_RACES)
    t.fiber = __tsan_create_fiber(0);
#endif
  }
  current_block = &b;
  std::string error;
  try {
    const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
    Turns block_turns(blocks, schedule().seed), turns(threads, schedule().seed + 1);
    for (int64_t i : block_turns.order()) {
      const unsigned n = unsigned(i);
      b.index = {n % grid.x, n / grid.x % grid.y, n / (grid.x * grid.y)};
      run_block(b, turns);
    }
  } catch (const std::exception& problem) {
    error = std::string(name) + ": " + problem.what();
  }
  current_block = nullptr;
#if defined(EMULATOR_FINDS_RACES)
  for (Thread& t : b.all) __tsan_destroy_fiber(t.fiber);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(b.smem, size_t(smem + 128) / 128 * 128);
#endif
  if (!error.empty()) throw Error(error);
}

void order_release([[maybe_unused]] char* address) {
#if defined(EMULATOR_FINDS_RACES)
  __tsan_release(address);
#endif
}

void order_acquire([[maybe_unused]] char* address) {
#if defined(EMULATOR_FINDS_RACES)
  __tsan_acquire(address);
#endif
}

}  // namespace emulator
