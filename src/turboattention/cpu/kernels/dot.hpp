// Products of rows with rows: out[r][n] = x[r] . codes[n], both along memory.
#pragma once
#include "vec.hpp"
#if TA_TILES
#include "dot_tiles.hpp"
#endif

namespace TA_ISA {

// Memory that is wanted next: it is fetched while this one is computed with, some lines at a time.
struct Ahead {
    const uint8_t *next;
    int64_t bytes;

    void fetch(int64_t share) {
        for (int64_t i = 0; i < share && i < bytes; i += 64) __builtin_prefetch(next + i);
        next += share, bytes -= share;
    }
};

#if !TA_TILES
#if TA_WIDE
constexpr int CODE_ROWS = 4;

// R rows of x (1 to 4) with CODE_ROWS rows of codes.
template <int R>
static inline void dot_tile(const uint8_t *codes, int64_t stride, const int16_t *x, int64_t x_stride, int len,
                            int32_t *out, int64_t out_stride) {
    __m512i sum[R][4];
    for (int r = 0; r < R; r++)
        for (int k = 0; k < 4; k++) sum[r][k] = _mm512_setzero_si512();
    auto add = [&](const __m512i *u, int r, __m512i y) {
        for (int k = 0; k < 4; k++) sum[r][k] = _mm512_dpwssd_epi32(sum[r][k], u[k], y);
    };
    int i = 0;
    __m512i u[4];
    for (; i + 32 <= len; i += 32) {
        for (int k = 0; k < 4; k++)
            u[k] = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + k * stride + i)));
        for (int r = 0; r < R; r++) add(u, r, _mm512_loadu_si512(x + r * x_stride + i));
    }
    if (i < len) { // 16 more: head_dim 80
        for (int k = 0; k < 4; k++) {
            const __m128i few = _mm_loadu_si128((const __m128i *)(codes + k * stride + i));
            u[k] = _mm512_castsi256_si512(_mm256_cvtepu8_epi16(few));
        }
        for (int r = 0; r < R; r++) add(u, r, _mm512_maskz_loadu_epi16(0xffff, x + r * x_stride + i));
    }
    // Transpositions with sums: first the four rows of codes side by side in each lane, then the lanes of four rows of x.
    __m512i v[4];
    for (int r = 0; r < R; r++) {
        auto pairs = [](__m512i a, __m512i b) {
            return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        };
        const __m512i a = pairs(sum[r][0], sum[r][1]), b = pairs(sum[r][2], sum[r][3]);
        v[r] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    for (int r = R; r < 4; r++) v[r] = v[0];
    const __m512i a = _mm512_add_epi32(_mm512_shuffle_i32x4(v[0], v[1], 0x44), _mm512_shuffle_i32x4(v[0], v[1], 0xee));
    const __m512i b = _mm512_add_epi32(_mm512_shuffle_i32x4(v[2], v[3], 0x44), _mm512_shuffle_i32x4(v[2], v[3], 0xee));
    const __m512i all = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm_storeu_si128((__m128i *)out, _mm512_castsi512_si128(all));
    if (R > 1) _mm_storeu_si128((__m128i *)(out + out_stride), _mm512_extracti32x4_epi32(all, 1));
    if (R > 2) _mm_storeu_si128((__m128i *)(out + 2 * out_stride), _mm512_extracti32x4_epi32(all, 2));
    if (R > 3) _mm_storeu_si128((__m128i *)(out + 3 * out_stride), _mm512_extracti32x4_epi32(all, 3));
}
#elif defined(__AVX2__)
constexpr int CODE_ROWS = 2;

// Half of a transposition with sums: 32-bit lanes of a and b in turn, or (wide) 64-bit lanes.
static inline __m256i pair_sums(__m256i a, __m256i b, bool wide = false) {
    return wide ? _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))
                : _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}

template <int R>
static inline void dot_tile(const uint8_t *codes, int64_t stride, const int16_t *x, int64_t x_stride, int len,
                            int32_t *out, int64_t out_stride) {
    __m256i a[R], b[R];
    for (int r = 0; r < R; r++) a[r] = b[r] = _mm256_setzero_si256();
    for (int i = 0; i < len; i += 16) {
        const __m256i u = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + i)));
        const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + stride + i)));
        for (int r = 0; r < R; r++) {
            const __m256i y = _mm256_loadu_si256((const __m256i *)(x + r * x_stride + i));
            a[r] = _mm256_add_epi32(_mm256_madd_epi16(u, y), a[r]);
            b[r] = _mm256_add_epi32(_mm256_madd_epi16(v, y), b[r]);
        }
    }
    for (int r = 0; r < R; r += 2) { // two rows of x share the additions at the end
        const int next = r + 1 < R ? r + 1 : r;
        const __m256i h = pair_sums(pair_sums(a[r], b[r]), pair_sums(a[next], b[next]), true);
        const __m128i s = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
        _mm_storel_epi64((__m128i *)(out + r * out_stride), s);
        if (next > r) _mm_storel_epi64((__m128i *)(out + next * out_stride), _mm_unpackhi_epi64(s, s));
    }
}
#else
constexpr int CODE_ROWS = 2;

