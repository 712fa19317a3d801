#define TA_ISA plain
#include "schedule.hpp"

int ta_attend_plain(const TaAttention *call) { return plain::run_attention(call); }
