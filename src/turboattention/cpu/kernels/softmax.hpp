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
    vf m = splat(NEG_INF), n = m; // two, because each waits for itself
    const int half = count / (2 * W) * W;
    for (int i = 0; i < half; i += W) m = vmax(m, load(s + i)), n = vmax(n, load(s + half + i));
    for (int i = 2 * half; i < count; i += W) m = vmax(m, load(s + i));
    const float largest = max_of(vmax(m, n)), old = rows.top[r];
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

// 16-bit operands are at most 127 * 256 + 127: x = 256 upper + lower, both signed
// bytes, which AVX-512 VNNI and AMX multiply.
constexpr float MOST_16 = 32639.0f;
constexpr float LEAST_TOP = 1e-30f; // of numbers that are all 0
#if TA_WIDE
static inline __m256i upper_bytes(__m512i x) {
    return _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(x, _mm512_set1_epi16(128)), 8));
}
static inline __m256i lower_bytes(__m512i x) { return _mm512_cvtepi16_epi8(x); }
// The same 4 bytes in every lane.
static inline __m512i four_bytes(const uint8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}
#endif

// Rounds 16 floats times `inverse` to int16; with STORED in the order of tokens of V pages
// (`quant.packing.permute_tokens`): pairs of the first 8 and of the last 8 in turn. Returns their sums.
template <bool STORED> static inline vi round16(const float *x, float inverse, int16_t *out) {
    constexpr int32_t OWN = 0x4b400000; // MAGIC's own bits
#if TA_WIDE
    const vi n = bits_of(load(x) * inverse + MAGIC) - OWN;
    __m256i packed = _mm512_cvtepi32_epi16((__m512i)n);
    if (STORED) packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)out, packed);
    return n;
#elif defined(__AVX2__)
    vi a = bits_of(load(x) * inverse + MAGIC) - OWN, b = bits_of(load(x + 8) * inverse + MAGIC) - OWN;
    __m256i packed = _mm256_packs_epi32((__m256i)a, (__m256i)b);
    packed = STORED ? _mm256_shuffle_epi32(packed, 0xd8) : _mm256_permute4x64_epi64(packed, 0xd8);
    _mm256_storeu_si256((__m256i *)out, packed);
    return a + b;
#else
    vi total = vi{};
    for (int i = 0; i < 16; i += W) {
        const vi n = bits_of(load(x + i) * inverse + MAGIC) - OWN;
        for (int k = 0; k < W; k++) {
            const int t = i + k;
            out[STORED ? (t & 6) * 2 | (t >> 3) * 2 | (t & 1) : t] = (int16_t)n[k];
        }
        total += n;
    }
    return total;
#endif
}

#if TA_WIDE
// Twice that, with one store: who reads 64 bytes of what two stores wrote waits for both.
template <bool STORED> static inline vi round32(const float *x, float inverse, int16_t *out) {
    constexpr int32_t OWN = 0x4b400000;
    const vi a = bits_of(load(x) * inverse + MAGIC) - OWN, b = bits_of(load(x + 16) * inverse + MAGIC) - OWN;
    const __m512i packed = _mm512_packs_epi32((__m512i)a, (__m512i)b); // lane l: pairs 2 l, 2 l + 1 of a, then of b
    const __m512i order = STORED ? _mm512_setr_epi32(0, 8, 1, 9, 4, 12, 5, 13, 2, 10, 3, 11, 6, 14, 7, 15)
                                 : _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, packed));
    return a + b;
}
#endif

// Floats (a multiple of 16) to int16 of at most MOST_16: returns the value of one step; `sum` gets that of the integers.
template <bool STORED> static inline float to_int16(const float *x, int count, float top, int16_t *out, int32_t *sum) {
    const float inverse = MOST_16 / top;
    vi total = vi{};
    int i = 0;
#if TA_WIDE
    for (; i + 32 <= count; i += 32) total += round32<STORED>(x + i, inverse, out + i);
#endif
    for (; i < count; i += 16) total += round16<STORED>(x + i, inverse, out + i);
    *sum = sum_of(total);
    return top / MOST_16;
}

} // namespace TA_ISA
