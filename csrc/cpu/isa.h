// Which instruction set the CPU kernels use: found once, forced by DEEPREC_ISA or by a test.
#pragma once

#include <string>
#include <vector>

namespace deeprec {

// Ascending: a machine that supports a level is given the highest one by default.
enum class Isa : int { scalar = 0, avx2, avx_vnni, avx512, avx512_vnni, amx };

const char* isa_name(Isa isa);
// Levels this machine (CPU and operating system) can run, ascending; scalar is always there.
const std::vector<Isa>& available_isas();
// The level kernels dispatch on.
Isa active_isa();
// Forces a level by name, "auto" for the best; throws std::invalid_argument naming the choices.
void set_isa(const std::string& name);

}  // namespace deeprec
