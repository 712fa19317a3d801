#define TA_ISA avx512
#include "schedule.hpp"

int ta_attend_avx512(const TaAttention *call) { return avx512::run_attention(call); }
