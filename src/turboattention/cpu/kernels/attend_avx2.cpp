#define TA_ISA avx2
#include "schedule.hpp"

int ta_attend_avx2(const TaAttention *call) { return avx2::run_attention(call); }
