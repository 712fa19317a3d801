// Vectors of floats in the width of the instruction set that this file is compiled for.
//
// Everything here is in a namespace named after the instruction set: one and the same inline function compiled twice
// would be merged by the linker, and the wider one would run on processors that do not have it. For the same reason
// these files use no templates of the standard library.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "abi.h"

#if !defined(TA_TILES)
#define TA_TILES 0 // 1 in the files of AMX
#endif
#if !defined(TA_WIDE)
#if defined(__AVX512VNNI__)
#define TA_WIDE 1
#else
#define TA_WIDE 0
#endif
#endif

namespace TA_ISA {

#if TA_WIDE
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef int16_t vs __attribute__((vector_size(2 * W)));
typedef uint8_t vb __attribute__((vector_size(W)));

constexpr float NEG_INF = -__builtin_inff();
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float MAGIC = 12582912.0f; // 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer in the low bits

template <class T> static inline T min2(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max2(T a, T b) { return a < b ? b : a; }

template <class V, class T> static inline V load_as(const T *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline vf load(const float *p) { return load_as<vf>(p); }
static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { return x - vf{}; }
// By name where there is an instruction: compilers compare and blend. Of NaN and a number these give the same as there.
#if TA_WIDE
static inline vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)b, (__m512)a); }
static inline vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)b, (__m512)a); }
static inline vi imax(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
static inline vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)b, (__m256)a); }
static inline vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)b, (__m256)a); }
static inline vi imax(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#else
static inline vf vmax(vf a, vf b) { return a < b ? b : a; }
static inline vf vmin(vf a, vf b) { return b < a ? b : a; }
static inline vi imax(vi a, vi b) { return a < b ? b : a; }
#endif
static inline vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
static inline vf vi_to_vf(vi a) { return __builtin_convertvector(a, vf); }
static inline vi bits_of(vf a) { return (vi)a; }

// Of all lanes. Halves first: a loop over the lanes would be one addition after the other.
#if TA_WIDE
static inline float sum_of(vf v) { return _mm512_reduce_add_ps((__m512)v); }
static inline float max_of(vf v) { return _mm512_reduce_max_ps((__m512)v); }
static inline int32_t sum_of(vi v) { return _mm512_reduce_add_epi32((__m512i)v); }
static inline int32_t max_of(vi v) { return _mm512_reduce_max_epi32((__m512i)v); }
#elif defined(__AVX2__)
template <class Join> static inline __m128i joined(__m256i v, Join join) {
    __m128i x = join(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    x = join(x, _mm_unpackhi_epi64(x, x));
    return join(x, _mm_shuffle_epi32(x, 1));
}
static inline float sum_of(vf v) {
    auto add = [](__m128i a, __m128i b) { return (__m128i)_mm_add_ps((__m128)a, (__m128)b); };
    return _mm_cvtss_f32((__m128)joined((__m256i)v, add));
}
static inline float max_of(vf v) {
    auto most = [](__m128i a, __m128i b) { return (__m128i)_mm_max_ps((__m128)b, (__m128)a); };
    return _mm_cvtss_f32((__m128)joined((__m256i)v, most));
}
static inline int32_t sum_of(vi v) {
    return _mm_cvtsi128_si32(joined((__m256i)v, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); }));
}
static inline int32_t max_of(vi v) {
    return _mm_cvtsi128_si32(joined((__m256i)v, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); }));
}
#else
static inline float sum_of(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
static inline float max_of(vf v) { return max2(max2(v[0], v[2]), max2(v[1], v[3])); }
static inline int32_t sum_of(vi v) { return v[0] + v[1] + v[2] + v[3]; }
static inline int32_t max_of(vi v) { return max2(max2(v[0], v[2]), max2(v[1], v[3])); }
#endif

static inline float bits_to_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline uint32_t float_to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    if (rest < (0x0400u << 13)) return bits_to_float(float_to_bits((float)(h & 0x7fff) * 0x1p-24f) | sign);
    if (rest >= (0x7c00u << 13)) return bits_to_float(sign | 0x7f800000u | rest);
    return bits_to_float(sign | (rest + (112u << 23)));
}

