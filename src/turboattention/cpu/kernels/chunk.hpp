// INT8 prefill of a batch (`ops.prefill.int8`): means and gains, K and V as tiles, then 64 queries of a head at once.
#pragma once
#include <stdlib.h>

#include "chunk_item.hpp"
#include "threads.hpp"

namespace TA_ISA {

struct Chunk {
    const TaPrefill *call;
    const Sequence *sequences;
    const int32_t *of_tile, *of_block; // pairs: sequence, tile or block of queries
    float *channels;                   // [batch][kv_heads][Channels::VECTORS][head_dim]
    uint8_t *tiles;

    Channels of(int b, int h) const {
        const int64_t size = (int64_t)Channels::VECTORS * call->head_dim;
        return Channels(channels + ((int64_t)b * call->kv_heads + h) * size, call->head_dim);
    }
    uint8_t *tile(int b, int h, int t) const {
        const Sequence &s = sequences[b];
        return tiles + (s.first_tile + (int64_t)h * s.tiles + t) * Tile::bytes(call->head_dim);
    }
};

// Token i of `count` that are spread over a sequence (`ops.prefill.int8.spread`).
static inline int64_t spread(int64_t i, int64_t count, int64_t length) {
    const int64_t first = i * length / count, size = (i + 1) * length / count - first;
    return first + ((i * 40503 & 0xFFFF) * size >> 16);
}

// Largest magnitude of each channel in some rows of the queries of KV head h.
static void sample_queries(const TaPrefill &a, const Sequence &s, int b, int h, float *row, float *most) {
    const int dim = a.head_dim, ratio = a.heads / a.kv_heads;
    for (int d = 0; d < dim; d++) most[d] = 0.0f;
    for (int i = 0; s.queries > 0 && i < QUERY_SAMPLES; i++) {
        const int64_t token = s.first_q + spread(i, QUERY_SAMPLES, s.queries);
        read_row(a.q, b * a.q.batch + (h * ratio + i % ratio) * a.q.head + token * a.q.token, dim, 1.0f, row);
        for (int d = 0; d < dim; d += W) store(most + d, vmax(load(most + d), vabs(load(row + d))));
    }
}

static void measure_channels(void *context, int i, uint8_t *scratch) {
    const Chunk &c = *(const Chunk *)context;
    const TaPrefill &a = *c.call;
    const int b = i / a.kv_heads, h = i % a.kv_heads, dim = a.head_dim;
    const Sequence &s = c.sequences[b];
    const Channels of = c.of(b, h);
    float *row = (float *)scratch, *query = row + dim, *high = query + dim, *low = high + dim; // low: largest of -k
    for (int d = 0; d < dim; d++) of.mean[d] = 0.0f, high[d] = low[d] = NEG_INF;
    const int count = min2(KEY_SAMPLES, s.tokens);
    for (int i = 0; i < count; i++) {
        const int64_t token = s.first_k + spread(i, count, s.tokens);
        read_row(a.key, b * a.key.batch + h * a.key.head + token * a.key.token, dim, 1.0f, row);
        for (int d = 0; d < dim; d += W) {
            const vf x = load(row + d);
            store(of.mean + d, load(of.mean + d) + x);
            store(high + d, vmax(load(high + d), x)), store(low + d, vmax(load(low + d), -x));
        }
    }
    for (int d = 0; d < dim; d += W) {
        const vf mean = load(of.mean + d) / (float)max2(count, 1);
        store(of.mean + d, mean);
        store(high + d, vmax(load(high + d) - mean, load(low + d) + mean));
    }
    sample_queries(a, s, b, h, row, query);
    gains_of(high, query, dim, of.gain, of.inverse);
}

static void pack_tile(void *context, int i, uint8_t *scratch) {
    const Chunk &c = *(const Chunk *)context;
    const TaPrefill &a = *c.call;
    const int b = c.of_tile[2 * (i / a.kv_heads)], t = c.of_tile[2 * (i / a.kv_heads) + 1], h = i % a.kv_heads;
    const int dim = a.head_dim, first = t * TILE;
    const Sequence &s = c.sequences[b];
    const int count = min2(TILE, s.tokens - first);
    float *x = ChunkRows(scratch, dim).x;
    const Channels of = c.of(b, h);
    const Tile tile(c.tile(b, h, t), dim);
    for (int side = 0; side < 2; side++) {
        const TaTensor &from = side ? a.value : a.key;
        for (int r = 0; r < count; r++) {
            float *row = x + r * dim;
            read_row(from, b * from.batch + h * from.head + (s.first_k + first + r) * from.token, dim, 1.0f, row);
            for (int d = 0; !side && d < dim; d += W)
                store(row + d, (load(row + d) - load(of.mean + d)) * load(of.inverse + d));
        }
        memset(x + count * dim, 0, 4 * (size_t)(TILE - count) * dim);
        if (side) pack_values(x, dim, tile);
        else pack_keys(x, dim, tile);
    }
}

static void attend_block_of_queries(void *context, int i, uint8_t *scratch) {
    const Chunk &c = *(const Chunk *)context;
    const TaPrefill &a = *c.call;
    const int b = c.of_block[2 * (i / a.heads)], block = c.of_block[2 * (i / a.heads) + 1], h = i % a.heads;
    const int kv = h / (a.heads / a.kv_heads);
    attend_chunk(a, c.sequences[b], b, h, block, c.tile(b, kv, 0), c.of(b, kv), scratch);
}

// Lengths of sequence b, or false where they do not lie in the tensors.
static inline bool read_sequence(const TaPrefill &a, int b, Sequence *s) {
    *s = Sequence{0, 0, 0, a.tokens_q, a.tokens_k, 0};
    if (a.cu_q) {
        s->first_q = a.cu_q[b], s->first_k = a.cu_k[b];
        s->queries = a.cu_q[b + 1] - a.cu_q[b], s->tokens = a.cu_k[b + 1] - a.cu_k[b];
    }
    s->tiles = (s->tokens + TILE - 1) / TILE;
    return s->first_q >= 0 && s->first_k >= 0 && s->queries >= 0 && s->tokens >= 0 &&
           s->first_q + s->queries <= a.tokens_q && s->first_k + s->tokens <= a.tokens_k;
}

static int run_prefill(const TaPrefill *call) {
    const TaPrefill &a = *call;
    int64_t tiles = 0, blocks = 0;
    for (int b = 0; b < a.batch; b++) {
        Sequence s;
        if (!read_sequence(a, b, &s)) return TA_BAD_LENGTHS;
        tiles += s.tiles, blocks += (s.queries + CHUNK_ROWS - 1) / CHUNK_ROWS;
    }
    auto aligned = [](int64_t bytes) { return (bytes + 63) & ~(int64_t)63; };
    const int64_t table = aligned(a.batch * (int64_t)sizeof(Sequence)), numbers = aligned(8 * (tiles + blocks));
    const int64_t channels = aligned(4 * (int64_t)a.batch * a.kv_heads * Channels::VECTORS * a.head_dim);
    const int64_t packed = tiles * a.kv_heads * aligned(Tile::bytes(a.head_dim));
    void *memory = nullptr;
    if (posix_memalign(&memory, 64, (size_t)(table + numbers + channels + packed + 64)) != 0) return TA_NO_MEMORY;
    Sequence *sequences = (Sequence *)memory;
    int32_t *of_tile = (int32_t *)((uint8_t *)memory + table), *of_block = of_tile + 2 * tiles;
    Chunk chunk{call, sequences, of_tile, of_block, (float *)((uint8_t *)memory + table + numbers), nullptr};
    chunk.tiles = (uint8_t *)chunk.channels + channels;
    int64_t tile = 0, block = 0;
    for (int b = 0; b < a.batch; b++) {
        Sequence &s = sequences[b];
        read_sequence(a, b, &s);
        s.first_tile = tile * a.kv_heads;
        for (int t = 0; t < s.tiles; t++, tile++) of_tile[2 * tile] = b, of_tile[2 * tile + 1] = t;
        // The last queries see most: they go first, so that no thread begins the longest work at the end.
        for (int n = (s.queries + CHUNK_ROWS - 1) / CHUNK_ROWS - 1; n >= 0; n--, block++)
            of_block[2 * block] = b, of_block[2 * block + 1] = n;
    }
    const int64_t scratch = ChunkRows(nullptr, a.head_dim).used;
    const bool done = ta_parallel(a.threads, a.batch * a.kv_heads, scratch, measure_channels, &chunk) &&
                      ta_parallel(a.threads, (int)(tiles * a.kv_heads), scratch, pack_tile, &chunk) &&
                      ta_parallel(a.threads, (int)(blocks * a.heads), scratch, attend_block_of_queries, &chunk);
    free(memory);
    return done ? TA_OK : TA_NO_MEMORY;
}

} // namespace TA_ISA
