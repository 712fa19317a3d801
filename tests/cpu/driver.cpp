// Calls the kernels on buffers of exactly the size they need, so that a sanitizer sees every byte too far.
//
// Usage: driver FORMATS, a file of lines "page_size head_dim ... value_zero": the numbers of TaPageFormat.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "abi.h"

extern "C" int ta_isa(void);
extern "C" int ta_attend(const TaAttention *);
extern "C" int ta_compress(const TaCompress *);
extern "C" int ta_append(const TaAppend *);
extern "C" int ta_prefill(const TaPrefill *);

static uint32_t state = 1;
static float random_float() {
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1.0f;
}

// An allocation of its own for every tensor: std::vector's has no slack that a sanitizer would not see.
static std::vector<float> tensor(size_t count) {
    std::vector<float> x(count);
    for (float &v : x) v = random_float();
    return x;
}

struct Shape {
    int batch, kv_heads, ratio, queries, pages, tail, sinks, window, capacity;
    bool causal, table, starts;
    float softcap;
};

static TaTensor view(std::vector<float> &x, int heads, int tokens, int dim) {
    return TaTensor{x.data(), (int64_t)heads * tokens * dim, (int64_t)tokens * dim, dim, TA_FLOAT32};
}

static int run(const TaPageFormat &f, const Shape &s, int isa) {
    const int dim = f.head_dim, size = f.page_size, tokens = s.pages * size, heads = s.kv_heads * s.ratio;
    std::vector<float> key = tensor((size_t)s.batch * s.kv_heads * tokens * dim), value = tensor(key.size());
    std::vector<float> power = tensor((size_t)s.batch * s.kv_heads * dim);
    for (float &p : power) p = p * p;
    std::vector<uint8_t> pages((size_t)s.batch * s.kv_heads * s.pages * f.nbytes), valid((size_t)s.batch * tokens, 1);
    for (size_t i = 0; i < valid.size(); i += 7) valid[i] = 0;
    TaCompress c{};
    c.batch = s.batch, c.heads = s.kv_heads, c.pages = s.pages, c.format = &f;
    c.key = view(key, s.kv_heads, tokens, dim), c.value = view(value, s.kv_heads, tokens, dim);
    c.valid = s.starts ? valid.data() : nullptr, c.valid_stride = tokens;
    c.power = power.data(), c.power_batch = (int64_t)s.kv_heads * dim, c.power_head = dim;
    c.out = pages.data(), c.threads = 3, c.isa = isa;
    if (s.pages && ta_compress(&c) != TA_OK) return 1;

    std::vector<TaHeadPages> where(s.kv_heads);
    std::vector<int32_t> table((size_t)s.batch * s.kv_heads * (s.pages ? s.pages : 1));
    for (size_t i = 0; i < table.size(); i++) table[i] = (int32_t)(table.size() - 1 - i);
    for (int h = 0; h < s.kv_heads && s.pages; h++) {
        where[h].format = &f, where[h].pages = pages.data(), where[h].batch_bytes = (int64_t)s.kv_heads * s.pages * f.nbytes;
        if (s.table) {
            where[h].table = table.data() + h * s.pages, where[h].table_stride = (int64_t)s.kv_heads * s.pages;
            where[h].pool_pages = (int64_t)table.size();
        } else
            where[h].pages += (int64_t)h * s.pages * f.nbytes;
    }
    const int slots = s.capacity ? s.capacity : s.tail;
    std::vector<float> q = tensor((size_t)s.batch * heads * s.queries * dim), out(q.size());
    std::vector<float> tail_key = tensor((size_t)s.batch * s.kv_heads * slots * dim), tail_value = tensor(tail_key.size());
    std::vector<float> sink_key = tensor((size_t)s.batch * s.kv_heads * s.sinks * dim), sink_value = tensor(sink_key.size());
    std::vector<float> lse((size_t)s.batch * heads * s.queries);
    std::vector<int32_t> lengths(s.batch, tokens + s.tail), paged(s.batch, tokens);
    std::vector<int64_t> starts(s.batch, 70);
    TaAttention a{};
    a.batch = s.batch, a.heads = heads, a.kv_heads = s.kv_heads, a.queries = s.queries, a.head_dim = dim;
    a.causal = s.causal, a.window = s.window, a.sinks = s.sinks, a.capacity = s.capacity;
    a.scale = 1.0f / sqrtf((float)dim), a.softcap = s.softcap;
    a.pages = where.data(), a.lengths = lengths.data(), a.page_tokens = paged.data();
    a.starts = s.starts ? starts.data() : nullptr;
    a.q = view(q, heads, s.queries, dim), a.out = view(out, heads, s.queries, dim);
    a.tail_key = view(tail_key, s.kv_heads, slots, dim), a.tail_value = view(tail_value, s.kv_heads, slots, dim);
    a.sink_key = view(sink_key, s.kv_heads, s.sinks, dim), a.sink_value = view(sink_value, s.kv_heads, s.sinks, dim);
    a.lse = lse.data(), a.threads = 3, a.isa = isa;
    if (ta_attend(&a) != TA_OK) return 2;
    for (float x : out)
        if (!isfinite(x)) return 3;
    if (s.table) { // an entry outside of the pool is refused, not read
        table[0] = (int32_t)table.size();
        if (ta_attend(&a) != TA_BAD_TABLE) return 4;
    }
    return 0;
}

