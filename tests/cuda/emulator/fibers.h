// The emulated GPU: one fiber a thread, one block after another.
//
// A fiber runs until it waits (barrier, warp collective, end); the schedule decides who goes on.
// Shared memory starts poisoned with 0xFF (a NaN, or -1). Every error names block, thread, file
// and line, and ends the launch with an exception.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where in the kernel's source a thread waits.
struct Site {
  const char* file;
  int line;
};
bool same_place(const Site& a, const Site& b);
std::string describe(const Site& site);

// In which order threads and blocks run, and when asynchronous copies land. Correct kernels give
// the same result under all of them.
enum class Order { forward, reverse, shuffled };
struct Schedule {
  Order order = Order::forward;
  uint64_t seed = 1;          // of a shuffled order: another one in every round
  bool eager_copies = false;  // cp.async lands when issued (finds rings too short), not when waited
                              // for (finds missing waits)
};
Schedule& schedule();

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, valid;  // of `bytes` written, `valid` are read and the rest is zero
  int group;
};

struct Thread {
  uint3 index;
  int rank, lane, warp;
  bool done;
  const unsigned* gate;  // waits while *gate == ticket; null: can run
  unsigned ticket;
  const char* what;  // it waits for
  Site site;
  std::vector<AsyncCopy> copies;
  int copy_group;
  void* stack_pointer;
  char* stack;
  void* fake_stack;  // AddressSanitizer's
  void* fiber;       // ThreadSanitizer's
};

struct Barrier {
  unsigned generation = 0;
  int arrived = 0;
  Site site{};
  char order[2];  // addresses for ThreadSanitizer, by generation
};

// A warp collective in progress, by the lowest lane of its mask.
struct Collective {
  unsigned mask = 0, arrived = 0, generation = 0;
  const char* what = nullptr;
  Site site{};
  alignas(16) unsigned char in[32][64], out[32][64];
  char order[2];
};

constexpr int kBarriers = 16, kMaxThreads = 1024, kMaxSmem = 227 << 10;

struct Block {
  uint3 index;
  dim3 size, grid;
  int threads, alive;
  unsigned char* smem;
  int smem_bytes;
  std::vector<Thread> all;
  std::vector<Collective> collectives;
  Barrier barriers[kBarriers];
  Thread* current;
  void* scheduler_stack;
  const std::function<void()>* body;
  std::string error;
};

Block& block();
inline Thread& thread() { return *block().current; }

// Ends the launch with this message; called on a fiber.
[[noreturn]] void fail(const std::string& message);
void wait_while(const unsigned* gate, unsigned ticket, const char* what, const Site& site);
// Asynchronous copies: read and written when issued or when waited for, as the schedule says.
void start_copy(AsyncCopy copy);
void finish_copies(int pending);
// `count` 0: every thread of the block.
void barrier(int id, int count, const Site& site);
void run(const char* name, dim3 grid, dim3 size, int smem, const std::function<void()>& body);

// What ThreadSanitizer has to know of barriers; nothing without it.
void order_release(char* address);
void order_acquire(char* address);

}  // namespace emulator
