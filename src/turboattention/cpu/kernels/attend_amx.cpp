#define TA_ISA amx
#define TA_TILES 1
#include "schedule.hpp"

int ta_attend_amx(const TaAttention *call) { return amx::run_attention(call); }
