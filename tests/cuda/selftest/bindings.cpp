// In place of csrc/cuda/bindings.cpp: the emulator's own kernels as a module.
#include "cuda/bindings.h"

#include "selftest.h"

namespace deeprec::cuda {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind(pybind11::module_& m) {
  m.def("block_sum", [](uintptr_t x, uintptr_t out, int n, int blocks) {
    run_block_sum(pointer<const float>(x), pointer<float>(out), n, blocks);
  });
  m.def("matmul", [](uintptr_t a, uintptr_t b, uintptr_t c, int m, int n, int d) {
    run_matmul(pointer<const void>(a), pointer<const void>(b), pointer<float>(c), m, n, d);
  });
  m.def("one_mma", [](int type, uintptr_t a, uintptr_t b, uintptr_t c) {
    run_one_mma(type, pointer<const uint32_t>(a), pointer<const uint32_t>(b),
                pointer<uint32_t>(c));
  });
  m.def("transpose8", [](uintptr_t x, uintptr_t out) {
    run_transpose8(pointer<const uint16_t>(x), pointer<uint32_t>(out));
  });
}

}  // namespace deeprec::cuda
