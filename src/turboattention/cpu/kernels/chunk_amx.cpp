#define TA_ISA amx
#define TA_TILES 1
#include "chunk.hpp"

int ta_prefill_amx(const TaPrefill *call) { return amx::run_prefill(call); }
