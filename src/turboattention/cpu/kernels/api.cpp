// The functions that Python calls, and the choice of an instruction set.
#include "api.hpp"

namespace {

int best_isa() {
#if defined(TA_X86)
    __builtin_cpu_init();
    if (TA_HAS_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2"))
        return TA_AVX512;
    if (TA_HAS_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return TA_AVX2;
#endif
    return TA_PLAIN;
}

} // namespace

extern "C" {

TA_EXPORT int ta_abi_version(void) { return TA_ABI_VERSION; }

/* The widest instruction set that this processor and this build have; a TaIsa. */
TA_EXPORT int ta_isa(void) { return best_isa(); }

/* call->isa at most ta_isa(). Returns a TaStatus. */
TA_EXPORT int ta_attend(const TaAttention *call) {
#if defined(TA_X86)
    if (TA_HAS_AVX512 && call->isa == TA_AVX512) return ta_attend_avx512(call);
    if (TA_HAS_AVX2 && call->isa == TA_AVX2) return ta_attend_avx2(call);
#endif
    return ta_attend_plain(call);
}

/* As ta_attend, of the compression of pages. TA_BEYOND_FLOAT16: some page has no finite float16 scale. */
TA_EXPORT int ta_compress(const TaCompress *call) {
#if defined(TA_X86)
    if (TA_HAS_AVX512 && call->isa == TA_AVX512) return ta_compress_avx512(call);
    if (TA_HAS_AVX2 && call->isa == TA_AVX2) return ta_compress_avx2(call);
#endif
    return ta_compress_plain(call);
}

/* As ta_attend, of a step of a paged cache; what is wrong with a row is in its fault. */
TA_EXPORT int ta_append(const TaAppend *call) {
#if defined(TA_X86)
    if (TA_HAS_AVX512 && call->isa == TA_AVX512) return ta_append_avx512(call);
    if (TA_HAS_AVX2 && call->isa == TA_AVX2) return ta_append_avx2(call);
#endif
    return ta_append_plain(call);
}
}
