// One work item of INT8 prefill: 64 queries of a head over the tiles that they see (ops/prefill/README.md, "A tile").
#pragma once
#include "chunk_pack.hpp"

namespace TA_ISA {

constexpr int CHUNK_ROWS = 64; // queries that share a scale

// A sequence of the call: its tokens among the caller's, and its tiles in packed memory.
struct Sequence {
    int64_t first_q, first_k, first_tile; // the last: of its first KV head
    int queries, tokens, tiles;
};

// What the operands of a KV head of a sequence are made with, for each channel.
struct Channels {
    float *mean, *gain, *inverse; // of K; of Q; 1 over it
    static constexpr int VECTORS = 3;

    Channels(float *memory, int dim) : mean(memory), gain(memory + dim), inverse(memory + 2 * dim) {}
};

struct ChunkRows {
    uint8_t *q, *weights;
    int32_t *scores;
    float *x, *acc, *top, *sum, *keep, *factor, *shift;
    int64_t used;

    ChunkRows(uint8_t *memory, int dim) {
        uint8_t *next = memory;
        auto take = [&](int64_t bytes) {
            uint8_t *p = next;
            next += (bytes + 63) & ~(int64_t)63;
            return p;
        };
        q = take((int64_t)CHUNK_ROWS * dim * SIGNED_BYTES);
        weights = take(CHUNK_ROWS * TILE);
        scores = (int32_t *)take(4 * CHUNK_ROWS * TILE);
        x = (float *)take(4 * (int64_t)TILE * dim); // also the floats of a tile that is packed
        acc = (float *)take(4 * (int64_t)CHUNK_ROWS * dim);
        top = (float *)take(4 * CHUNK_ROWS);
        sum = (float *)take(4 * CHUNK_ROWS);
        keep = (float *)take(4 * CHUNK_ROWS);
        factor = (float *)take(4 * CHUNK_ROWS);
        shift = (float *)take(4 * CHUNK_ROWS);
        used = next - memory;
    }
};

// Scores of W tokens to weights round(127 * 2^(c (score - largest))); relative error of the power 1e-4.
static inline vi weights_of(const int32_t *scores, int32_t largest, float c) {
    constexpr float LOG2_LEVELS = 6.9886846867721655f;
    vf y = vi_to_vf(load_as<vi>(scores) - largest) * c + LOG2_LEVELS;
    y = vmax(y, splat(-10.0f)); // rounds to 0 long before
    const vf shifted = y + MAGIC, f = y - (shifted - MAGIC);
    vf p = splat(5.517167e-2f);
    p = p * f + 2.4261114e-1f;
    p = p * f + 6.9326099e-1f;
    p = p * f + 9.9992807e-1f;
    const vf power = (vf)(bits_of(p) + (bits_of(shifted) << 23));
#if TA_WIDE
    return (vi)_mm512_cvtps_epi32((__m512)power);
#else
    return bits_of(power + MAGIC) - 0x4b400000;
#endif
}

// Weights of `columns` tokens (a multiple of 16); returns their sum.
static inline int32_t store_weights(const int32_t *scores, int columns, int32_t largest, float c, uint8_t *out) {
    int i = 0;
#if TA_WIDE
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i sums = _mm512_setzero_si512();
    for (; i + 64 <= columns; i += 64) {
        __m512i w[4];
        for (int k = 0; k < 4; k++) w[k] = (__m512i)weights_of(scores + i + 16 * k, largest, c);
        const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(w[0], w[1]), _mm512_packs_epi32(w[2], w[3]));
        const __m512i bytes = _mm512_permutexvar_epi32(order, packed);
        sums = _mm512_dpbusd_epi32(sums, bytes, _mm512_set1_epi8(1));
        _mm512_storeu_si512(out + i, bytes);
    }
    vi total = (vi)sums;
    for (; i < columns; i += 16) {
        const vi w = weights_of(scores + i, largest, c);
        store_bytes(out + i, w);
        total += w;
    }
#elif defined(__AVX2__)
    vi total = vi{};
    for (; i < columns; i += 16) {
        const vi low = weights_of(scores + i, largest, c), high = weights_of(scores + i + 8, largest, c);
        total += low + high;
        const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)low, (__m256i)high), 0xd8);
        _mm_storeu_si128((__m128i *)(out + i),
                         _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
    }
