#include "thought_decode_kernel.cuh"

namespace quietstar {

template void launch_decode<bf16, 64>(const ThoughtDecodeArguments&, void*);
template void launch_decode<half, 64>(const ThoughtDecodeArguments&, void*);

}  // namespace quietstar