template <int R>
static inline void dot_tile(const uint8_t *codes, int64_t stride, const int16_t *x, int64_t x_stride, int len,
                            int32_t *out, int64_t out_stride) {
    for (int r = 0; r < R; r++) {
        int32_t a = 0, b = 0;
        const int16_t *y = x + r * x_stride;
        for (int i = 0; i < len; i++) {
            a += codes[i] * y[i];
            b += codes[stride + i] * y[i];
        }
        out[r * out_stride] = a;
        out[r * out_stride + 1] = b;
    }
}
#endif

template <int R>
static inline void dot_strip(const uint8_t *codes, int64_t stride, int count, const int16_t *x, int64_t x_stride,
                             int len, int32_t *out, int64_t out_stride, Ahead ahead) {
    const int64_t share = (ahead.bytes * CODE_ROWS / 64 / (count > 1 ? count : 1) + 1) * 64;
    for (int n = 0; n < count; n += CODE_ROWS) {
        ahead.fetch(share);
        dot_tile<R>(codes + n * stride, stride, x, x_stride, len, out + n, out_stride);
    }
}

// uint8 codes [count][len], int16 x [rows][len] of at most MOST_16; count is a multiple of CODE_ROWS, len of 16. The sum
// of codes times MOST_16 must stay below 2^31.
static inline void dot_rows(const uint8_t *codes, int64_t stride, int count, const int16_t *x, int64_t x_stride,
                            int rows, int len, int32_t *out, int64_t out_stride, Ahead ahead = Ahead{nullptr, 0}) {
    int r = 0;
    for (; r + 4 <= rows; r += 4, ahead.bytes = 0)
        dot_strip<4>(codes, stride, count, x + r * x_stride, x_stride, len, out + r * out_stride, out_stride, ahead);
    x += r * x_stride, out += r * out_stride;
    if (rows - r == 3) dot_strip<3>(codes, stride, count, x, x_stride, len, out, out_stride, ahead);
    if (rows - r == 2) dot_strip<2>(codes, stride, count, x, x_stride, len, out, out_stride, ahead);
    if (rows - r == 1) dot_strip<1>(codes, stride, count, x, x_stride, len, out, out_stride, ahead);
}
#endif // TA_TILES

// Scores of exact tokens: out[r][n] = q[r] . k[n] in float32; four rows of q and two of k at once.
template <int R>
static inline void dot_floats(const float *k, int64_t k_stride, int count, const float *q, int64_t q_stride, int len,
                              float *out, int64_t out_stride) {
    for (int n = 0; n < count; n += 2) {
        const float *k0 = k + n * k_stride, *k1 = n + 1 < count ? k0 + k_stride : k0;
        vf a[R], b[R];
        for (int r = 0; r < R; r++) a[r] = b[r] = vf{};
        for (int i = 0; i < len; i += W) {
            vf u = load(k0 + i), v = load(k1 + i);
            for (int r = 0; r < R; r++) {
                vf y = load(q + r * q_stride + i);
                a[r] += u * y;
                b[r] += v * y;
            }
        }
        for (int r = 0; r < R; r++) {
            out[r * out_stride + n] = sum_of(a[r]);
            if (n + 1 < count) out[r * out_stride + n + 1] = sum_of(b[r]);
        }
    }
}

static inline void dot_float_rows(const float *k, int64_t k_stride, int count, const float *q, int64_t q_stride,
                                  int rows, int len, float *out, int64_t out_stride) {
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        dot_floats<4>(k, k_stride, count, q + r * q_stride, q_stride, len, out + r * out_stride, out_stride);
    for (; r < rows; r++)
        dot_floats<1>(k, k_stride, count, q + r * q_stride, q_stride, len, out + r * out_stride, out_stride);
}

// acc[r][d] += sum_t p[r][t] v[t][d]; R rows, 2 vectors of channels at once.
template <int R>
static inline void add_floats(const float *p, int64_t p_stride, const float *v, int64_t v_stride, int tokens, int dim,
                              float *acc, int64_t acc_stride) {
    for (int d = 0; d < dim; d += 2 * W) {
        bool two = d + W < dim;
        vf a[R], b[R];
        for (int r = 0; r < R; r++) {
            a[r] = load(acc + r * acc_stride + d);
            b[r] = two ? load(acc + r * acc_stride + d + W) : vf{};
        }
        for (int t = 0; t < tokens; t++) {
            vf u = load(v + t * v_stride + d), w = two ? load(v + t * v_stride + d + W) : u;
            for (int r = 0; r < R; r++) {
                vf x = splat(p[r * p_stride + t]);
                a[r] += x * u;
                b[r] += x * w;
            }
        }
        for (int r = 0; r < R; r++) {
            store(acc + r * acc_stride + d, a[r]);
            if (two) store(acc + r * acc_stride + d + W, b[r]);
        }
    }
}

static inline void add_float_rows(const float *p, int64_t p_stride, const float *v, int64_t v_stride, int tokens,
                                  int dim, float *acc, int64_t acc_stride, int rows) {
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        add_floats<4>(p + r * p_stride, p_stride, v, v_stride, tokens, dim, acc + r * acc_stride, acc_stride);
    for (; r < rows; r++)
        add_floats<1>(p + r * p_stride, p_stride, v, v_stride, tokens, dim, acc + r * acc_stride, acc_stride);
}

} // namespace TA_ISA
