#define TA_ISA avx2
#include "chunk.hpp"

int ta_prefill_avx2(const TaPrefill *call) { return avx2::run_prefill(call); }
