#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace deeprec::cuda {

// Adds every CUDA kernel to a module.
void bind(pybind11::module_& m);

// Address and bytes of the memory that a launcher works in, which the caller allocates.
using PyWorkspace = std::pair<uintptr_t, int64_t>;

// The memory, once it is large enough and where every vector load may start.
inline void* checked(const PyWorkspace& given, int64_t needed) {
  if (given.second < needed)
    throw std::invalid_argument("workspace: expected " + std::to_string(needed) + " bytes, got " +
                                std::to_string(given.second));
  if (given.first % 16) throw std::invalid_argument("workspace must be aligned to 16 bytes");
  return reinterpret_cast<void*>(given.first);
}

void bind_logprobs(pybind11::module_& m);
void bind_trm(pybind11::module_& m);

}  // namespace deeprec::cuda
