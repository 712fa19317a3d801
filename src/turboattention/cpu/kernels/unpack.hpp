// Pages to rows of one byte a code, and metadata to floats: see `quant.packing` and `quant.two_level`.
#pragma once
#include "vec.hpp"

namespace TA_ISA {

#if defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
// Shifts work on pairs of bytes, because processors shift no single ones; the mask takes away what crossed over.
typedef uint16_t vbytes __attribute__((vector_size(BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(16)));
typedef uint16_t vquarter __attribute__((vector_size(8)));

template <class V, int SHIFT, int MASK, int LEFT, bool ADD>
static inline void spread_step(const uint8_t *bytes, uint8_t *out) {
    V v = load_as<V>(bytes) >> SHIFT & (uint16_t)(MASK * 0x101);
    if (LEFT) v = v << LEFT;
    if (ADD) v = v | load_as<V>(out);
    memcpy(out, &v, sizeof v);
}

// out[i] (|)= ((bytes[i] >> SHIFT) & MASK) << LEFT. What is left over after whole vectors is done by a vector that
// overlaps the last one: doing a byte twice gives the same.
template <int SHIFT, int MASK, int LEFT = 0, bool ADD = false>
static inline void spread(const uint8_t *bytes, int count, uint8_t *out) {
    int i = 0;
    for (; i + BYTES <= count; i += BYTES) spread_step<vbytes, SHIFT, MASK, LEFT, ADD>(bytes + i, out + i);
    if (BYTES > 16 && i + 16 <= count) spread_step<vhalf, SHIFT, MASK, LEFT, ADD>(bytes + i, out + i), i += 16;
    if (i == count) return;
    if (count >= 16)
        spread_step<vhalf, SHIFT, MASK, LEFT, ADD>(bytes + count - 16, out + count - 16);
    else { // 8 to 15
        spread_step<vquarter, SHIFT, MASK, LEFT, ADD>(bytes, out);
        spread_step<vquarter, SHIFT, MASK, LEFT, ADD>(bytes + count - 8, out + count - 8);
    }
}

template <bool ADD> static inline void unpack_eighths(const uint8_t *b, int n, uint8_t *out) {
    constexpr int LEFT = ADD ? 2 : 0;
    const int part = n / 8;
    spread<0, 1, LEFT, ADD>(b, part, out);
    spread<1, 1, LEFT, ADD>(b, part, out + part);
    spread<2, 1, LEFT, ADD>(b, part, out + 2 * part);
    spread<3, 1, LEFT, ADD>(b, part, out + 3 * part);
    spread<4, 1, LEFT, ADD>(b, part, out + 4 * part);
    spread<5, 1, LEFT, ADD>(b, part, out + 5 * part);
    spread<6, 1, LEFT, ADD>(b, part, out + 6 * part);
    spread<7, 1, LEFT, ADD>(b, part, out + 7 * part);
}

static inline void unpack_quarters(const uint8_t *b, int n, uint8_t *out) {
    const int part = n / 4;
    spread<0, 3>(b, part, out);
    spread<2, 3>(b, part, out + part);
    spread<4, 3>(b, part, out + 2 * part);
    spread<6, 3>(b, part, out + 3 * part);
}

static inline void unpack_halves(const uint8_t *b, int n, uint8_t *out) {
    spread<0, 15>(b, n / 2, out);
    spread<4, 15>(b, n / 2, out + n / 2);
}

// n codes of a row (n a multiple of 64 or one of the head_dims) to bytes.
static inline void unpack_row(int bits, const uint8_t *b, int n, uint8_t *out) {
    switch (bits) {
    case 8: memcpy(out, b, n); break;
    case 4: unpack_halves(b, n, out); break;
    case 3: unpack_quarters(b, n, out), unpack_eighths<true>(b + n / 4, n, out); break;
    case 2: unpack_quarters(b, n, out); break;
    default: unpack_eighths<false>(b, n, out);
    }
}

#if TA_WIDE
// Codes 64 m .. 64 m + 63 of a row of parts of PART bytes, part k shifted by k * BITS: short parts are read into all
// lanes, each lane then shifts by its own part.
template <int PART, int BITS> static inline __m512i wide_parts(const uint8_t *b, int m) {
    constexpr int PARTS = PART < 64 ? 64 / PART : 1; // of a vector
    const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
    __m512i v;
    if (PART >= 64) {
        v = _mm512_srl_epi16(_mm512_loadu_si512(b + 64 * m % PART), _mm_cvtsi32_si128(64 * m / PART * BITS));
        return _mm512_and_si512(v, mask);
    }
    const int16_t s = (int16_t)(m * PARTS * BITS);
    if (PART == 32) {
        v = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)b));
        v = _mm512_srlv_epi16(v, _mm512_inserti64x4(_mm512_set1_epi16(s), _mm256_set1_epi16(s + BITS), 1));
    } else if (PART == 16) {
        v = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)b));
        const int16_t s1 = s + BITS, s2 = s + 2 * BITS, s3 = s + 3 * BITS;
        const int64_t ones = 0x0001000100010001;
        v = _mm512_srlv_epi16(v, _mm512_setr_epi64(s * ones, s * ones, s1 * ones, s1 * ones, s2 * ones, s2 * ones,
                                                   s3 * ones, s3 * ones));
    } else { // 8
        int64_t x;
        memcpy(&x, b, 8);
        const int64_t ones = 0x0001000100010001 * BITS, first = 0x0001000100010001 * s;
        v = _mm512_srlv_epi16(_mm512_set1_epi64(x), _mm512_setr_epi64(first, first + ones, first + 2 * ones,
                                                                      first + 3 * ones, first + 4 * ones, first + 5 * ones,
                                                                      first + 6 * ones, first + 7 * ones));
    }
    return _mm512_and_si512(v, mask);
}

