// Quantisation of one page, operation for operation as `quant.affine` and `quant.two_level` define it.
//
// The files that include this are compiled without fusing products and sums: every rounding is one of the definition's.
#pragma once
#include <math.h>

#include "vec.hpp"

namespace TA_ISA {

constexpr float TINY = 1e-12f;
constexpr float SMALLEST_HALF = 0x1p-24f;
constexpr int SHARES = 9;
constexpr int MAX_ROW = 256; // codes of a row: channels of K or tokens of V
constexpr double ERROR_STEPS = 4096.0;

static inline vf reciprocal(vf x) { return 1.0f / vmax(x, splat(TINY)); }
// To the nearest integer of low .. high, ties to even.
static inline vf round_within(vf x, float low, float high) {
    x = vmin(vmax(x, splat(low - 1.0f)), splat(high + 1.0f)); // where the sum with MAGIC is exact
    x = (x + MAGIC) - MAGIC;
    return vmin(vmax(x, splat(low)), splat(high));
}
static inline int levels_of(int bits) { return (1 << bits) - 1; }

// The three numbers that a share of the range stands for in `affine.search_range`.
struct Share {
    float share, position, distance;
    Share() = default;
    Share(int index, int levels) {
        share = (float)(20 - index) / 20.0f;
        position = (float)(levels / (2.0 * (double)share));
        distance = (float)(2.0 * (double)share / levels * ERROR_STEPS);
    }
};

// Squared error of values on the grid of a share, as integers.
static inline vi share_error(vf relative, const Share &s, int levels) {
    vf position = relative * s.position;
    position = position + (float)(levels / 2.0);
    vf distance = (position - round_within(position, 0.0f, (float)levels)) * s.distance;
    return __builtin_convertvector(distance * distance, vi);
}

// Ranges of K per channel over `count` rows of x at `stride`; low and high in, the chosen ones out.
static inline void search_channels(const float *x, int64_t stride, int count, int bits, vf *low, vf *high) {
    const int levels = levels_of(bits);
    const vf middle = (*low + *high) * 0.5f, half = (*high - *low) * 0.5f, inverse = reciprocal(half);
    vi best = vi{} + 0x7fffffff;
    vf best_share = splat(1.0f);
    for (int i = 0; i < SHARES; i++) {
        const Share s(i, levels);
        vi error = vi{};
        for (int t = 0; t < count; t++) error += share_error((load(x + t * stride) - middle) * inverse, s, levels);
        const vi better = error < best;
        best = better ? error : best;
        best_share = better ? splat(s.share) : best_share;
    }
    const vf reach = best_share * half;
    *low = middle - reach, *high = middle + reach;
}

// The range of one token of V over its channels.
static inline void search_token(const float *x, int dim, int bits, float *low, float *high) {
    const int levels = levels_of(bits);
    const float middle = (*low + *high) * 0.5f, half = (*high - *low) * 0.5f, inverse = 1.0f / max2(half, TINY);
    int32_t best = 0x7fffffff;
    float best_share = 1.0f;
    for (int i = 0; i < SHARES; i++) {
        const Share s(i, levels);
        vi errors = vi{};
        for (int d = 0; d < dim; d += W) errors += share_error((load(x + d) - middle) * inverse, s, levels);
        const int32_t error = sum_of(errors);
        if (error < best) best = error, best_share = s.share;
    }
    const float reach = best_share * half;
    *low = middle - reach, *high = middle + reach;
}

// The page's number: the largest magnitude as float16, rounded up. False when it is not finite there.
static inline bool page_maximum(const float *x, int count, uint8_t *page, int offset, float *value) {
    float top = 0.0f;
    bool finite = true;
    for (int i = 0; i < count; i++) {
        const float a = x[i] < 0.0f ? -x[i] : x[i];
        finite = finite && a <= 3.4028235e38f; // NaN fails
        top = max2(top, a);
    }
    uint16_t half = float_to_half(top);
    if (!finite || (half & 0x7fff) >= 0x7c00) return false;
    if (half_to_float(half) < top) half = half + 1 > 0x7bff ? 0x7bff : half + 1;
    memcpy(page + offset, &half, 2);
    *value = half_to_float(half);
    return true;
}

// Scales (1 .. 255) or zeros (-127 .. 127) to bytes and back: on return they are what a reader sees.
static inline bool round_numbers(float *x, int count, float lowest, float highest, uint8_t *page, int number, int codes) {
    float top;
    if (!page_maximum(x, count, page, number, &top)) return false;
    const float divisor = max2(top, SMALLEST_HALF);
    for (int i = 0; i < count; i += W) {
        const vf code = round_within(load(x + i) / divisor * highest, lowest, highest);
        for (int k = 0; k < W; k++) page[codes + i + k] = (uint8_t)(int)code[k];
        store(x + i, top * (code / highest));
    }
    return true;
}
static inline bool round_scales(float *scale, int count, uint8_t *page, int number, int codes) {
    return round_numbers(scale, count, 1.0f, 255.0f, page, number, codes);
}
static inline bool round_zeros(float *zero, int count, uint8_t *page, int number, int codes) {
    return round_numbers(zero, count, -127.0f, 127.0f, page, number, codes);
}

// Codes of a row to bytes of a page (`quant.packing.pack`); `codes` are changed for 3 bits.
static inline void pack_parts(const uint8_t *codes, int n, int bits, uint8_t *out) {
    const int parts = 8 / bits, part = n / parts;
    for (int i = 0; i < part; i++) out[i] = codes[i];
    for (int k = 1; k < parts; k++)
        for (int i = 0; i < part; i++) out[i] |= (uint8_t)(codes[k * part + i] << (k * bits));
}
static inline void pack_row(uint8_t *codes, int n, int bits, uint8_t *out) {
    if (bits == 8) {
        memcpy(out, codes, (size_t)n);
    } else if (bits == 3) {
        uint8_t high[MAX_ROW];
        for (int i = 0; i < n; i++) high[i] = codes[i] >> 2, codes[i] &= 3;
        pack_parts(codes, n, 2, out);
        pack_parts(high, n, 1, out + n / 4);
    } else
        pack_parts(codes, n, bits, out);
}

} // namespace TA_ISA
