// Warp collectives: all lanes of the mask must arrive at the same call before any goes on.
#pragma once

#include <cstring>
#include <type_traits>

#include "fibers.h"

namespace emulator {

template <class T>
T& at(unsigned char* memory) {
  return *reinterpret_cast<T*>(memory);
}

template <class Visit>
void each_lane(unsigned mask, Visit visit) {
  for (; mask; mask &= mask - 1) visit(__builtin_ctz(mask));
}

using Lanes = unsigned char (&)[32][64];

// Exchanges `in` among the lanes of `mask`: the last to arrive runs combine(in[32], out[32]).
template <class Out, class In, class Combine>
Out collective(unsigned mask, const char* what, const Site& site, const In& in, Combine combine,
               bool orders_memory = false) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
  static_assert(std::is_trivially_copyable_v<In> && std::is_trivially_copyable_v<Out>);
  Thread& me = thread();
  const unsigned bit = 1u << me.lane;
  if (!(mask & bit))
    fail(std::string(what) + " at " + describe(site) + ": the caller is not in its own mask");
  Collective& c = block().collectives[size_t(me.warp * 32 + __builtin_ctz(mask))];
  if (!c.arrived) {
    c.mask = mask;
    c.what = what;
    c.site = site;
  } else if (c.mask != mask || std::strcmp(c.what, what) != 0 || !same_place(c.site, site)) {
    fail(std::string("divergent warp: ") + what + " at " + describe(site) + " meets " + c.what +
         " at " + describe(c.site));
  }
  std::memcpy(c.in[me.lane], &in, sizeof(In));
  c.arrived |= bit;
  const unsigned generation = c.generation;
  char* order = &c.order[generation & 1];
  if (orders_memory) order_release(order);
  if (c.arrived == mask) {
    combine(c.in, c.out);
    c.arrived = 0;
    ++c.generation;
  } else {
    wait_while(&c.generation, generation, what, site);
  }
  if (orders_memory) order_acquire(order);
  Out out;
  std::memcpy(&out, c.out[me.lane], sizeof(Out));
  return out;
}

// ---- shuffles and votes ----

// What a lane reads, given its own lane and the segment [base, base + width) it is in.
template <class T, class Source>
T shuffle(const char* what, unsigned mask, T value, int width, const Site& site, Source source) {
  struct Part {
    T value;
    int source;
  };
  const int lane = thread().lane, base = lane & ~(width - 1);
  const int from = source(lane, base);
  if (!(mask >> from & 1))
    fail(std::string(what) + " at " + describe(site) + ": reads a lane outside the mask");
  return collective<T>(mask, what, site, Part{value, from}, [mask](Lanes in, Lanes out) {
    each_lane(mask, [&](int l) { at<T>(out[l]) = at<Part>(in[at<Part>(in[l]).source]).value; });
  });
}

inline unsigned ballot(const char* what, unsigned mask, bool predicate, const Site& site,
                       bool orders_memory = false) {
  return collective<unsigned>(
      mask, what, site, predicate,
      [mask](Lanes in, Lanes out) {
        unsigned votes = 0;
        each_lane(mask, [&](int l) { votes |= unsigned(at<bool>(in[l])) << l; });
        each_lane(mask, [&](int l) { at<unsigned>(out[l]) = votes; });
      },
      orders_memory);
}

// A reduction over the lanes of the mask (redux.sync).
template <class T, class Combine>
T reduce(const char* what, unsigned mask, T value, const Site& site, Combine combine) {
  return collective<T>(mask, what, site, value, [&](Lanes in, Lanes out) {
    T total = at<T>(in[__builtin_ctz(mask)]);
    each_lane(mask & (mask - 1), [&](int l) { total = combine(total, at<T>(in[l])); });
    each_lane(mask, [&](int l) { at<T>(out[l]) = total; });
  });
}

// ---- ldmatrix: matrix j, row r begins at the address of lane 8 j + r ----

struct Words {
  uint32_t word[4];
};

inline Words ldmatrix(const void* row, bool transposed, const Site& site) {
  const char* what = transposed ? "ldmatrix.x4.trans" : "ldmatrix.x4";
  if (reinterpret_cast<uintptr_t>(row) & 15)
    fail(std::string(what) + " at " + describe(site) + ": the row is not aligned to 16 bytes");
  return collective<Words>(~0u, what, site, row, [transposed](Lanes in, Lanes out) {
    const auto element = [&](int matrix, int r, int c) {
      return at<const uint16_t*>(in[matrix * 8 + r])[c];
    };
    for (int l = 0; l < 32; ++l)
      for (int j = 0; j < 4; ++j) {
        const int r = l / 4, c = l % 4 * 2;
        const uint32_t low = transposed ? element(j, c, r) : element(j, r, c);
        const uint32_t high = transposed ? element(j, c + 1, r) : element(j, r, c + 1);
        at<Words>(out[l]).word[j] = low | high << 16;
      }
  });
}

}  // namespace emulator