#else
    vi total = vi{};
    for (; i < columns; i += W) {
        const vi w = weights_of(scores + i, largest, c);
        store_bytes(out + i, w);
        total += w;
    }
#endif
    return sum_of(total);
}

static inline int32_t sum_of_bytes(const uint8_t *x, int count) {
    int32_t sum = 0;
    for (int i = 0; i < count; i++) sum += x[i];
    return sum;
}

// Weights of a row over `columns` tokens (a multiple of 16), of which it sees low .. high - 1. Returns whether any, and
// then their largest score and the sum of the weights.
static inline bool weigh_row(int32_t *scores, int columns, int low, int high, float c, uint8_t *weights, int32_t *largest,
                             int32_t *sum) {
    low = max2(low, 0), high = min2(high, columns);
    if (high <= low) {
        memset(weights, 0, (size_t)columns);
        return false;
    }
    constexpr int32_t HIDDEN = -(1 << 30); // below every score: 127 * 127 * 256 at most
    for (int i = 0; i < low; i++) scores[i] = HIDDEN;
    for (int i = high; i < columns; i++) scores[i] = HIDDEN;
    vi top = load_as<vi>(scores);
    for (int i = W; i < columns; i += W) top = imax(top, load_as<vi>(scores + i));
    *largest = max_of(top);
    *sum = store_weights(scores, columns, *largest, c, weights);
    if (low == 0 && high == columns) return true;
    // c may be so small that a hidden score has a weight.
    memset(weights, 0, (size_t)low);
    memset(weights + high, 0, (size_t)(columns - high));
    *sum = sum_of_bytes(weights, columns);
    return true;
}

// Scores of a tile into the running softmax: weights, and the factors of what was summed before and of this tile.
static inline void weigh_tile(const ChunkRows &b, int rows, int columns, const int *low, const int *high, int first,
                              float c, float value_scale) {
    float tops[CHUNK_ROWS], sums[CHUNK_ROWS];
    for (int r = 0; r < CHUNK_ROWS; r++) {
        int32_t most = 0, sum = 0;
        const bool any = r < rows && weigh_row(b.scores + r * TILE, columns, low[r] - first, high[r] - first, c,
                                               b.weights + r * TILE, &most, &sum);
        tops[r] = any ? c * (float)most : NEG_INF;
        sums[r] = (float)sum;
    }
    for (int r = 0; r < CHUNK_ROWS; r += W) {
        const vf here = load(tops + r), before = load(b.top + r), top = vmax(here, before);
        // Finite where nothing was seen yet: both differences are then far below 0, and the factors 0.
        const vf reference = vmax(top, splat(-1e30f));
        const vf keep = exp2_negative(before - reference), weight = exp2_negative(here - reference);
        store(b.top + r, top);
        store(b.sum + r, load(b.sum + r) * keep + load(sums + r) * weight);
        store(b.keep + r, keep);
        store(b.factor + r, weight * value_scale);
    }
}

// Reads 64 queries, rounds them times the gains, and keeps what smoothing K took from their scores.
static inline float read_queries(const TaPrefill &a, const TaTensor &q, int64_t element, int rows, const Channels &of,
                                 const ChunkRows &b) {
    const int dim = a.head_dim;
    for (int r = 0; r < rows; r++) {
        float *x = b.x + r * dim;
        read_row(q, element + r * q.token, dim, a.scale * LOG2E, x);
        vf product = vf{};
        for (int i = 0; i < dim; i += W) {
            product += load(x + i) * load(of.mean + i);
            store(x + i, load(x + i) * load(of.gain + i));
        }
        b.shift[r] = sum_of(product) / LOG2E;
    }
    const float top = largest_of(b.x, (int64_t)rows * dim), inverse = (float)LEVELS / top;
    const int row = dim * SIGNED_BYTES;
    for (int r = 0; r < rows; r++) code_row(b.x + r * dim, dim, inverse, 128, b.q + r * row);
    for (int r = rows; r % 4; r++) memset(b.q + r * row, 0, (size_t)row);
    return top / (float)LEVELS;
}