// Codes 64 m .. 64 m + 63 of a row of N codes.
template <int N, int BITS> static inline __m512i wide_codes(const uint8_t *b, int m) {
    if (BITS == 8) return _mm512_loadu_si512(b + 64 * m);
    if (BITS == 3) {
        const __m512i upper = wide_parts<N / 8, 1>(b + N / 4, m);
        const __m512i lower = wide_parts<N / 4, 2>(b, m);
        return _mm512_or_si512(lower, _mm512_slli_epi16(upper, 2));
    }
    return wide_parts<N * BITS / 8, BITS>(b, m);
}
#endif

// N: the number of codes of a row where the compiler is to know it; 0: `n`.
template <int N, int BITS>
static inline void unpack_all(const uint8_t *b, int rows, int n, uint8_t *out, int64_t stride) {
    const int count = N ? N : n;
#if TA_WIDE
    if (N) {
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int m = 0; m < N / 64; m++) {
                const __m512i codes = wide_codes<N ? N : 64, BITS>(b + r * (N * BITS / 8), m);
                _mm512_storeu_si512(out + r * stride + 64 * m, codes);
            }
        return;
    }
#endif
    for (int r = 0; r < rows; r++) unpack_row(BITS, b + r * (count * BITS / 8), count, out + r * stride);
}

template <int N> static inline void unpack_as(int bits, const uint8_t *b, int rows, int n, uint8_t *out, int64_t stride) {
    switch (bits) {
    case 8: unpack_all<N, 8>(b, rows, n, out, stride); break;
    case 4: unpack_all<N, 4>(b, rows, n, out, stride); break;
    case 3: unpack_all<N, 3>(b, rows, n, out, stride); break;
    default: unpack_all<N, 2>(b, rows, n, out, stride);
    }
}

static inline void unpack_rows(int bits, const uint8_t *b, int rows, int n, uint8_t *out, int64_t stride) {
    if (n == 64) return unpack_as<64>(bits, b, rows, n, out, stride);
    if (n == 128) return unpack_as<128>(bits, b, rows, n, out, stride);
    if (W == 16 && n == 256) return unpack_as<256>(bits, b, rows, n, out, stride);
    unpack_as<0>(bits, b, rows, n, out, stride);
}

// W bytes to integers. (GCC moves vectors of 8 bytes through memory, hence the instructions by name.)
static inline vi widen(const uint8_t *p) {
#if TA_WIDE
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return __builtin_convertvector(load_as<vb>(p), vi);
#endif
}
static inline vi widen(const int8_t *p) {
#if TA_WIDE
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    typedef int8_t signed_bytes __attribute__((vector_size(W)));
    return __builtin_convertvector(load_as<signed_bytes>(p), vi);
#endif
}

// Codes (bytes, signed or not) times one number.
template <class T> static inline void scaled_bytes(const T *codes, int count, float factor, float *out) {
    for (int i = 0; i < count; i += W) store(out + i, vi_to_vf(widen(codes + i)) * factor);
}

// Scales and zeros of K, [head_dim] each.
static inline void key_metadata(const TaPageFormat &f, const uint8_t *page, float *scale, float *zero) {
    const int dim = f.head_dim;
    scaled_bytes(page + f.key_scale, dim, float16_at(page, f.key_page_scale) / 255.0f, scale);
    if (f.key_zero >= 0) {
        scaled_bytes((const int8_t *)(page + f.key_zero), dim, float16_at(page, f.key_page_zero) / 127.0f, zero);
        return;
    }
    const float middle = -0.5f * (float)((1 << f.key_bits) - 1);
    for (int i = 0; i < dim; i += W) store(zero + i, load(scale + i) * middle);
}

#if !TA_WIDE
// The lower plane of the refined channels, [refined][page_size], not yet divided by 2^refined_bits.
static inline void refined_plane(const TaPageFormat &f, const uint8_t *page, float *plane) {
    constexpr int STEP = W; // a part of a row may have 8 tokens only
    const int size = f.page_size, bits = f.refined_bits, parts = 8 / bits, part = size / parts;
    for (int j = 0; j < f.refined; j++)
        for (int i = 0; i < part; i += STEP) {
            vi v = widen(page + f.key_refined_codes + j * part + i);
            for (int k = 0; k < parts; k++, v = v >> bits)
                store(plane + j * size + k * part + i, vi_to_vf(v & ((1 << bits) - 1)));
        }
}
#endif

} // namespace TA_ISA
