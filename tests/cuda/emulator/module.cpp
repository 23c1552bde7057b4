// The shipped kernels, launchers and bindings as a Python module, on the emulator.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include "cuda/bindings.h"
#include "fibers.h"
#include "launches.h"

namespace py = pybind11;

namespace {

void set_schedule(const std::string& order, uint64_t seed, bool eager_copies) {
  using emulator::Order;
  const Order chosen = order == "forward"    ? Order::forward
                       : order == "reverse"  ? Order::reverse
                       : order == "shuffled" ? Order::shuffled
                                             : throw std::invalid_argument("order: " + order);
  emulator::schedule() = {chosen, seed, eager_copies};
}

void record_launches() {
  emulator::launch_records().wanted = true;
  emulator::launch_records().all.clear();
}

// (address of the kernel in this library, grid, threads, shared memory, arguments as bytes, memory
// they point to by address) of every launch since record_launches, which ends here.
py::list recorded_launches() {
  py::list found;
  for (const emulator::LaunchRecord& r : emulator::launch_records().all) {
    Dl_info library{};
    dladdr(r.kernel, &library);
    const auto address = uintptr_t(r.kernel) - uintptr_t(library.dli_fbase);
    py::list arguments;
    for (const std::string& bytes : r.arguments) arguments.append(py::bytes(bytes));
    py::dict memory;
    for (const auto& [where, bytes] : r.memory) memory[py::int_(where)] = py::bytes(bytes);
    found.append(py::make_tuple(address, py::make_tuple(r.grid.x, r.grid.y, r.grid.z),
                                r.block.x * r.block.y * r.block.z, r.smem, arguments, memory));
  }
  emulator::launch_records() = {};
  return found;
}

}  // namespace

PYBIND11_MODULE(EMULATED_MODULE, m) {
  m.def("set_schedule", &set_schedule, py::arg("order"), py::arg("seed") = 1,
        py::arg("eager_copies") = false);
  m.def("record_launches", &record_launches);
  m.def("recorded_launches", &recorded_launches);
  deeprec::cuda::bind(m);
}
