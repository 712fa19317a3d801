// One step of a paged cache (`ops.append.paged.append_paged`): full pages into pools, the other tokens into tails.
#pragma once
#include "compress.hpp"

namespace TA_ISA {

struct NewPage {
    int b, h, page, fault;
    uint8_t *bytes; // encoded, not yet in the pool
};

struct Step {
    const TaAppend *call;
    NewPage *pages;

    int count(int b) const {
        const int all = call->tokens;
        return call->counts ? max2(0, min2(call->counts[b], all)) : all;
    }
    // Pages of a row after the step.
    int stop(int b) const {
        const int length = call->lengths[b], size = call->pages[0].format->page_size;
        return max2(0, length + (call->before ? 0 : count(b)) - call->window) / size;
    }
    int first(int b) const { return call->page_tokens[b] / call->pages[0].format->page_size; }
};

static inline bool finite_row(const float *x, int dim) {
    vf largest = vf{}, sum = vf{};
    for (int i = 0; i < dim; i += W) {
        largest = vmax(largest, vabs(load(x + i)));
        sum += load(x + i) * 0.0f; // NaN where a value is NaN or infinite
    }
    return max_of(largest) <= 3.4028235e38f && sum_of(sum) == 0.0f;
}

static void encode_new(void *context, int i, uint8_t *scratch) {
    const Step &step = *(const Step *)context;
    const TaAppend &a = *step.call;
    NewPage &p = step.pages[i];
    const TaPageFormat &f = *a.pages[p.h].format;
    const int length = a.lengths[p.b];
    uint8_t valid[MAX_ROW];
    for (int t = 0; t < f.page_size; t++) valid[t] = p.page * f.page_size + t >= a.sinks;
    bool finite = true;
    auto read = [&](int side, float *x) {
        const TaTensor &tail = side ? a.tail_value : a.tail_key, &fresh = side ? a.value : a.key;
        for (int t = 0; t < f.page_size; t++) {
            const int column = p.page * f.page_size + t;
            const bool old = column < length;
            const TaTensor &from = old ? tail : fresh;
            const int place = old ? column % a.capacity : column - length;
            read_row(from, p.b * from.batch + p.h * from.head + place * from.token, f.head_dim, 1.0f, x + t * f.head_dim);
            finite = finite && finite_row(x + t * f.head_dim, f.head_dim);
        }
    };
    const float *power = a.power ? a.power + ((int64_t)p.b * a.heads + p.h) * f.head_dim : nullptr;
    const bool fits = encode_page(f, read, valid, power, p.bytes, scratch);
    p.fault = !finite ? TA_FAULT_NOT_FINITE : fits ? 0 : TA_FAULT_BEYOND_FLOAT16;
}

// The place of a page in its pool, or -1.
static inline int64_t place_of(const TaAppend &a, const NewPage &p) {
    const TaHeadPages &pages = a.pages[p.h];
    if (p.page >= a.table_pages) return -1;
    const int32_t place = pages.table[p.b * pages.table_stride + p.page];
    return place >= 0 && place < pages.pool_pages ? place : -1;
}

// Pages first .. last - 1 of `pages` are those of one page of a row, all heads. Those of a group go together.
static inline void store_pages(const TaAppend &a, const NewPage *pages, int groups) {
    for (int group = 0; group < groups; group++) {
        int fault = 0;
        for (int h = 0; h < a.heads; h++) {
            if (a.group_of[h] != group) continue;
            // The first reason counts, in the definition's order.
            if (pages[h].fault == TA_FAULT_NOT_FINITE) fault = TA_FAULT_NOT_FINITE;
            else if (fault != TA_FAULT_NOT_FINITE && place_of(a, pages[h]) < 0) fault = TA_FAULT_NO_ROOM;
            else if (!fault) fault = pages[h].fault;
        }
        if (fault) {
            a.fault[pages[0].b] |= fault;
            continue;
        }
        for (int h = 0; h < a.heads; h++)
            if (a.group_of[h] == group) {
                const int nbytes = a.pages[h].format->nbytes;
                memcpy((uint8_t *)a.pages[h].pages + place_of(a, pages[h]) * nbytes, pages[h].bytes, (size_t)nbytes);
            }
    }
}

static inline void copy_token(const TaTensor &to, int64_t place, const TaTensor &from, int64_t element, int dim) {
    const int size = from.dtype == TA_FLOAT32 ? 4 : 2;
    memcpy((uint8_t *)to.data + place * size, (const uint8_t *)from.data + element * size, (size_t)dim * size);
}

// New tokens of a row that are in no page, and the sinks among them.
static inline void store_exact(const Step &step, int b) {
    const TaAppend &a = *step.call;
    const int dim = a.pages[0].format->head_dim, size = a.pages[0].format->page_size;
    const int length = a.lengths[b], end = length + step.count(b), last = min2(end, a.sinks);
    float row[MAX_ROW];
    for (int side = 0; side < 2; side++) {
        const TaTensor &fresh = side ? a.value : a.key, &tail = side ? a.tail_value : a.tail_key;
        const TaTensor &sink = side ? a.sink_value : a.sink_key;
        for (int h = 0; h < a.heads; h++) {
            const int64_t from = b * fresh.batch + h * fresh.head, tails = b * tail.batch + h * tail.head;
            for (int c = length; c < end; c++) {
                const int64_t element = from + (c - length) * fresh.token;
                read_row(fresh, element, dim, 1.0f, row);
                if (!finite_row(row, dim)) a.fault[b] |= TA_FAULT_NOT_FINITE;
                if (c >= max2(a.page_tokens[b], step.stop(b) * size))
                    copy_token(tail, tails + c % a.capacity * tail.token, fresh, element, dim);
                if (c < last)
                    copy_token(sink, b * sink.batch + h * sink.head + c * sink.token, fresh, element, dim);
            }
        }
    }
}

static int run_append(const TaAppend *call) {
    const TaAppend &a = *call;
    Step step{call, nullptr};
    int64_t count = 0, widest = 0, scratch = 0;
    int groups = 0;
    for (int h = 0; h < a.heads; h++) {
        widest = max2(widest, (int64_t)a.pages[h].format->nbytes);
        scratch = max2(scratch, compress_bytes(*a.pages[h].format));
        groups = max2(groups, a.group_of[h] + 1);
    }
    for (int b = 0; b < a.batch; b++) count += (int64_t)max2(0, step.stop(b) - step.first(b)) * a.heads;
    if (count) {
        const int64_t table = (count * (int64_t)sizeof(NewPage) + 63) / 64 * 64;
        uint8_t *memory = (uint8_t *)malloc((size_t)(table + count * widest));
        if (!memory) return TA_NO_MEMORY;
        step.pages = (NewPage *)memory;
        int64_t next = 0;
        for (int b = 0; b < a.batch; b++)
            for (int page = step.first(b); page < step.stop(b); page++)
                for (int h = 0; h < a.heads; h++, next++)
                    step.pages[next] = NewPage{b, h, page, 0, memory + table + next * widest};
        const bool done = ta_parallel(a.threads, (int)count, scratch, encode_new, &step);
        for (int64_t i = 0; done && i < count; i += a.heads) store_pages(a, step.pages + i, groups);
        free(memory);
        if (!done) return TA_NO_MEMORY;
    }
    for (int b = 0; b < a.batch; b++) store_exact(step, b);
    return TA_OK;
}

} // namespace TA_ISA
