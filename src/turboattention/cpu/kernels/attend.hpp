// One work item of attention: some rows of one KV head over a run of pages, then (the last part) the exact tokens.
//
// Both products over pages multiply integers: codes as they are and, for K, q times the scales of the channels, for V,
// weights times the scales of the tokens, rounded to 16 bits with one step for each row and page (K) or block (V).
#pragma once
#include "dot.hpp"
#include "item.hpp"
#include "softmax.hpp"
#include "unpack.hpp"

namespace TA_ISA {

// Buffers of one thread, cut from one allocation; sizes in `item.hpp`.
struct Buffers {
    uint8_t *key_codes, *value_codes;
    int16_t *folded, *weights;
    float *q, *scores, *acc, *scale, *zero, *plane, *refined_q, *top, *sum, *value_scale, *value_zero, *keep;
    int32_t *dots, *low, *high;

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
        folded = (int16_t *)take(2 * ROW_BLOCK * dim);
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
        used = next - memory;
    }
    int64_t used;
};

// Scores of one page into columns `column ..` of every row's scores.
static inline void page_scores(const TaPageFormat &f, const uint8_t *page, const Rows &rows, const Buffers &b, int column,
                               Ahead ahead) {
    const int dim = f.head_dim, size = f.page_size;
    const uint8_t *codes = page + f.key_codes;
    if (f.key_bits != 8) {
        unpack_rows(f.key_bits, codes, size, dim, b.key_codes, dim);
        codes = b.key_codes;
    }
    key_metadata(f, page, b.scale, b.zero);
    if (f.refined) refined_plane(f, page, b.plane);
    const float unit = 1.0f / (float)(1 << f.refined_bits);
    float step[ROW_BLOCK], base[ROW_BLOCK];
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
        base[r] = sum_of(shift);
        step[r] = to_int16<false>(product, dim, max2(max_of(largest), 1e-30f), b.folded + r * dim, &unused);
        if (f.refined) {
            float *s = b.scores + (int64_t)r * BLOCK_TOKENS + column;
            const uint8_t *index = page + f.key_refined_index;
            for (int j = 0; j < f.refined; j++) b.refined_q[j] = product[index[j]] * unit;
            for (int t = 0; t < size; t += 4 * W) { // pages hold 64 or 128 tokens
                vf s0 = vf{}, s1 = vf{}, s2 = vf{}, s3 = vf{};
                for (int j = 0; j < f.refined; j++) {
                    const float *p = b.plane + j * size + t;
                    vf x = splat(b.refined_q[j]);
                    s0 += x * load(p), s1 += x * load(p + W), s2 += x * load(p + 2 * W), s3 += x * load(p + 3 * W);
                }
                store(s + t, s0), store(s + t + W, s1), store(s + t + 2 * W, s2), store(s + t + 3 * W, s3);
            }
        }
    }
    dot_rows(codes, dim, size, b.folded, dim, rows.count, dim, b.dots, size, ahead);
    for (int r = 0; r < rows.count; r++) {
        float *s = b.scores + (int64_t)r * BLOCK_TOKENS + column;
        const int32_t *dots = b.dots + r * size;
        for (int t = 0; t < size; t += W) {
            vf x = vi_to_vf(load_as<vi>(dots + t)) * step[r] + base[r];
            if (f.refined) x += load(s + t);
            store(s + t, x);
        }
    }
}

// Pages first .. last - 1 (at most BLOCK_TOKENS tokens) into the running softmax of all rows.
static inline void attend_block(const TaPageFormat &f, const Item &item, const Rows &rows, const Buffers &b, int first,
                                int last) {
    const int dim = f.head_dim, size = f.page_size, count = (last - first) * size;
    for (int p = first; p < last; p++) {
        const uint8_t *page = item.page(p);
        // The next page while this one is computed with; pages of a pool are in any order.
        const Ahead ahead = p + 1 < item.last_page ? Ahead{item.page(p + 1), f.nbytes} : Ahead{nullptr, 0};
        page_scores(f, page, rows, b, (p - first) * size, ahead);
    }
    for (int p = first; p < last; p++) {
        const uint8_t *page = item.page(p);
        const int column = (p - first) * size;
        unpack_rows(f.value_bits, page + f.value_codes, dim, size, b.value_codes + column, BLOCK_TOKENS);
        scaled_bytes(page + f.value_scale, size, float16_at(page, f.value_page_scale) / 255.0f, b.value_scale + column);
        if (f.value_zero >= 0)
            scaled_bytes((const int8_t *)(page + f.value_zero), size, float16_at(page, f.value_page_zero) / 127.0f,
                         b.value_zero + column);
    }
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
        vf largest = vf{}; // weights are not negative
        for (int t = 0; t < count; t += W) {
            vf x = load(s + t) * load(b.value_scale + t);
            store(s + t, x);
            largest = vmax(largest, x);
        }
        int32_t total;
        step[r] = to_int16<true>(s, count, max2(max_of(largest), 1e-30f), b.weights + r * BLOCK_TOKENS, &total);
        // Zeros belong to the rounded weights; float zeros are small beside the codes.
        shift[r] = f.value_zero >= 0 ? sum_of(zeros) : middle * (float)total * step[r];
    }
    dot_rows(b.value_codes, BLOCK_TOKENS, dim, b.weights, BLOCK_TOKENS, rows.count, count, b.dots, dim);
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
