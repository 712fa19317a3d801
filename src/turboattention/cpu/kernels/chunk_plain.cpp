#define TA_ISA plain
#include "chunk.hpp"

int ta_prefill_plain(const TaPrefill *call) { return plain::run_prefill(call); }
