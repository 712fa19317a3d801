// Buffers of one thread, and K and V of a page as scores and bytes.
#pragma once
#include "dot_lanes.hpp"
#include "item.hpp"
#include "refined.hpp"

namespace TA_ISA {

// Buffers of one thread, cut from one allocation; sizes in `item.hpp`.
struct Buffers {
    uint8_t *key_codes, *value_codes;
    int16_t *folded, *weights;
    float *q, *scores, *acc, *scale, *zero, *plane, *refined_q, *top, *sum, *value_scale, *value_zero, *keep;
    int32_t *dots, *low, *high;
    uint8_t *groups, *halves; // of refined channels, where they are multiplied as integers
    uint8_t *sides;           // upper, then lower halves of folded rows or of weights, for `dot_packed`
    // With tiles: operand b of 8 rows after the other, and sums [8 rows][tokens of two pages or channels][16].
    uint8_t *operands;
    int32_t *sums;

    explicit Buffers(uint8_t *memory, const TaAttention &a, int refined) {
        uint8_t *next = memory;
        auto take = [&](int64_t bytes) {
            uint8_t *p = next;
            next += (bytes + 63) & ~(int64_t)63;
            return p;
        };
        const int64_t dim = a.head_dim, widest = max2((int)dim, BLOCK_TOKENS);
        key_codes = take(LARGEST_PAGE * dim);
        value_codes = take(BLOCK_TOKENS * dim);
        folded = (int16_t *)take(2 * ROW_BLOCK * whole_tiles(a.head_dim));
        weights = (int16_t *)take(2 * ROW_BLOCK * BLOCK_TOKENS);
        q = (float *)take(4 * ROW_BLOCK * dim);
        acc = (float *)take(4 * ROW_BLOCK * dim);
        scores = (float *)take(4 * ROW_BLOCK * BLOCK_TOKENS);
        dots = (int32_t *)take(4 * ROW_BLOCK * widest);
        // Exact tokens reuse what holds the planes of pages.
        plane = (float *)take(4 * max2((int64_t)refined * LARGEST_PAGE, 2 * EXACT_TOKENS * dim));
        refined_q = (float *)take(4 * ((int64_t)refined + 1));
        scale = (float *)take(4 * dim);
        zero = (float *)take(4 * dim);
        value_scale = (float *)take(4 * BLOCK_TOKENS);
        value_zero = (float *)take(4 * BLOCK_TOKENS);
        top = (float *)take(4 * ROW_BLOCK);
        sum = (float *)take(4 * ROW_BLOCK);
        keep = (float *)take(4 * ROW_BLOCK);
        low = (int32_t *)take(4 * ROW_BLOCK);
        high = (int32_t *)take(4 * ROW_BLOCK);
        groups = take(REFINED_INTEGERS ? (int64_t)(refined + 3) / 4 * 4 * LARGEST_PAGE : 0);
        halves = take(REFINED_INTEGERS ? 2 * MOST_REFINED : 0);
        sides = take(LANES ? 2 * ROW_BLOCK * widest : 0);
        operands = take(TA_TILES ? ROW_BLOCK / 8 * HALVES_BYTES : 0);
        sums = (int32_t *)take(TA_TILES ? ROW_BLOCK / 8 * TILE_SUM_BYTES : 0);
        used = next - memory;
    }
    int64_t used;
};

// The refined channels' part of the scores of row r, from `product` or, for AVX-512, from the integers made of it, as
// sums of integers.
static inline void refined_scores(const TaPageFormat &f, const uint8_t *page, const Buffers &b, const float *product,
                                  const int16_t *folded, float *s) {
    const int size = f.page_size;
    const uint8_t *index = page + f.key_refined_index;
#if TA_WIDE
    refined_row(folded, TA_TILES ? whole_tiles(f.head_dim) : f.head_dim, index, f.refined, b.halves, b.halves + MOST_REFINED);
    refined_sums(b.groups, f.refined, size, b.halves, b.halves + MOST_REFINED, (int32_t *)s);
    (void)product;
#else
    (void)folded;
    const float unit = 1.0f / (float)(1 << f.refined_bits);
    // Bounded: a damaged page must not be a reason to read elsewhere.
    for (int j = 0; j < f.refined; j++) b.refined_q[j] = product[min2((int)index[j], f.head_dim - 1)] * unit;
    for (int t = 0; t < size; t += 4 * W) { // pages hold 64 or 128 tokens
        vf s0 = vf{}, s1 = vf{}, s2 = vf{}, s3 = vf{};
        for (int j = 0; j < f.refined; j++) {
            const float *p = b.plane + j * size + t;
            vf x = splat(b.refined_q[j]);
            s0 += x * load(p), s1 += x * load(p + W), s2 += x * load(p + 2 * W), s3 += x * load(p + 3 * W);
        }
        store(s + t, s0), store(s + t + W, s1), store(s + t + 2 * W, s2), store(s + t + 3 * W, s3);
    }
#endif
}

// Codes of K of a page as bytes [tokens][channels]; `ahead` is fetched meanwhile.
static inline const uint8_t *key_bytes(const TaPageFormat &f, const uint8_t *page, const Buffers &b, Ahead ahead) {
    const uint8_t *codes = page + f.key_codes;
    if (f.key_bits == 8) return codes;
    constexpr int STEP = 8; // tokens
    const int64_t share = ahead.bytes / (f.page_size / STEP);
    const int row = f.head_dim * f.key_bits / 8;
    for (int t = 0; t < f.page_size; t += STEP) {
        ahead.fetch(share);
        unpack_rows(f.key_bits, codes + t * row, STEP, f.head_dim, b.key_codes + t * f.head_dim, f.head_dim);
    }
    return b.key_codes;
}

// q times the scales of a page as int16 rows, what one step of them is worth, and what the zeros add to the scores;
// the part of the refined channels to columns `column ..` of the scores.
static inline void fold_page(const TaPageFormat &f, const uint8_t *page, const Rows &rows, const Buffers &b, int column,
                             float *step, float *base) {
    const int dim = f.head_dim;
    key_metadata(f, page, b.scale, b.zero);
    if (f.refined) {
#if TA_WIDE
        refined_groups(f, page, b.groups);
#else
        refined_plane(f, page, b.plane);
#endif
    }
#if TA_TILES && TA_WIDE
    const int stride = whole_tiles(dim);
    for (int r = 0; r < rows.count; r += 4)
        fold_halves(rows.q + r * dim, dim, min2(4, rows.count - r), b.scale, b.zero, r % 8 * 2,
                    b.operands + r / 8 * HALVES_BYTES, b.folded + r * stride, stride, step + r, base + r);
    for (int r = 0; r < rows.count && f.refined; r++)
        refined_scores(f, page, b, nullptr, b.folded + r * stride, b.scores + (int64_t)r * BLOCK_TOKENS + column);
#else
    for (int r = 0; r < rows.count; r++) {
        const float *q = rows.q + r * dim;
        float product[MAX_HEAD_DIM];
        vf shift = vf{}, largest = vf{};
        for (int i = 0; i < dim; i += W) {
            vf x = load(q + i), y = x * load(b.scale + i);
            store(product + i, y);
            largest = vmax(largest, vabs(y));
            shift += x * load(b.zero + i);
        }
        int32_t unused;
        int16_t *folded = b.folded + r * dim;
        base[r] = sum_of(shift);
        step[r] = to_int16<false>(product, dim, max2(max_of(largest), LEAST_TOP), folded, &unused);
        if (f.refined) refined_scores(f, page, b, product, folded, b.scores + (int64_t)r * BLOCK_TOKENS + column);
    }
#if TA_TILES
    pack_operands(b.folded, dim, rows.count, dim, b.operands);
#endif
#endif
}

// Sums of codes of W tokens t .. of a row, to its scores s.
static inline void finish_sums(const TaPageFormat &f, vi sums, float unit, float step, float base, float *s) {
    vf x = vi_to_vf(sums);
    if (f.refined && REFINED_INTEGERS) x += vi_to_vf(load_as<vi>(s)) * unit;
    x = x * step + base;
    if (f.refined && !REFINED_INTEGERS) x += load(s);
    store(s, x);
}

// Sums of codes of a page (of tiles at `sums`, else in b.dots) to scores in columns `column ..`.
static inline void finish_page(const TaPageFormat &f, const Rows &rows, const Buffers &b, int column, const int32_t *sums,
                               const float *step, const float *base) {
    const float unit = 1.0f / (float)(1 << f.refined_bits);
#if TA_TILES
    join_sums(sums, f.page_size, rows.count, [&](int r, int t, vi x) {
        finish_sums(f, x, unit, step[r], base[r], b.scores + (int64_t)r * BLOCK_TOKENS + column + t);
    });
#else
    for (int r = 0; r < rows.count; r++)
        for (int t = 0; t < f.page_size; t += W)
            finish_sums(f, load_as<vi>(sums + r * f.page_size + t), unit, step[r], base[r],
                        b.scores + (int64_t)r * BLOCK_TOKENS + column + t);
#endif
}

// Codes of V of a page, `count` channels from `first` on, tokens `column ..` of a block; `ahead` is fetched meanwhile.
static inline void value_bytes(const TaPageFormat &f, const uint8_t *page, const Buffers &b, int column, int first,
                               int count, Ahead ahead) {
    constexpr int STEP = 16; // channels
    const int size = f.page_size, row = size * f.value_bits / 8;
    const int64_t share = ahead.bytes / (count / STEP);
    for (int d = 0; d < count; d += STEP) {
        ahead.fetch(share);
        unpack_rows(f.value_bits, page + f.value_codes + (first + d) * row, STEP, size,
                    b.value_codes + d * BLOCK_TOKENS + column, BLOCK_TOKENS);
    }
}

static inline void value_numbers(const TaPageFormat &f, const uint8_t *page, const Buffers &b, int column) {
    const int size = f.page_size;
    scaled_bytes(page + f.value_scale, size, float16_at(page, f.value_page_scale) / 255.0f, b.value_scale + column);
    if (f.value_zero >= 0)
        scaled_bytes((const int8_t *)(page + f.value_zero), size, float16_at(page, f.value_page_zero) / 127.0f,
                     b.value_zero + column);
}

} // namespace TA_ISA
