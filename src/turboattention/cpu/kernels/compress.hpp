// Compression of whole pages: the bytes of `quant.codec.encode_pages`.
#pragma once
#include <stdlib.h>

#include "encode.hpp"
#include "threads.hpp"

namespace TA_ISA {

struct PageJob {
    const TaCompress *call;
    int failed;
};

// K or V of one page as floats [tokens][dim]; true where a token counts.
static inline void read_page(const TaTensor &x, const TaPageFormat &f, int b, int h, int page, float *out) {
    for (int t = 0; t < f.page_size; t++) {
        const int64_t element = b * x.batch + h * x.head + ((int64_t)page * f.page_size + t) * x.token;
        read_row(x, element, f.head_dim, 1.0f, out + t * f.head_dim);
    }
}

// Channels in the order of the largest expected score error, of equal ones the first: ascending indices of `count`.
static inline void choose_refined(const float *scale, const float *power, int dim, int count, uint8_t *chosen) {
    float harm[MAX_ROW];
    for (int i = 0; i < dim; i++) harm[i] = scale[i] * scale[i];
    for (int i = 0; power && i < dim; i++) harm[i] = harm[i] * power[i];
    int next = 0;
    for (int i = 0; i < dim; i++) {
        int before = 0;
        for (int j = 0; j < dim; j++) before += harm[j] > harm[i] || (harm[j] == harm[i] && j < i);
        if (before < count) chosen[next++] = (uint8_t)i;
    }
}

static inline bool encode_key(const TaPageFormat &f, float *x, const uint8_t *valid, const float *power, uint8_t *page) {
    const int dim = f.head_dim, size = f.page_size, fine_bits = f.key_bits + f.refined_bits;
    float scale[MAX_ROW], zero[MAX_ROW], fine_scale[MAX_ROW], fine_zero[MAX_ROW];
    bool any = !valid;
    for (int t = 0; valid && t < size; t++) any = any || valid[t];
    for (int i = 0; i < dim; i += W) {
        vf low = splat(-NEG_INF), high = splat(NEG_INF);
        for (int t = 0; t < size; t++) {
            if (valid && !valid[t]) continue;
            const vf v = load(x + t * dim + i);
            low = vmin(low, v), high = vmax(high, v);
        }
        if (!any) low = high = vf{};
        for (int t = 0; valid && t < size; t++) // the others are stored too, but widen no range
            store(x + t * dim + i, any ? vmin(vmax(load(x + t * dim + i), low), high) : vf{});
        vf first = low, last = high;
        if (f.key_search) search_channels(x + i, dim, size, f.key_bits, &first, &last);
        store(scale + i, (last - first) / (float)levels_of(f.key_bits));
        store(zero + i, first);
        if (!f.refined) continue;
        first = low, last = high;
        if (f.key_search) search_channels(x + i, dim, size, fine_bits, &first, &last);
        store(fine_scale + i, (last - first) / (float)levels_of(fine_bits));
        store(fine_zero + i, first);
    }
    const float unit = (float)(1 << f.refined_bits);
    uint8_t *refined = f.refined ? page + f.key_refined_index : nullptr;
    if (f.refined) {
        choose_refined(scale, power, dim, f.refined, refined);
        for (int j = 0; j < f.refined; j++) {
            scale[refined[j]] = fine_scale[refined[j]] * unit;
            zero[refined[j]] = fine_zero[refined[j]];
        }
    }
    if (!round_scales(scale, dim, page, f.key_page_scale, f.key_scale)) return false;
    if (!round_zeros(zero, dim, page, f.key_page_zero, f.key_zero)) return false;
    const int row = dim * f.key_bits / 8;
    uint8_t codes[MAX_ROW], planes[MAX_ROW][128]; // [refined][token]
    for (int t = 0; t < size; t++) {
        for (int i = 0; i < dim; i += W) {
            const vf v = (load(x + t * dim + i) - load(zero + i)) * reciprocal(load(scale + i));
            const vf code = round_within(v, 0.0f, (float)levels_of(f.key_bits));
            const vb narrow = __builtin_convertvector(__builtin_convertvector(code, vi), vb);
            memcpy(codes + i, &narrow, sizeof narrow);
        }
        for (int j = 0; j < f.refined; j++) {
            const int c = refined[j];
            const float inverse = 1.0f / max2(scale[c] / unit, TINY), v = (x[t * dim + c] - zero[c]) * inverse;
            const int fine = (int)round_within(splat(v), 0.0f, (float)levels_of(fine_bits))[0];
            codes[c] = (uint8_t)(fine >> f.refined_bits);
            planes[j][t] = (uint8_t)(fine & ((1 << f.refined_bits) - 1));
        }
        pack_row(codes, dim, f.key_bits, page + f.key_codes + t * row);
    }
    for (int j = 0; j < f.refined; j++)
        pack_row(planes[j], size, f.refined_bits, page + f.key_refined_codes + j * (size * f.refined_bits / 8));
    return true;
}

static inline bool encode_value(const TaPageFormat &f, float *x, const uint8_t *valid, uint8_t *page, uint8_t *codes) {
    const int dim = f.head_dim, size = f.page_size, levels = levels_of(f.value_bits);
    const bool symmetric = f.value_zero < 0;
    const float norm = (float)pow((double)f.rotation, -0.5), middle = (float)(-levels / 2.0);
    float scale[MAX_ROW], zero[MAX_ROW];
    for (int t = 0; t < size; t++) {
        float *row = x + t * dim;
        if (valid && !valid[t]) memset(row, 0, 4 * (size_t)dim);
        if (f.rotation > 1) {
            rotate_row(row, dim, f.rotation);
            for (int i = 0; i < dim; i += W) store(row + i, load(row + i) * norm);
        }
        vf lows = load(row), highs = lows;
        for (int i = W; i < dim; i += W) lows = vmin(lows, load(row + i)), highs = vmax(highs, load(row + i));
        float low = -max_of(-lows), high = max_of(highs);
        if (symmetric) high = max2(high, -low), low = -high;
        if (f.value_search) search_token(row, dim, f.value_bits, &low, &high);
        scale[t] = (high - low) / (float)levels;
        zero[t] = low;
    }
    if (!round_scales(scale, size, page, f.value_page_scale, f.value_scale)) return false;
    if (symmetric)
        for (int t = 0; t < size; t++) zero[t] = scale[t] * middle;
    else if (!round_zeros(zero, size, page, f.value_page_zero, f.value_zero))
        return false;
    for (int t = 0; t < size; t++) {
        const float inverse = 1.0f / max2(scale[t], TINY);
        // The stored order of tokens: see `quant.packing.permute_tokens`.
        const int place = (t & ~15) | ((t >> 1 & 3) << 2) | (t >> 3 & 1) << 1 | (t & 1);
        for (int i = 0; i < dim; i += W) {
            const vf v = (load(x + t * dim + i) - zero[t]) * inverse;
            const vi code = __builtin_convertvector(round_within(v, 0.0f, (float)levels), vi);
            for (int k = 0; k < W; k++) codes[(i + k) * size + place] = (uint8_t)code[k];
        }
    }
    const int bytes = size * f.value_bits / 8;
    for (int d = 0; d < dim; d++) pack_row(codes + d * size, size, f.value_bits, page + f.value_codes + d * bytes);
    return true;
}

// Encodes both sides of one page from `read(side, x)`, which fills floats [tokens][dim]; scratch as `compress_bytes`.
template <class Read>
static inline bool encode_page(const TaPageFormat &f, Read read, const uint8_t *valid, const float *power, uint8_t *out,
                               uint8_t *scratch) {
    float *x = (float *)scratch;
    uint8_t *codes = scratch + ((int64_t)4 * f.page_size * f.head_dim + 63) / 64 * 64;
    memset(out, 0, (size_t)f.nbytes);
    read(0, x);
    const bool fits = encode_key(f, x, valid, power, out);
    read(1, x);
    return encode_value(f, x, valid, out, codes) && fits;
}

static int64_t compress_bytes(const TaPageFormat &f) {
    return ((int64_t)4 * f.page_size * f.head_dim + 63) / 64 * 64 + (int64_t)f.page_size * f.head_dim;
}

static void compress_page(void *context, int i, uint8_t *scratch) {
    PageJob &job = *(PageJob *)context;
    const TaCompress &c = *job.call;
    const TaPageFormat &f = *c.format;
    const int page = i % c.pages, h = i / c.pages % c.heads, b = i / c.pages / c.heads;
    uint8_t *out = c.out + (int64_t)i * f.nbytes;
    const uint8_t *valid = c.valid ? c.valid + b * c.valid_stride + (int64_t)page * f.page_size : nullptr;
    const float *power = c.power ? c.power + b * c.power_batch + h * c.power_head : nullptr;
    auto read = [&](int side, float *x) { read_page(side ? c.value : c.key, f, b, h, page, x); };
    const bool fits = encode_page(f, read, valid, power, out, scratch);
    if (!fits) __atomic_store_n(&job.failed, 1, __ATOMIC_RELAXED);
}

static int run_compress(const TaCompress *call) {
    PageJob job{call, 0};
    const int items = call->batch * call->heads * call->pages;
    if (!ta_parallel(call->threads, items, compress_bytes(*call->format), compress_page, &job)) return TA_NO_MEMORY;
    return job.failed ? TA_BEYOND_FLOAT16 : TA_OK;
}

} // namespace TA_ISA
