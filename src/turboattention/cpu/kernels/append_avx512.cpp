#define TA_ISA avx512
#include "append.hpp"

int ta_compress_avx512(const TaCompress *call) { return avx512::run_compress(call); }
int ta_append_avx512(const TaAppend *call) { return avx512::run_append(call); }
