#define TA_ISA avx512
#include "chunk.hpp"

int ta_prefill_avx512(const TaPrefill *call) { return avx512::run_prefill(call); }
