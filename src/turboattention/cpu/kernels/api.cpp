// The functions that Python calls, and the choice of an instruction set.
#include "api.hpp"

#if defined(TA_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// A call by the function of its instruction set; of those that were not compiled nothing is left to link. Append and
// compression have none of their own for AMX.
#define TA_CHOSEN(name, call)                                        \
    (TA_HAS_AVX512 && (call)->isa >= TA_AVX512 ? name##_avx512(call) \
     : TA_HAS_AVX2 && (call)->isa >= TA_AVX2   ? name##_avx2(call)   \
                                               : name##_plain(call))
#define TA_CHOSEN_AMX(name, call) (TA_HAS_AMX && (call)->isa >= TA_AMX ? name##_amx(call) : TA_CHOSEN(name, call))

namespace {

#if defined(TA_TILES_EMULATED) // a build for tests
int best_isa() { return TA_AMX; }
#else
#if defined(TA_X86)
// Tiles: the processor has them, the system saves them, and Linux lets this process use them (it asks once, for all
// threads, because a process that uses them needs more memory for signals).
bool have_tiles() {
    constexpr unsigned TILE_BIT = 24, INT8_BIT = 25, OSXSAVE_BIT = 27, STATE_BITS = 3u << 17;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> OSXSAVE_BIT & 1)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> TILE_BIT & 1) || !(d >> INT8_BIT & 1)) return false;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & STATE_BITS) == STATE_BITS && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif

int best_isa() {
#if defined(TA_X86)
    __builtin_cpu_init();
    if (TA_HAS_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2"))
        return TA_HAS_AMX && have_tiles() ? TA_AMX : TA_AVX512;
    if (TA_HAS_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return TA_AVX2;
#endif
    return TA_PLAIN;
}
#endif

} // namespace

extern "C" {

TA_EXPORT int ta_abi_version(void) { return TA_ABI_VERSION; }

/* The widest instruction set that this processor and this build have; a TaIsa. To be asked before any call: it asks
 * Linux for AMX too. */
TA_EXPORT int ta_isa(void) { return best_isa(); }

/* call->isa at most ta_isa(). Returns a TaStatus. */
TA_EXPORT int ta_attend(const TaAttention *call) { return TA_CHOSEN_AMX(ta_attend, call); }

/* As ta_attend, of the compression of pages. TA_BEYOND_FLOAT16: some page has no finite float16 scale. */
TA_EXPORT int ta_compress(const TaCompress *call) { return TA_CHOSEN(ta_compress, call); }

/* As ta_attend, of INT8 prefill. TA_BAD_LENGTHS: sequences that do not lie in the tensors. */
TA_EXPORT int ta_prefill(const TaPrefill *call) { return TA_CHOSEN_AMX(ta_prefill, call); }

/* As ta_attend, of a step of a paged cache; what is wrong with a row is in its fault. */
TA_EXPORT int ta_append(const TaAppend *call) { return TA_CHOSEN(ta_append, call); }
}
