// The functions that Python calls, and the choice of an instruction set.
#include "api.hpp"

// A call by the function of its instruction set; of those that were not compiled nothing is left to link.
#define TA_CHOSEN(name, call)                                        \
    (TA_HAS_AVX512 && (call)->isa == TA_AVX512 ? name##_avx512(call) \
     : TA_HAS_AVX2 && (call)->isa == TA_AVX2   ? name##_avx2(call)   \
                                               : name##_plain(call))

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
TA_EXPORT int ta_attend(const TaAttention *call) { return TA_CHOSEN(ta_attend, call); }

/* As ta_attend, of the compression of pages. TA_BEYOND_FLOAT16: some page has no finite float16 scale. */
TA_EXPORT int ta_compress(const TaCompress *call) { return TA_CHOSEN(ta_compress, call); }

/* As ta_attend, of INT8 prefill. TA_BAD_LENGTHS: sequences that do not lie in the tensors. */
TA_EXPORT int ta_prefill(const TaPrefill *call) { return TA_CHOSEN(ta_prefill, call); }

/* As ta_attend, of a step of a paged cache; what is wrong with a row is in its fault. */
TA_EXPORT int ta_append(const TaAppend *call) { return TA_CHOSEN(ta_append, call); }
}
