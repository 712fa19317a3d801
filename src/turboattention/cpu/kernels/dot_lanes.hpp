// Products of packed rows with rows of int16 for AVX-512 without tiles: each of 16 lanes sums for one packed row.
//
// Rows are transposed as they are packed, 16 bytes of 16 rows at a time, and their codes taken apart in registers; nothing
// is summed across lanes and no byte is stored between. The int16 numbers are multiplied as upper and lower halves.
#pragma once
#include "dot.hpp"
#include "softmax.hpp"

namespace TA_ISA {

constexpr bool LANES = TA_WIDE && !TA_TILES;

#if TA_WIDE && !TA_TILES
// Whether rows of so many bytes can be read so: codes of one plane, in parts of whole vectors of 16 bytes.
static inline bool lanes_fit(int bits, int64_t bytes) { return bits != 3 && bytes % 16 == 0; }

// Upper and lower halves of int16 rows, [rows][len] bytes each; len is a multiple of 16.
static inline void halve_rows(const int16_t *x, int64_t stride, int rows, int len, uint8_t *upper, uint8_t *lower) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < len; i += 32) {
            const bool whole = i + 32 <= len;
            const __m512i v = _mm512_maskz_loadu_epi16(whole ? 0xffffffffu : 0xffffu, x + r * stride + i);
            const __mmask32 kept = whole ? 0xffffffffu : 0xffffu;
            _mm256_mask_storeu_epi8(upper + r * len + i, kept, upper_bytes(v));
            _mm256_mask_storeu_epi8(lower + r * len + i, kept, lower_bytes(v));
        }
}

// 16 bytes of 16 rows as four vectors of 4 bytes of each row.
static inline void transpose16(const uint8_t *rows, int64_t bytes, __m512i *out) {
    __m512i a[4];
    for (int i = 0; i < 4; i++) {
        auto row = [&](int j) { return _mm_loadu_si128((const __m128i *)(rows + (4 * j + i) * bytes)); };
        a[i] = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1);
        a[i] = _mm512_inserti32x4(_mm512_inserti32x4(a[i], row(2), 2), row(3), 3);
    }
    const __m512i b = _mm512_unpacklo_epi32(a[0], a[1]), c = _mm512_unpacklo_epi32(a[2], a[3]);
    const __m512i d = _mm512_unpackhi_epi32(a[0], a[1]), e = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(b, c), out[1] = _mm512_unpackhi_epi64(b, c);
    out[2] = _mm512_unpacklo_epi64(d, e), out[3] = _mm512_unpackhi_epi64(d, e);
}

// Adds the products of 16 packed rows of `bytes` bytes with R rows of halves at `stride`; `ahead` is fetched meanwhile.
template <int R, int BITS>
static inline void lanes_add(const uint8_t *rows, int64_t bytes, const uint8_t *upper, const uint8_t *lower, int64_t stride,
                             __m512i *high, __m512i *low, Ahead ahead) {
    const int64_t share = (ahead.bytes * 16 / bytes + 63) & ~(int64_t)63;
    const __m512i mask = _mm512_set1_epi8((char)((1 << BITS) - 1));
    for (int64_t c = 0; c < bytes; c += 16) {
        __m512i four[4];
        transpose16(rows + c, bytes, four);
        ahead.fetch(share);
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++)
#pragma GCC unroll 4
            for (int k = 0; k < 8 / BITS; k++) { // part k of a row has `bytes` codes
                const __m512i codes = BITS == 8 ? four[g] : _mm512_and_si512(_mm512_srli_epi16(four[g], k * BITS), mask);
                const int64_t at = k * bytes + c + 4 * g;
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    high[r] = _mm512_dpbusd_epi32(high[r], codes, four_bytes(upper + r * stride + at));
                    low[r] = _mm512_dpbusd_epi32(low[r], codes, four_bytes(lower + r * stride + at));
                }
            }
    }
}

// out[r][n] = sum over runs of row n of `at(run)` times the run's part of row r; count is a multiple of 16.
// `ahead(run, n)`: what is fetched beside rows n .. n + 15 of a run, once for all R.
template <int R, int BITS, class At, class Fetch>
static inline void lanes_strip(At at, Fetch ahead, int runs, int count, int64_t bytes, const uint8_t *upper,
                               const uint8_t *lower, int64_t stride, int32_t *out, int64_t out_stride, bool fetch) {
    const int64_t codes = bytes * 8 / BITS;
    for (int n = 0; n < count; n += 16) {
        __m512i high[R], low[R];
        for (int r = 0; r < R; r++) high[r] = low[r] = _mm512_setzero_si512();
        for (int p = 0; p < runs; p++)
            lanes_add<R, BITS>(at(p) + n * bytes, bytes, upper + p * codes, lower + p * codes, stride, high, low,
                               fetch ? ahead(p, n) : Ahead{nullptr, 0});
        for (int r = 0; r < R; r++)
            _mm512_storeu_si512(out + r * out_stride + n, _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]));
    }
}

template <int BITS, class At, class Fetch>
static inline void lanes_of(At at, Fetch ahead, int runs, int count, int64_t bytes, const uint8_t *upper,
                            const uint8_t *lower, int rows, int64_t stride, int32_t *out, int64_t out_stride) {
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        lanes_strip<4, BITS>(at, ahead, runs, count, bytes, upper + r * stride, lower + r * stride, stride,
                             out + r * out_stride, out_stride, r == 0);
    const bool fetch = r == 0;
    upper += r * stride, lower += r * stride, out += r * out_stride;
    if (rows - r == 3) lanes_strip<3, BITS>(at, ahead, runs, count, bytes, upper, lower, stride, out, out_stride, fetch);
    if (rows - r == 2) lanes_strip<2, BITS>(at, ahead, runs, count, bytes, upper, lower, stride, out, out_stride, fetch);
    if (rows - r == 1) lanes_strip<1, BITS>(at, ahead, runs, count, bytes, upper, lower, stride, out, out_stride, fetch);
}

// As `dot_rows`, of rows of `bytes` bytes with codes of `bits` bits: `at(run)` is the first packed row of a run.
template <class At, class Fetch>
static inline void dot_packed(int bits, At at, Fetch ahead, int runs, int count, int64_t bytes, const uint8_t *upper,
                              const uint8_t *lower, int rows, int64_t stride, int32_t *out, int64_t out_stride) {
    if (bits == 8) return lanes_of<8>(at, ahead, runs, count, bytes, upper, lower, rows, stride, out, out_stride);
    if (bits == 4) return lanes_of<4>(at, ahead, runs, count, bytes, upper, lower, rows, stride, out, out_stride);
    lanes_of<2>(at, ahead, runs, count, bytes, upper, lower, rows, stride, out, out_stride);
}
#endif

} // namespace TA_ISA
