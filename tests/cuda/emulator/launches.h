// What the launchers launched: for the evidence, which needs blocks, shared memory and arguments as
// they ship.
#pragma once

#include <sys/uio.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "fibers.h"

namespace emulator {

struct LaunchRecord {
  const void* kernel;
  dim3 grid, block;
  int smem;
  std::vector<std::string> arguments;       // the bytes of each
  std::map<uint64_t, std::string> memory;  // by address: the first bytes that arguments point to
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

// What lies where the words of an argument point, if they do.
inline void look_at(const std::string& argument, std::map<uint64_t, std::string>* memory) {
  constexpr size_t kBytes = 64;
  for (size_t at = 0; at + sizeof(uint64_t) <= argument.size(); at += sizeof(uint64_t)) {
    uint64_t address;
    std::memcpy(&address, argument.data() + at, sizeof address);
    std::string bytes(kBytes, '\0');
    const iovec to{bytes.data(), kBytes}, from{reinterpret_cast<void*>(address), kBytes};
    if (address && process_vm_readv(getpid(), &to, 1, &from, 1, 0) == ssize_t(kBytes))
      (*memory)[address] = bytes;
  }
}

template <class... Parameters>
void record_launch(const void* kernel, dim3 grid, dim3 block, int smem, const Parameters&... args) {
  if (!launch_records().wanted) return;
  LaunchRecord record{kernel, grid, block, smem, {bytes_of(args)...}, {}};
  for (const std::string& argument : record.arguments) look_at(argument, &record.memory);
  launch_records().all.push_back(record);
}

}  // namespace emulator
