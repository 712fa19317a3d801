#define TA_ISA plain
#include "compress.hpp"

int ta_compress_plain(const TaCompress *call) { return plain::run_compress(call); }