// Steps of a paged cache from empty to more tokens than its table has room for.
static int run_steps(const TaPageFormat &f, int tokens, int window, int sinks, bool before, int isa) {
    const int batch = 2, heads = 3, dim = f.head_dim, size = f.page_size, pages = 3;
    const int capacity = size + window + tokens;
    std::vector<uint8_t> pool((size_t)batch * heads * pages * f.nbytes);
    std::vector<int32_t> table((size_t)batch * heads * pages), lengths(batch), paged(batch), fault(batch), counts(batch);
    for (size_t i = 0; i < table.size(); i++) table[i] = (int32_t)(table.size() - 1 - i);
    std::vector<TaHeadPages> where(heads);
    const int32_t group_of[heads] = {0, 1, 0};
    for (int h = 0; h < heads; h++)
        where[h] = TaHeadPages{&f, pool.data(), 0, table.data() + h * pages, heads * pages, (int64_t)table.size()};
    std::vector<float> tail_key((size_t)batch * heads * capacity * dim), tail_value(tail_key.size());
    std::vector<float> sink_key((size_t)batch * heads * sinks * dim), sink_value(sink_key.size());
    std::vector<float> power((size_t)batch * heads * dim, 1.0f);
    for (int step = 0; step * tokens < (pages + 1) * size + window + 2; step++) {
        std::vector<float> key = tensor((size_t)batch * heads * tokens * dim), value = tensor(key.size());
        counts[0] = tokens, counts[1] = step % (tokens + 1);
        TaAppend a{};
        a.batch = batch, a.heads = heads, a.tokens = tokens, a.sinks = sinks, a.capacity = capacity;
        a.window = window, a.before = before, a.pages = where.data(), a.group_of = group_of;
        a.lengths = lengths.data(), a.page_tokens = paged.data(), a.counts = counts.data(), a.table_pages = pages;
        a.key = view(key, heads, tokens, dim), a.value = view(value, heads, tokens, dim);
        a.tail_key = view(tail_key, heads, capacity, dim), a.tail_value = view(tail_value, heads, capacity, dim);
        a.sink_key = view(sink_key, heads, sinks, dim), a.sink_value = view(sink_value, heads, sinks, dim);
        a.power = power.data(), a.fault = fault.data(), a.threads = 3, a.isa = isa;
        if (ta_append(&a) != TA_OK) return 5;
        for (int b = 0; b < batch; b++) {
            const int kept = lengths[b] + (before ? 0 : counts[b]) - window;
            lengths[b] += counts[b];
            if (kept / size * size > paged[b]) paged[b] = kept / size * size;
        }
    }
    return fault[0] == TA_FAULT_NO_ROOM ? 0 : 6;
}

struct ChunkShape {
    int kv_heads, ratio, rows, tokens, dim, window;
    bool causal, packed;
};

