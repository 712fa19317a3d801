// One function for each instruction set; the build says which were compiled.
#pragma once
#include "abi.h"

#if defined(__x86_64__)
#define TA_X86 1
#endif
#if !defined(TA_HAS_AVX2)
#define TA_HAS_AVX2 0
#endif
#if !defined(TA_HAS_AVX512)
#define TA_HAS_AVX512 0
#endif
#if !defined(TA_HAS_AMX)
#define TA_HAS_AMX 0
#endif

#define TA_EXPORT __attribute__((visibility("default")))

int ta_attend_plain(const TaAttention *call);
int ta_attend_avx2(const TaAttention *call);
int ta_attend_avx512(const TaAttention *call);
int ta_attend_amx(const TaAttention *call);
int ta_compress_plain(const TaCompress *call);
int ta_compress_avx2(const TaCompress *call);
int ta_compress_avx512(const TaCompress *call);
int ta_append_plain(const TaAppend *call);
int ta_append_avx2(const TaAppend *call);
int ta_append_avx512(const TaAppend *call);
int ta_prefill_plain(const TaPrefill *call);
int ta_prefill_avx2(const TaPrefill *call);
int ta_prefill_avx512(const TaPrefill *call);
int ta_prefill_amx(const TaPrefill *call);
