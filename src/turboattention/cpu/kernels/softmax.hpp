// Rows of queries: what each sees, and the running softmax.
#pragma once
#include "vec.hpp"

namespace TA_ISA {

// Rows of one work item: query heads of one KV head and neighbouring queries. Row r sees columns low[r] .. high[r] - 1.
struct Rows {
    int count;
    const int32_t *low, *high;
    float *q;      // [count][head_dim], times the factor of the scores
    float *acc;    // [count][head_dim]
    float *top;    // [count] largest score so far, log2 units
    float *sum;    // [count] sum of 2^(score - top)
    float softcap; // in the units of q, 0 without
};

// Raw scores of one row to log2 units: soft cap, then -inf outside of what the row sees.
static inline void finish_scores(const Rows &rows, int r, float *s, int first, int count) {
    if (rows.softcap > 0.0f) {
        // cap * tanh(x / cap) = cap * sign(x) * (1 - e) / (1 + e), e = exp(-2 |x| / cap)
        const float cap = rows.softcap, factor = -2.0f * LOG2E / cap;
        for (int i = 0; i < count; i += W) {
            vf x = load(s + i), e = exp2_negative(vabs(x) * factor);
            vf y = cap * LOG2E * ((1.0f - e) / (1.0f + e));
            store(s + i, x < 0.0f ? -y : y);
        }
    }
    const int low = rows.low[r] - first, high = rows.high[r] - first;
    for (int i = 0; i < min2(low, count); i++) s[i] = NEG_INF;
    for (int i = max2(high, 0); i < count; i++) s[i] = NEG_INF;
}

// Takes `count` scores (a multiple of W) into the running softmax: s becomes the weights. Returns the factor of what
// was summed before, or -1 when the row saw nothing here.
static inline float take_scores(const Rows &rows, int r, float *s, int count) {
    vf m = splat(NEG_INF);
    for (int i = 0; i < count; i += W) m = vmax(m, load(s + i));
    const float largest = max_of(m), old = rows.top[r];
    if (largest == NEG_INF) {
        memset(s, 0, 4 * (size_t)count);
        return -1.0f;
    }
    const float top = max2(largest, old);
    vf total = vf{};
    for (int i = 0; i < count; i += W) {
        vf p = exp2_negative(load(s + i) - top);
        store(s + i, p);
        total += p;
    }
    const float keep = old == NEG_INF ? 0.0f : exp2_negative(splat(old - top))[0];
    rows.top[r] = top;
    rows.sum[r] = rows.sum[r] * keep + sum_of(total);
    return keep;
}

static inline void scale_row(float *x, int count, float factor) {
    for (int i = 0; i < count; i += W) store(x + i, load(x + i) * factor);
}

// Rounds 16 floats times `inverse` to int16; with STORED in the order of tokens of V pages
// (`quant.packing.permute_tokens`): pairs of the first 8 and of the last 8 in turn. Returns their sums.
template <bool STORED> static inline vi round16(const float *x, float inverse, int16_t *out) {
    constexpr int32_t OWN = 0x4b400000; // MAGIC's own bits
#if defined(__AVX2__) && !defined(__AVX512F__)
    vi a = bits_of(load(x) * inverse + MAGIC) - OWN, b = bits_of(load(x + 8) * inverse + MAGIC) - OWN;
    __m256i packed = _mm256_packs_epi32((__m256i)a, (__m256i)b);
    packed = STORED ? _mm256_shuffle_epi32(packed, 0xd8) : _mm256_permute4x64_epi64(packed, 0xd8);
    _mm256_storeu_si256((__m256i *)out, packed);
    return a + b;
#else
    int16_t narrow[16];
    vi total = vi{};
    for (int i = 0; i < 16; i += W) {
        vi n = bits_of(load(x + i) * inverse + MAGIC) - OWN;
        vs v = __builtin_convertvector(n, vs);
        memcpy(narrow + i, &v, sizeof v);
        total += n;
    }
    if (STORED) {
        typedef uint32_t pairs __attribute__((vector_size(32)));
        pairs v = load_as<pairs>(narrow);
        v = __builtin_shuffle(v, (pairs){0, 4, 1, 5, 2, 6, 3, 7});
        memcpy(out, &v, sizeof v);
    } else
        memcpy(out, narrow, sizeof narrow);
    return total;
#endif
}

// Floats (a multiple of 16) to int16 of at most 32767: returns the value of one step; `sum` gets that of the integers.
template <bool STORED> static inline float to_int16(const float *x, int count, float top, int16_t *out, int32_t *sum) {
    const float inverse = 32767.0f / top;
    vi total = vi{};
    for (int i = 0; i < count; i += 16) total += round16<STORED>(x + i, inverse, out + i);
    int32_t s = 0;
    for (int i = 0; i < W; i++) s += total[i];
    *sum = s;
    return top / 32767.0f;
}

} // namespace TA_ISA
