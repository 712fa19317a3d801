#define TA_ISA avx512
#include "compress.hpp"

int ta_compress_avx512(const TaCompress *call) { return avx512::run_compress(call); }
