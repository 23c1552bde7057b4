#pragma once

#include <pybind11/pybind11.h>

namespace deeprec::cuda {

// Adds every CUDA kernel to a module.
void bind(pybind11::module_& m);

void bind_logprobs(pybind11::module_& m);
void bind_trm(pybind11::module_& m);

}  // namespace deeprec::cuda
