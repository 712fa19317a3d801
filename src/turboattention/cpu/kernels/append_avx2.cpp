#define TA_ISA avx2
#include "append.hpp"

int ta_compress_avx2(const TaCompress *call) { return avx2::run_compress(call); }
int ta_append_avx2(const TaAppend *call) { return avx2::run_append(call); }
