// Compiled once for each instruction set, under the name QUIETSTAR_SET.
#include "backward.hpp"
#include "forward.hpp"
#include "layer.hpp"
#include "peak.hpp"
#include "sample.hpp"

namespace quietstar {

#define QUIETSTAR_TEXT(x) #x
#define QUIETSTAR_NAME(x) QUIETSTAR_TEXT(x)

namespace QUIETSTAR_SET {
extern const Kernels kernels;
const Kernels kernels = {QUIETSTAR_NAME(QUIETSTAR_SET),
                         forward,
                         backward,
                         finish,
                         sample,
                         norm,
                         norm_backward,
                         rotary,
                         gated,
                         add_up,
                         multiply_adds,
                         sizeof(ForwardSpace),
                         sizeof(BackwardSpace)};
}  // namespace QUIETSTAR_SET

}  // namespace quietstar
