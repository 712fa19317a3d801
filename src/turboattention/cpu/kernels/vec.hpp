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

namespace TA_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
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
static inline vf vmax(vf a, vf b) { return a < b ? b : a; }
static inline vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
static inline vf vi_to_vf(vi a) { return __builtin_convertvector(a, vf); }
static inline vi bits_of(vf a) { return (vi)a; }

static inline float sum_of(vf v) {
    float s = 0.0f;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
}
static inline float max_of(vf v) {
    float m = v[0];
    for (int i = 1; i < W; i++) m = max2(m, v[i]);
    return m;
}

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

static inline uint16_t float_to_bfloat(float f) {
    uint32_t u = float_to_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

static inline float float16_at(const uint8_t *page, int offset) {
    uint16_t h;
    memcpy(&h, page + offset, 2);
    return half_to_float(h);
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
        for (int i = 0; i < count; i++) out[i] = bits_to_float((uint32_t)p[i] << 16) * factor;
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
    for (int i = 0; i < count; i++) p[i] = x.dtype == TA_BFLOAT16 ? float_to_bfloat(in[i]) : float_to_half(in[i]);
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
