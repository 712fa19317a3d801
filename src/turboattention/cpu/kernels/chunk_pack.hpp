// Operands of INT8 prefill: K and V of 128 tokens as panels with one scale each (`ops.prefill.int8.quantise_chunk`).
#pragma once
#include <math.h>

#include "panels.hpp"

namespace TA_ISA {

constexpr int TILE = 128;   // tokens that share a scale
constexpr int LEVELS = 127; // of a code, and of a weight
constexpr float LEAST = 1e-30f;
constexpr int KEY_SAMPLES = 512;       // tokens that say what K's mean is and how large its channels are
constexpr int QUERY_SAMPLES = 128;     // the same for Q: rows of all query heads of a KV head
constexpr float LEAST_SHARE = 0x1p-8f; // of a head's largest channel that a channel counts as

// K and V of one tile, one allocation after the other.
struct Tile {
    float *key_scale, *value_scale;
    int32_t *base;   // [TILE]: what sums of scores begin with
    uint8_t *keys;   // [TILE / 16] panels of tokens
    uint8_t *values; // [head_dim / 16] panels of channels

    static int64_t bytes(int dim) { return 64 + 4 * TILE + (int64_t)TILE * dim * (SIGNED_BYTES + 1); }
    static int key_panel(int dim) { return PANEL * dim * SIGNED_BYTES; }
    static constexpr int VALUE_PANEL = PANEL * TILE;

    Tile(uint8_t *memory, int dim) {
        key_scale = (float *)memory, value_scale = key_scale + 1;
        base = (int32_t *)(memory + 64);
        keys = memory + 64 + 4 * TILE;
        values = keys + (int64_t)TILE * dim * SIGNED_BYTES;
    }
};

static inline float largest_of(const float *x, int64_t count) {
    vf top = vf{};
    for (int64_t i = 0; i < count; i += W) top = vmax(top, vabs(load(x + i)));
    return max2(max_of(top), LEAST);
}

// W floats times `inverse` to the nearest integers.
static inline vi codes_of(const float *x, float inverse) {
    return bits_of(load(x) * inverse + MAGIC) - 0x4b400000; // MAGIC's own bits
}

static inline void store_bytes(uint8_t *p, vi x) {
#if TA_WIDE
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x));
#else
    const vb narrow = __builtin_convertvector(x, vb);
    memcpy(p, &narrow, sizeof narrow);
#endif
}

// `dim` codes of one row of a signed operand: for pairs int16, else bytes, moved by `offset`.
static inline int32_t code_row(const float *x, int dim, float inverse, int offset, uint8_t *out) {
    vi sums = vi{};
    for (int i = 0; i < dim; i += W) {
        const vi codes = codes_of(x + i, inverse);
        sums += codes;
        if (PAIRS) {
            const vs narrow = __builtin_convertvector(codes, vs);
            memcpy(out + 2 * i, &narrow, sizeof narrow);
        } else {
            store_bytes(out + i, codes + offset);
        }
    }
    return sum_of(sums);
}

// A channel's share of the largest; what is no number counts as the largest.
static inline float share_of(float x, float most) {
    const float share = x / most;
    return share < 1.0f ? max2(share, LEAST_SHARE) : 1.0f;
}

// `ops.prefill.int8.channel_gains` and 1 over them, from the largest magnitudes of K without its mean and of some of Q.
static inline void gains_of(const float *k, const float *q, int dim, float *gain, float *inverse) {
    const float most_k = largest_of(k, dim), most_q = largest_of(q, dim);
    for (int d = 0; d < dim; d++) {
        gain[d] = sqrtf(share_of(k[d], most_k) / share_of(q[d], most_q));
        inverse[d] = 1.0f / gain[d];
    }
}

// float32 x [TILE][dim], zeros behind the tokens; K without its mean, channels divided by their gains.
static inline void pack_keys(const float *x, int dim, const Tile &tile) {
    const float top = largest_of(x, (int64_t)TILE * dim), inverse = (float)LEVELS / top;
    const int row = dim * SIGNED_BYTES;
    *tile.key_scale = top / (float)LEVELS;
    uint8_t codes[2 * 256];
    for (int t = 0; t < TILE; t++) {
        const int32_t sum = code_row(x + t * dim, dim, inverse, 0, codes);
        tile.base[t] = PAIRS ? 0 : -128 * sum; // the other side is moved by 128
        uint8_t *out = tile.keys + t / PANEL * Tile::key_panel(dim) + t % PANEL * 4;
        for (int i = 0; i < row; i += 4) memcpy(out + i * PANEL, codes + i, 4);
    }
}

static inline void pack_values(const float *x, int dim, const Tile &tile) {
    const float top = largest_of(x, (int64_t)TILE * dim), inverse = (float)LEVELS / top;
    *tile.value_scale = top / (float)LEVELS;
    for (int t = 0; t < TILE; t += 4)
        for (int i = 0; i < dim; i += W) {
            const float *row = x + t * dim + i;
            const vi four = (codes_of(row, inverse) & 255) | (codes_of(row + dim, inverse) & 255) << 8 |
                            (codes_of(row + 2 * dim, inverse) & 255) << 16 | codes_of(row + 3 * dim, inverse) << 24;
            memcpy(tile.values + i / PANEL * Tile::VALUE_PANEL + t / 4 * PANEL_STEP + i % PANEL * 4, &four, sizeof four);
        }
}

} // namespace TA_ISA
