// What the launchers launched: for the evidence, which needs blocks, shared memory and arguments as
// they ship.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "fibers.h"

namespace emulator {

struct LaunchRecord {
  const void* kernel;
  dim3 grid, block;
  int smem;
  std::vector<std::string> arguments;  // the bytes of each
};

struct LaunchRecords {
  bool wanted = false;
  std::vector<LaunchRecord> all;
};
inline LaunchRecords& launch_records() {
  static LaunchRecords records;
  return records;
}

template <class T>
std::string bytes_of(const T& value) {
  std::string bytes(sizeof(T), '\0');
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes;
}

template <class... Parameters>
void record_launch(const void* kernel, dim3 grid, dim3 block, int smem, const Parameters&... args) {
  if (launch_records().wanted)
    launch_records().all.push_back({kernel, grid, block, smem, {bytes_of(args)...}});
}

}  // namespace emulator
