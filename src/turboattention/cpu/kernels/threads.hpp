// Work items over threads, and memory that each thread keeps.
#pragma once
#include <stdint.h>

// Calls work(context, item, scratch) for item 0 .. items - 1 on at most `threads` threads, this one included; scratch
// has `scratch_bytes` bytes, aligned to 64, with anything in them. Returns false when memory is missing.
bool ta_parallel(int threads, int items, int64_t scratch_bytes, void (*work)(void *, int, uint8_t *), void *context);
