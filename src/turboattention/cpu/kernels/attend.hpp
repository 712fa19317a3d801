// One work item of attention: some rows of one KV head over a run of pages, then (the last part) the exact tokens.
//
// Both products over pages multiply integers: codes as they are and, for K, q times the scales of the channels, for V,
// weights times the scales of the tokens, rounded to 16 bits with one step for each row and page (K) or block (V).
#pragma once
#include "scores.hpp"

namespace TA_ISA {

// Whether codes of V are multiplied as they are packed.
static inline bool values_in_lanes(const TaPageFormat &f) {
#if TA_WIDE && !TA_TILES
    return lanes_fit(f.value_bits, (int64_t)f.page_size * f.value_bits / 8);
#else
    (void)f;
    return false;
#endif
}

#if !TA_TILES
// b.dots[r][token] = folded row r times the codes of K of a page; `ahead` is fetched meanwhile.
static inline void multiply_keys(const TaPageFormat &f, const uint8_t *page, const Rows &rows, const Buffers &b,
                                 Ahead ahead) {
    const int dim = f.head_dim, size = f.page_size;
#if TA_WIDE
    const int64_t bytes = (int64_t)dim * f.key_bits / 8;
    if (lanes_fit(f.key_bits, bytes)) {
        uint8_t *lower = b.sides + ROW_BLOCK * dim;
        halve_rows(b.folded, dim, rows.count, dim, b.sides, lower);
        const int64_t share = ahead.bytes / (size / 16);
        return dot_packed(
            f.key_bits, [&](int) { return page + f.key_codes; },
            [&](int, int t) { return Ahead{ahead.next + t / 16 * share, share}; }, 1, size, bytes, b.sides, lower,
            rows.count, dim, b.dots, size);
    }
#endif
    const uint8_t *codes = key_bytes(f, page, b, Ahead{nullptr, 0});
    dot_rows(codes, dim, size, b.folded, dim, rows.count, dim, b.dots, size, ahead);
}
#endif

// Scores of pages first .. last - 1, and the numbers of V. Meanwhile (pages of a pool are in any order) K and the numbers
// of the next page are fetched; without tiles all of it, because products then take long enough.
static inline void score_block(const TaPageFormat &f, const Item &item, const Rows &rows, const Buffers &b, int first,
                               int last) {
    const int dim = f.head_dim, size = f.page_size;
    float steps[2][ROW_BLOCK], bases[2][ROW_BLOCK];
    for (int p = first; p < last; p++) {
        const uint8_t *page = item.page(p), *next = p + 1 < item.last_page ? item.page(p + 1) : nullptr;
        const int column = (p - first) * size;
        float *step = steps[p % 2], *base = bases[p % 2];
        fold_page(f, page, rows, b, column, step, base);
#if TA_TILES
        const uint8_t *codes = key_bytes(f, page, b, Ahead{next, next ? f.value_codes : 0});
        const int64_t numbers = f.value_codes + (int64_t)dim * size * f.value_bits / 8;
        if (next) Ahead{next + numbers, max2(f.value_scale, f.value_zero) + size - numbers}.fetch(f.nbytes);
        // Products of tiles take long to come back from memory: those of the page before are read now.
        int32_t *sums = b.sums + p % 2 * LARGEST_PAGE * TILE_ROWS, *before = b.sums + (p + 1) % 2 * LARGEST_PAGE * TILE_ROWS;
        if (p > first) finish_page(f, rows, b, column - size, before, steps[(p + 1) % 2], bases[(p + 1) % 2]);
        multiply_operands(codes, dim, size, b.operands, rows.count, dim, sums);
        value_numbers(f, page, b, column);
        if (p + 1 == last) finish_page(f, rows, b, column, sums, step, base);
#else
        // V of the next block is fetched while V is multiplied, where that is done in lanes.
        const bool later = values_in_lanes(f) && p + BLOCK_TOKENS / size < item.last_page;
        const int64_t numbers = f.value_codes + (int64_t)dim * size * f.value_bits / 8;
        if (next && later) Ahead{next + numbers, f.nbytes - numbers}.fetch(f.nbytes);
        multiply_keys(f, page, rows, b, Ahead{next, !next ? 0 : later ? f.value_codes : f.nbytes});
        finish_page(f, rows, b, column, b.dots, step, base);
        value_numbers(f, page, b, column);
#endif
    }
}

// b.dots[r][channel] = weights of pages first .. last - 1 times codes of V. With tiles 64 channels at a time, which stay in
// the first cache, and V of the next block is fetched.
static inline void weigh_values(const TaPageFormat &f, const Item &item, const Rows &rows, const Buffers &b, int first,
                                int last) {
    const int dim = f.head_dim, size = f.page_size, count = (last - first) * size;
#if TA_TILES
    const int64_t row = (int64_t)size * f.value_bits / 8;
    pack_operands(b.weights, BLOCK_TOKENS, rows.count, count, b.operands);
    for (int d = 0; d < dim; d += TILE_BYTES) {
        const int here = min2(TILE_BYTES, dim - d);
        for (int p = first; p < last; p++) {
            const int later = p + BLOCK_TOKENS / size;
            const bool more = later < item.last_page;
            const Ahead ahead{more ? item.page(later) + f.value_codes + d * row : nullptr, more ? here * row : 0};
            value_bytes(f, item.page(p), b, (p - first) * size, d, here, ahead);
        }
        multiply_operands(b.value_codes, BLOCK_TOKENS, here, b.operands, rows.count, count, b.sums + d * TILE_ROWS);
    }
    join_sums(b.sums, dim, rows.count, [&](int r, int d, vi x) { memcpy(b.dots + r * dim + d, &x, sizeof x); });
#else
#if TA_WIDE
    const int64_t bytes = (int64_t)size * f.value_bits / 8;
    if (values_in_lanes(f)) {
        uint8_t *lower = b.sides + ROW_BLOCK * BLOCK_TOKENS;
        halve_rows(b.weights, BLOCK_TOKENS, rows.count, count, b.sides, lower);
        const auto ahead = [&](int p, int d) {
            const int later = first + p + BLOCK_TOKENS / size;
            const bool more = later < item.last_page;
            return Ahead{more ? item.page(later) + f.value_codes + d * bytes : nullptr, more ? 16 * bytes : 0};
        };
        return dot_packed(
            f.value_bits, [&](int p) { return item.page(first + p) + f.value_codes; }, ahead, last - first, dim, bytes,
            b.sides, lower, rows.count, count, b.dots, dim);
    }
#endif
    for (int p = first; p < last; p++)
        value_bytes(f, item.page(p), b, (p - first) * size, 0, dim, Ahead{nullptr, 0});
    dot_rows(b.value_codes, BLOCK_TOKENS, dim, b.weights, BLOCK_TOKENS, rows.count, count, b.dots, dim);
#endif
}

// Pages first .. last - 1 (at most BLOCK_TOKENS tokens) into the running softmax of all rows.
static inline void attend_block(const TaPageFormat &f, const Item &item, const Rows &rows, const Buffers &b, int first,
                                int last) {
    const int dim = f.head_dim, size = f.page_size, count = (last - first) * size;
    score_block(f, item, rows, b, first, last);
    float step[ROW_BLOCK], shift[ROW_BLOCK];
    const float middle = -0.5f * (float)((1 << f.value_bits) - 1);
    for (int r = 0; r < rows.count; r++) {
        float *s = b.scores + (int64_t)r * BLOCK_TOKENS;
        finish_scores(rows, r, s, first * size, count);
        for (int c = item.sink_low; c < item.sink_high; c++) // read exactly, elsewhere
            if (c >= first * size && c < last * size) s[c - first * size] = NEG_INF;
        b.keep[r] = take_scores(rows, r, s, count);
        vf zeros = vf{};
        if (f.value_zero >= 0)
            for (int t = 0; t < count; t += W) zeros += load(s + t) * load(b.value_zero + t);
        vf largest = vf{}, other = vf{}; // weights are not negative
        for (int t = 0; t < count; t += 2 * W) {
            const vf x = load(s + t) * load(b.value_scale + t), y = load(s + t + W) * load(b.value_scale + t + W);
            store(s + t, x), store(s + t + W, y);
            largest = vmax(largest, x), other = vmax(other, y);
        }
        largest = vmax(largest, other);
        int32_t total;
        step[r] = to_int16<true>(s, count, max2(max_of(largest), LEAST_TOP), b.weights + r * BLOCK_TOKENS, &total);
        // Zeros belong to the rounded weights; float zeros are small beside the codes.
        shift[r] = f.value_zero >= 0 ? sum_of(zeros) : middle * (float)total * step[r];
    }
    weigh_values(f, item, rows, b, first, last);
    for (int r = 0; r < rows.count; r++) {
        if (b.keep[r] < 0.0f) continue;
        float *acc = rows.acc + r * dim;
        for (int i = 0; i < dim; i += W)
            store(acc + i, load(acc + i) * b.keep[r] + (vi_to_vf(load_as<vi>(b.dots + r * dim + i)) * step[r] + shift[r]));
    }
}

// Exact tokens at rows `element(t)` of two tensors, columns `column ..`.
template <class Place>
static inline void attend_exact(const TaAttention &a, const TaTensor &key, const TaTensor &value, const Rows &rows,
                                const Buffers &b, int column, int count, Place place) {
    const int dim = a.head_dim, padded = (count + W - 1) / W * W;
    float *k = b.plane, *v = b.plane + EXACT_TOKENS * dim;
    for (int t = 0; t < count; t++) {
        read_row(key, place(key, t), dim, 1.0f, k + t * dim);
        read_row(value, place(value, t), dim, 1.0f, v + t * dim);
    }
    dot_float_rows(k, dim, count, rows.q, dim, rows.count, dim, b.scores, BLOCK_TOKENS);
    for (int r = 0; r < rows.count; r++) {
        float *s = b.scores + (int64_t)r * BLOCK_TOKENS;
        for (int t = count; t < padded; t++) s[t] = 0.0f;
        finish_scores(rows, r, s, column, padded);
        for (int t = count; t < padded; t++) s[t] = NEG_INF;
        const float keep = take_scores(rows, r, s, padded);
        if (keep >= 0.0f && keep != 1.0f) scale_row(rows.acc + r * dim, dim, keep);
    }
    add_float_rows(b.scores, BLOCK_TOKENS, v, dim, count, dim, rows.acc, dim, rows.count);
}

static int64_t buffer_bytes(const TaAttention &a, int refined) { return Buffers(nullptr, a, refined).used; }

// Rows of `item` over its part of the cache: acc, top and sum, to `part` or, finished, to the output.
static void attend_item(const TaAttention &a, const Item &item, uint8_t *memory, int refined, float *part) {
    const Buffers b(memory, a, refined);
    const int dim = a.head_dim;
#if TA_TILES
    const TileScope tiles(dim);
#endif
    Rows rows{item.rows, b.low, b.high, b.q, b.acc, b.top, b.sum, a.softcap};
    // Without a soft cap scores are in log2 units from the start.
    const float factor = a.softcap > 0.0f ? a.scale : a.scale * LOG2E;
    int low = 0x7fffffff, high = 0;
    for (int r = 0; r < item.rows; r++) {
        read_row(a.q, item.element(a.q, r), dim, factor, b.q + r * dim);
        item.range(r, &b.low[r], &b.high[r]);
        low = min2(low, b.low[r]), high = max2(high, b.high[r]);
        b.top[r] = NEG_INF, b.sum[r] = 0.0f;
    }
    memset(b.acc, 0, 4 * (size_t)item.rows * dim);
    if (item.last_page > item.first_page) {
        const TaPageFormat &f = *item.format;
        const int size = f.page_size, step = BLOCK_TOKENS / size;
        const int first = max2(item.first_page, low / size), last = min2(item.last_page, (high + size - 1) / size);
        for (int p = first; p < last; p += step) attend_block(f, item, rows, b, p, min2(p + step, last));
        if (f.rotation > 1) {
            const float norm = item.rotation_norm;
            for (int r = 0; r < item.rows; r++) {
                rotate_row(b.acc + r * dim, dim, f.rotation);
                scale_row(b.acc + r * dim, dim, norm);
            }
        }
    }
    if (item.with_exact) {
        for (int c = item.sink_low; c < item.sink_high; c += EXACT_TOKENS) {
            const int slot = c - item.sink_low, count = min2(EXACT_TOKENS, item.sink_high - c);
            attend_exact(a, a.sink_key, a.sink_value, rows, b, c, count, [&](const TaTensor &x, int t) {
                return item.b * x.batch + item.h * x.head + (slot + t) * x.token;
            });
        }
        for (int c = item.page_tokens; c < min2(item.length, high); c += EXACT_TOKENS) {
            const int count = min2(EXACT_TOKENS, item.length - c);
            if (c + count <= low) continue;
            attend_exact(a, a.tail_key, a.tail_value, rows, b, c, count, [&](const TaTensor &x, int t) {
                const int slot = a.capacity ? (c + t) % a.capacity : c + t - item.page_tokens;
                return item.b * x.batch + item.h * x.head + slot * x.token;
            });
        }
    }
    if (part) {
        memcpy(part, b.top, 4 * (size_t)item.rows);
        memcpy(part + item.rows, b.sum, 4 * (size_t)item.rows);
        memcpy(part + 2 * item.rows, b.acc, 4 * (size_t)item.rows * dim);
        return;
    }
    for (int r = 0; r < item.rows; r++) item.write(a, r, b.top[r], b.sum[r], b.acc + r * dim);
}

// Puts the partial results of the same rows together, always in the same order.
static void merge_parts(const TaAttention &a, const Item &item, const float *parts, int count, float *acc) {
    const int dim = a.head_dim, rows = item.rows;
    const int64_t size = (int64_t)rows * (dim + 2);
    for (int r = 0; r < rows; r++) {
        float top = NEG_INF, sum = 0.0f;
        for (int i = 0; i < count; i++) top = max2(top, parts[i * size + r]);
        memset(acc, 0, 4 * (size_t)dim);
        for (int i = 0; i < count && top != NEG_INF; i++) {
            const float *part = parts + i * size;
            if (part[r] == NEG_INF) continue;
            const float weight = exp2_negative(splat(part[r] - top))[0];
            sum += weight * part[rows + r];
            for (int d = 0; d < dim; d += W)
                store(acc + d, load(acc + d) + load(part + 2 * rows + (int64_t)r * dim + d) * weight);
        }
        item.write(a, r, top, sum, acc);
    }
}

} // namespace TA_ISA
