// Which of the instruction sets that were compiled this processor runs.
#pragma once
#include "arguments.hpp"

namespace quietstar {

// The widest that the processor has and ATEN_CPU_CAPABILITY, PyTorch's own limit, allows.
const Kernels& chosen();

}  // namespace quietstar