static int run_chunk(const ChunkShape &s, int isa) {
    const int heads = s.kv_heads * s.ratio, batch = 2;
    std::vector<float> q = tensor((size_t)batch * heads * s.rows * s.dim), out(q.size(), NAN);
    std::vector<float> key = tensor((size_t)batch * s.kv_heads * s.tokens * s.dim), value = tensor(key.size());
    std::vector<float> lse((size_t)batch * heads * s.rows, NAN);
    std::vector<int32_t> cu_q{0, s.rows / 3, batch * s.rows}, cu_k{0, s.tokens / 3, batch * s.tokens};
    TaPrefill a{};
    a.batch = batch, a.heads = heads, a.kv_heads = s.kv_heads, a.head_dim = s.dim;
    a.causal = s.causal, a.window = s.window, a.scale = 0.1f;
    const int rows = s.packed ? batch * s.rows : s.rows, tokens = s.packed ? batch * s.tokens : s.tokens;
    a.tokens_q = rows, a.tokens_k = tokens;
    a.q = view(q, heads, rows, s.dim), a.out = view(out, heads, rows, s.dim);
    a.key = view(key, s.kv_heads, tokens, s.dim), a.value = view(value, s.kv_heads, tokens, s.dim);
    a.lse = lse.data(), a.lse_batch = (int64_t)heads * rows, a.lse_head = rows;
    if (s.packed) {
        a.cu_q = cu_q.data(), a.cu_k = cu_k.data(), a.lse_batch = 0;
        a.q.batch = a.out.batch = a.key.batch = a.value.batch = 0;
    }
    a.threads = 3, a.isa = isa;
    if (ta_prefill(&a) != TA_OK) return 7;
    for (float x : out)
        if (!isfinite(x)) return 8;
    for (float x : lse)
        if (isnan(x)) return 9;
    if (s.packed) { // a length beyond the tensors is refused, not read
        cu_k[batch]++;
        if (ta_prefill(&a) != TA_BAD_LENGTHS) return 10;
    }
    return 0;
}

int main(int count, char **arguments) {
    FILE *file = count == 2 ? fopen(arguments[1], "r") : nullptr;
    if (!file) return 100;
    const Shape shapes[] = {
        {1, 1, 1, 1, 1, 1, 0, 0, 0, true, false, false, 0.0f},  {2, 2, 3, 1, 5, 17, 1, 0, 64, true, true, false, 0.0f},
        {1, 2, 4, 5, 9, 33, 4, 100, 0, true, false, true, 5.0f}, {1, 1, 16, 7, 2, 70, 1, 0, 0, false, false, true, 0.0f},
        {1, 1, 2, 70, 3, 130, 1, 0, 0, true, false, false, 0.0f}, {1, 1, 2, 3, 0, 5, 1, 0, 0, true, false, false, 0.0f},
    };
    const ChunkShape chunks[] = {
        {1, 1, 1, 1, 64, 0, true, false},    {2, 2, 63, 111, 80, 0, false, true}, {1, 3, 130, 257, 96, 0, true, false},
        {2, 1, 70, 140, 256, 9, true, true}, {1, 4, 65, 129, 128, 40, true, false}, {1, 1, 200, 20, 64, 0, true, true},
    };
    for (const ChunkShape &s : chunks)
        for (int isa = 0; isa <= ta_isa(); isa++)
            if (int failure = run_chunk(s, isa)) {
                fprintf(stderr, "chunk of %d, head_dim %d, isa %d: failure %d\n", s.rows, s.dim, isa, failure);
                return failure;
            }
    int32_t numbers[sizeof(TaPageFormat) / 4];
    int runs = 0;
    for (;;) {
        for (int32_t &number : numbers)
            if (fscanf(file, "%d", &number) != 1) {
                fclose(file);
                printf("%d runs\n", runs);
                return runs ? 0 : 101;
            }
        TaPageFormat f;
        memcpy(&f, numbers, sizeof f);
        for (int isa = 0; isa <= ta_isa(); isa++)
            for (int before = 0; before < 2; before++)
                if (int failure = run_steps(f, before ? 1 : 7, before ? 20 : 0, before ? 0 : 3, before, isa)) {
                    fprintf(stderr, "steps, head_dim %d, isa %d: failure %d\n", f.head_dim, isa, failure);
                    return failure;
                }
        for (const Shape &s : shapes)
            for (int isa = 0; isa <= ta_isa(); isa++, runs++)
                if (int failure = run(f, s, isa)) {
                    fprintf(stderr, "bits %d/%d, head_dim %d, isa %d: failure %d\n", f.key_bits, f.value_bits,
                            f.head_dim, isa, failure);
                    return failure;
                }
    }
}
