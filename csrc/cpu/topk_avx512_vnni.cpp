#include <immintrin.h>

#include "cpu/topk_kernels.h"

namespace deeprec::topk {
namespace {

#include "cpu/topk_items.h"
#include "cpu/topk_lanes_avx512.h"
#include "cpu/topk_unit_vnni.h"
#include "cpu/topk_dots.h"
#include "cpu/topk_body.h"

}  // namespace

const Kernels* avx512_vnni_kernels() { return &kKernels; }

}  // namespace deeprec::topk