static void attend_chunk(const TaPrefill &a, const Sequence &s, int number, int h, int block, const uint8_t *tiles,
                         const Channels &of, uint8_t *memory) {
#if TA_TILES
    const TileScope tiles_of(a.head_dim);
#endif
    const ChunkRows b(memory, a.head_dim);
    const int dim = a.head_dim, first_row = block * CHUNK_ROWS, rows = min2(CHUNK_ROWS, s.queries - first_row);
    const int padded = (rows + 3) / 4 * 4;
    const int64_t element = number * a.q.batch + h * a.q.head + (s.first_q + first_row) * a.q.token;
    const float q_scale = read_queries(a, a.q, element, rows, of, b);
    int low[CHUNK_ROWS], high[CHUNK_ROWS];
    for (int r = 0; r < CHUNK_ROWS; r++) {
        const int at = s.tokens - s.queries + first_row + r;
        high[r] = r >= rows ? 0 : a.causal ? at + 1 : s.tokens;
        low[r] = a.window ? at - a.window + 1 : 0;
        b.top[r] = NEG_INF, b.sum[r] = 0.0f;
    }
    memset(b.acc, 0, 4 * (size_t)padded * dim);
    const int end = min2(s.tokens, high[rows - 1]);
    for (int t = max2(0, low[0]) / TILE; t * TILE < end; t++) {
        const Tile tile((uint8_t *)tiles + t * Tile::bytes(dim), dim);
        const int columns = (min2(TILE, end - t * TILE) + COLUMN_STEP - 1) / COLUMN_STEP * COLUMN_STEP;
        panel_sums<true>(b.q, dim * SIGNED_BYTES, padded, tile.keys, Tile::key_panel(dim), columns / PANEL,
                         dim * SIGNED_BYTES / 4, tile.base, b.scores, TILE);
        weigh_tile(b, rows, columns, low, high, t * TILE, q_scale * *tile.key_scale, *tile.value_scale);
        panel_products<false>(b.weights, TILE, padded, tile.values, Tile::VALUE_PANEL, dim / PANEL, columns / 4, nullptr,
                              [&](int r, int c, Lanes x) {
                                  float *acc = b.acc + r * dim + c;
                                  typedef float floats __attribute__((vector_size(sizeof(Lanes))));
                                  typedef int32_t ints __attribute__((vector_size(sizeof(Lanes))));
                                  const floats now = __builtin_convertvector((ints)x, floats) * b.factor[r];
                                  const floats sum = load_as<floats>(acc) * b.keep[r] + now;
                                  memcpy(acc, &sum, sizeof sum);
                              });
    }
    for (int r = 0; r < rows; r++) {
        float *acc = b.acc + r * dim;
        const float inverse = b.sum[r] > 0.0f ? 1.0f / b.sum[r] : 0.0f;
        for (int i = 0; i < dim; i += W) store(acc + i, load(acc + i) * inverse);
        const int64_t token = s.first_q + first_row + r;
        write_row(a.out, number * a.out.batch + h * a.out.head + token * a.out.token, dim, acc);
        const double lse = 0.6931471805599453 * (b.top[r] + log2(b.sum[r] / (double)LEVELS)) + b.shift[r];
        a.lse[number * a.lse_batch + h * a.lse_head + token] = b.sum[r] > 0.0f ? (float)lse : NEG_INF;
    }
}

} // namespace TA_ISA
