#include "choose.hpp"

#include <stdlib.h>
#include <string.h>

namespace quietstar {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#if defined(QUIETSTAR_BF16)  // setup.py defines it, where the compiler knows the instructions
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif
#endif

namespace {

const Kernels& widest() {
#if defined(__x86_64__)
    const char* const limit = getenv("ATEN_CPU_CAPABILITY");
    const bool at_most_avx2 = limit && strcmp(limit, "avx2") == 0;
    if (limit && strcmp(limit, "default") == 0) return baseline::kernels;
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#if defined(QUIETSTAR_BF16)
    const bool at_most_avx512 = at_most_avx2 || (limit && strcmp(limit, "avx512") == 0);
    const bool has_bf16 = has_avx2 && has_avx512 && __builtin_cpu_supports("avx512bf16");
    if (has_bf16 && !at_most_avx512) return avx512_bf16::kernels;
#endif
    if (has_avx2 && has_avx512 && !at_most_avx2) return avx512::kernels;
    if (has_avx2) return avx2::kernels;
#endif
    return baseline::kernels;
}

}  // namespace

const Kernels& chosen() {
    static const Kernels& kernels = widest();
    return kernels;
}

}  // namespace quietstar
