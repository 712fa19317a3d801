// What one work item of attention is: shared by the instruction sets and by the program that hands items out.
#pragma once
#include <math.h>

#include "vec.hpp"

namespace TA_ISA {

constexpr int BLOCK_TOKENS = 256; // tokens of pages taken at once: the sum of their 8-bit codes times MOST_16 fits 31 bits
constexpr int ROW_BLOCK = 64;     // rows of an item at most
constexpr int EXACT_TOKENS = 64;
constexpr int LARGEST_PAGE = 128;
constexpr int MAX_HEAD_DIM = 256;
constexpr int HALVES_BYTES = 16 * MAX_HEAD_DIM;       // of operand b of tiles: 16 columns, halves of 8 rows
constexpr int TILE_SUM_BYTES = 4 * 16 * BLOCK_TOKENS; // of 8 rows: of two pages' tokens, or of channels

static inline int whole_tiles(int dim) { return (dim + 63) / 64 * 64; }

struct Item {
    const TaAttention *call;
    const TaHeadPages *pages;
    const TaPageFormat *format;
    float rotation_norm;
    int b, h;            // sequence, KV head
    int first_row, rows; // row = query * ratio + head of the group
    int first_page, last_page;
    int length, page_tokens, start;
    int sink_low, sink_high; // columns of sinks that lie in pages
    bool with_exact;

    const uint8_t *page(int p) const {
        if (pages->table) return pages->pages + (int64_t)pages->table[b * pages->table_stride + p] * format->nbytes;
        return pages->pages + b * pages->batch_bytes + (int64_t)p * format->nbytes;
    }
    int ratio() const { return call->heads / call->kv_heads; }
    int query(int r) const { return (first_row + r) / ratio(); }
    int head(int r) const { return h * ratio() + (first_row + r) % ratio(); }
    int64_t element(const TaTensor &x, int r) const { return b * x.batch + head(r) * x.head + query(r) * x.token; }
    // Columns that a row sees.
    void range(int r, int32_t *low, int32_t *high) const {
        const int at = length - call->queries + query(r); // its own place; before the first token where not causal
        *high = call->causal ? at + 1 : length;
        *low = max2(start, call->window ? at - call->window + 1 : 0);
    }
    void write(const TaAttention &a, int r, float top, float sum, float *acc) const {
        // Zeros, not a product with zero: of a query that is no number acc is none either.
        const vf inverse = splat(sum > 0.0f ? 1.0f / sum : 0.0f);
        for (int i = 0; i < a.head_dim; i += W) store(acc + i, sum > 0.0f ? load(acc + i) * inverse : vf{});
        write_row(a.out, element(a.out, r), a.head_dim, acc);
        const float lse = sum > 0.0f ? (float)(top * 0.6931471805599453 + log((double)sum)) : NEG_INF;
        a.lse[((int64_t)b * a.heads + head(r)) * a.queries + query(r)] = lse;
    }
};

} // namespace TA_ISA
