#define TA_ISA plain
#include "append.hpp"

int ta_compress_plain(const TaCompress *call) { return plain::run_compress(call); }
int ta_append_plain(const TaAppend *call) { return plain::run_append(call); }
