#define TA_ISA avx2
#include "compress.hpp"

int ta_compress_avx2(const TaCompress *call) { return avx2::run_compress(call); }
