/* What crosses the border to Python: plain structs, mirrored field by field in `cpu/structs.py`.
 *
 * Strides count elements unless a name says bytes. Offsets of regions that a format does not have are -1.
 */
#pragma once
#include <stdint.h>

#define TA_ABI_VERSION 3

enum TaDtype { TA_FLOAT32 = 0, TA_FLOAT16 = 1, TA_BFLOAT16 = 2 };
enum TaIsa { TA_PLAIN = 0, TA_AVX2 = 1, TA_AVX512 = 2, TA_AMX = 3 };
enum TaStatus { TA_OK = 0, TA_NO_MEMORY = 1, TA_BAD_TABLE = 2, TA_BEYOND_FLOAT16 = 3, TA_BAD_LENGTHS = 4 };

/* Sizes and byte offsets of a page: numbers of `quant.layout.PageLayout`. */
typedef struct {
    int32_t page_size, head_dim, nbytes;
    int32_t key_bits, key_search, refined, refined_bits;
    int32_t value_bits, value_search;
    int32_t rotation; /* width of a Hadamard block of V; 1 without rotation */
    int32_t key_codes, key_page_scale, key_scale, key_page_zero, key_zero, key_refined_index, key_refined_codes;
    int32_t value_codes, value_page_scale, value_scale, value_page_zero, value_zero;
} TaPageFormat;

/* The pages of one KV head: page p of sequence b is at pages + b * batch_bytes + p * nbytes, or, with a table,
 * at pages + table[b * table_stride + p] * nbytes, where entries must be below pool_pages. */
typedef struct {
    const TaPageFormat *format;
    const uint8_t *pages;
    int64_t batch_bytes;
    const int32_t *table;
    int64_t table_stride, pool_pages;
} TaHeadPages;

/* A tensor [batch, heads, tokens, head_dim], channels contiguous. */
typedef struct {
    const void *data;
    int64_t batch, head, token;
    int32_t dtype;
} TaTensor;

typedef struct {
    int32_t batch, heads, kv_heads, queries, head_dim;
    int32_t causal, window;  /* window 0: none */
    int32_t sinks, capacity; /* capacity of a ring of exact tokens; 0: they lie in order */
    int32_t split; /* tokens of pages of a part; 0: by the work of the call and the threads */
    float scale, softcap;    /* softcap 0: none */
    const TaHeadPages *pages; /* [kv_heads] */
    const int32_t *lengths, *page_tokens; /* [batch] */
    const int64_t *starts;                /* [batch], or NULL */
    TaTensor q, tail_key, tail_value, sink_key, sink_value;
    TaTensor out;
    float *lse; /* [batch, heads, queries] */
    int32_t threads, isa;
} TaAttention;

/* Compression of whole pages, [batch, heads, pages * page_size, head_dim] to [batch, heads, pages, nbytes]. */
typedef struct {
    int32_t batch, heads, pages;
    const TaPageFormat *format;
    TaTensor key, value;
    const uint8_t *valid; /* bool [batch or 1, pages * page_size], or NULL */
    int64_t valid_stride; /* 0: the same for all rows */
    const float *power;   /* float32 [batch, heads, head_dim] with the strides below, or NULL */
    int64_t power_batch, power_head;
    uint8_t *out;
    int32_t threads, isa;
} TaCompress;

/* A step of a paged cache: `ops.append.paged.append_paged`, RoPE done. group_of says which heads share a page layout:
 * the pages of a group are written together or not at all. */
typedef struct {
    int32_t batch, heads, tokens, sinks, capacity, window, before;
    const TaHeadPages *pages;  /* [heads]; their pools are written to */
    const int32_t *group_of;   /* [heads], from 0 */
    const int32_t *lengths, *page_tokens;
    const int32_t *counts;     /* [batch], or NULL: all tokens */
    int64_t table_pages;       /* entries of a row of a table */
    TaTensor key, value, tail_key, tail_value, sink_key, sink_value; /* of one dtype; the last four are written to */
    const float *power; /* float32 [batch, heads, head_dim], or NULL */
    int32_t *fault;     /* [batch], of TaFault */
    int32_t threads, isa;
} TaAppend;

/* INT8 prefill of a chunk over its own K and V: `ops.prefill.int8`. Packed sequences lie one after the other in tensors
 * of batch stride 0, sequence b from token cu[b] to cu[b + 1]; without cu all have tokens_q and tokens_k. */
typedef struct {
    int32_t batch, heads, kv_heads, head_dim;
    int32_t tokens_q, tokens_k;  /* of a sequence; with cu of the tensors */
    int32_t causal, window;      /* window 0: none */
    float scale;
    const int32_t *cu_q, *cu_k;  /* [batch + 1], or NULL both */
    TaTensor q, key, value, out;
    float *lse; /* queries lie side by side */
    int64_t lse_batch, lse_head;
    int32_t threads, isa;
} TaPrefill;

enum TaFault { TA_FAULT_NOT_FINITE = 1, TA_FAULT_BEYOND_FLOAT16 = 2, TA_FAULT_NO_ROOM = 4 };