// To nearest, ties to even, as torch rounds.
static inline uint16_t float_to_half(float f) {
    uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (a < 0x38800000u) { // subnormal: the addition leaves its bits at the bottom
        float shifted = bits_to_float(a) + 0.5f;
        return (uint16_t)(sign | (float_to_bits(shifted) - 0x3f000000u));
    }
    a += 0xfffu + ((a >> 13) & 1);
    return (uint16_t)(sign | ((a - (112u << 23)) >> 13));
}

// The upper halves are those numbers to the nearest, ties to even; NaN stays NaN.
static inline vi bfloats_of(vf f) {
    const vu u = (vu)f, upper = u >> 16, rounded = (u + 0x7fff + (upper & 1)) >> 16;
    return (vi)((vi)(u & 0x7fffffff) > 0x7f800000 ? upper | 0x40 : rounded);
}

static inline float float16_at(const uint8_t *page, int offset) {
    uint16_t h;
    memcpy(&h, page + offset, 2);
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    return half_to_float(h);
#endif
}

// W numbers of 16 bits to integers, and back: of an integer the lower half.
static inline vi halves_at(const uint16_t *p) {
#if TA_WIDE
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    return __builtin_convertvector(load_as<vs>(p), vi) & 0xffff;
#endif
}
static inline void store_halves(uint16_t *p, vi x) {
#if TA_WIDE
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(__AVX2__)
    const __m256i low = _mm256_and_si256((__m256i)x, _mm256_set1_epi32(0xffff)), both = _mm256_packus_epi32(low, low);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08)));
#else
    const vs narrow = __builtin_convertvector(x, vs);
    memcpy(p, &narrow, sizeof narrow);
#endif
}

// `count` channels (a multiple of 16) of a tensor's row as floats, times `factor`.
static inline void read_row(const TaTensor &x, int64_t element, int count, float factor, float *out) {
    if (x.dtype == TA_FLOAT32) {
        const float *p = (const float *)x.data + element;
        for (int i = 0; i < count; i += W) store(out + i, load(p + i) * factor);
        return;
    }
    const uint16_t *p = (const uint16_t *)x.data + element;
    if (x.dtype == TA_BFLOAT16) {
        for (int i = 0; i < count; i += W) store(out + i, (vf)(halves_at(p + i) << 16) * factor);
        return;
    }
#if defined(__F16C__)
    for (int i = 0; i < count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + i))),
                                                _mm256_set1_ps(factor)));
#else
    for (int i = 0; i < count; i++) out[i] = half_to_float(p[i]) * factor;
#endif
}

static inline void write_row(const TaTensor &x, int64_t element, int count, const float *in) {
    if (x.dtype == TA_FLOAT32) {
        memcpy((float *)x.data + element, in, 4 * (size_t)count);
        return;
    }
    uint16_t *p = (uint16_t *)x.data + element;
    if (x.dtype == TA_BFLOAT16) {
        for (int i = 0; i < count; i += W) store_halves(p + i, bfloats_of(load(in + i)));
        return;
    }
#if defined(__F16C__)
    for (int i = 0; i < count; i += 8) _mm_storeu_si128((__m128i *)(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#else
    for (int i = 0; i < count; i++) p[i] = float_to_half(in[i]);
#endif
}

// 2^x for x <= 0, exactly 0 below -126; relative error 2e-7.
static inline vf exp2_negative(vf x) {
    vf clamped = vmax(x, splat(-126.0f));
    vf shifted = clamped + MAGIC;
    vf f = clamped - (shifted - MAGIC); // -0.5 .. 0.5
    vf p = splat(1.5353362e-4f);
    p = p * f + 1.3398874e-3f;
    p = p * f + 9.6184370e-3f;
    p = p * f + 5.5503324e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314720e-1f;
    p = p * f + 1.0f;
    vf r = (vf)(bits_of(p) + (bits_of(shifted) << 23));
    return x < -126.0f ? vf{} : r;
}

// Walsh-Hadamard over blocks of `block` channels, in the order of additions of `quant.rotation.rotate`.
static inline void rotate_row(float *x, int dim, int block) {
    for (int size = 1; size < block; size *= 2)
        for (int base = 0; base < dim; base += 2 * size)
            for (int i = 0; i < size; i++) {
                float a = x[base + i], b = x[base + size + i];
                x[base + i] = a + b;
                x[base + size + i] = a - b;
            }
}

} // namespace TA_ISA
