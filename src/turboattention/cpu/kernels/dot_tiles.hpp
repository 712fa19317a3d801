// Decode's products by tiles: rows of codes times rows of int16, whose halves are columns of operand b.
//
// Columns: upper bytes of 4 rows, their lower bytes, then the same of 4 more rows.
#pragma once
#include "item.hpp"
#include "softmax.hpp"
#include "tiles.hpp"

namespace TA_ISA {

#if TA_WIDE
// Four rows of 64 signed bytes, to one column each of 16 steps: the dword at place j of
// lane l is step LANE l + STEP j.
template <int LANE, int STEP> static inline void put_columns(const __m512i *v, uint8_t *to) {
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    const __m512i t[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                          _mm512_unpackhi_epi64(b, d)};
    for (int j = 0; j < 4; j++) {
        uint8_t *p = to + STEP * j * TILE_BYTES;
        _mm_storeu_si128((__m128i *)p, _mm512_castsi512_si128(t[j]));
        _mm_storeu_si128((__m128i *)(p + LANE * TILE_BYTES), _mm512_extracti32x4_epi32(t[j], 1));
        _mm_storeu_si128((__m128i *)(p + 2 * LANE * TILE_BYTES), _mm512_extracti32x4_epi32(t[j], 2));
        _mm_storeu_si128((__m128i *)(p + 3 * LANE * TILE_BYTES), _mm512_extracti32x4_epi32(t[j], 3));
    }
}

// The four vectors' sums (or maxima) side by side.
template <class Join> static inline __m128 join_four(const __m512 *v, Join join) {
    const __m512 a = join(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = join(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d x = (__m512d)a, y = (__m512d)b;
    const __m512 c = join((__m512)_mm512_unpacklo_pd(x, y), (__m512)_mm512_unpackhi_pd(x, y));
    const __m512 d = join(c, (__m512)_mm512_shuffle_i32x4((__m512i)c, (__m512i)c, 0x4e));
    const __m512 e = join(d, (__m512)_mm512_shuffle_i32x4((__m512i)d, (__m512i)d, 0xb1));
    return _mm512_castps512_ps128(e);
}

// q times `scale` of `count` rows (1 to 4) to 16 bits, as `to_int16` does, and those to columns `column` .. column + 7 of
// operand b. folded: the same numbers [4][dim], each 64 in the order of `folded_place`. base[r] = q[r] . zero.
static inline void fold_halves(const float *q, int dim, int count, const float *scale, const float *zero, int column,
                               uint8_t *operand, int16_t *folded, int64_t folded_stride, float *step, float *base) {
    const float *row[4];
    __m512 largest[4], shift[4];
    for (int r = 0; r < 4; r++) row[r] = q + (r < count ? r : 0) * dim, largest[r] = shift[r] = _mm512_setzero_ps();
    for (int i = 0; i < dim; i += 16) {
        const __m512 s = (__m512)load(scale + i), z = (__m512)load(zero + i);
        for (int r = 0; r < 4; r++) {
            const __m512 x = (__m512)load(row[r] + i);
            largest[r] = (__m512)vmax((vf)largest[r], vabs((vf)_mm512_mul_ps(x, s)));
            shift[r] = _mm512_fmadd_ps(x, z, shift[r]);
        }
    }
    const __m128 top = _mm_max_ps(join_four(largest, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); }),
                                  _mm_set1_ps(LEAST_TOP));
    const __m128 sums = join_four(shift, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
    alignas(16) float inverse[4], steps[4], bases[4];
    _mm_store_ps(inverse, _mm_div_ps(_mm_set1_ps(MOST_16), top));
    _mm_store_ps(steps, _mm_div_ps(top, _mm_set1_ps(MOST_16)));
    _mm_store_ps(bases, sums);
    for (int r = 0; r < count; r++) step[r] = steps[r], base[r] = bases[r];
    const __m512 magic = _mm512_set1_ps(MAGIC);
    const __m512i own = _mm512_set1_epi32(0x4b400000), low = _mm512_set1_epi16(255), half = _mm512_set1_epi16(128);
    for (int i = 0; i < dim; i += 64) {
        __m512i upper[4], lower[4];
        for (int r = 0; r < 4; r++) {
            const __m512 factor = _mm512_set1_ps(inverse[r]);
            __m512i v[4];
            for (int k = 0; k < 4; k++) {
                v[k] = _mm512_setzero_si512();
                if (i + 16 * k >= dim) continue;
                const __m512 y = _mm512_mul_ps((__m512)load(row[r] + i + 16 * k), (__m512)load(scale + i + 16 * k));
                v[k] = _mm512_sub_epi32((__m512i)_mm512_fmadd_ps(y, factor, magic), own);
            }
            const __m512i a = _mm512_packs_epi32(v[0], v[1]), b = _mm512_packs_epi32(v[2], v[3]);
            if (r < count) {
                _mm512_storeu_si512(folded + r * folded_stride + i, a);
                _mm512_storeu_si512(folded + r * folded_stride + i + 32, b);
            }
            // Lane l, place j: channels 16 j + 4 l .. + 3, which are step 4 j + l.
            lower[r] = _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
            upper[r] = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                                          _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
        }
        put_columns<1, 4>(upper, operand + TILE_ROWS * i + 4 * column);
        put_columns<1, 4>(lower, operand + TILE_ROWS * i + 4 * column + 16);
    }
}
#endif

// `count` rows (1 to 4) of x, `len` numbers (a multiple of 16), to columns `column` .. column + 7 of operand b. Columns
// of rows that are not there keep what they had; nobody reads their sums.
#if TA_WIDE
static inline void pack_halves(const int16_t *x, int64_t x_stride, int count, int len, int column, uint8_t *out) {
    for (int i = 0; i < len; i += TILE_BYTES) {
        const uint64_t there = i + 64 <= len ? ~(uint64_t)0 : ((uint64_t)1 << (len - i)) - 1;
        __m512i upper[4], lower[4];
        for (int r = 0; r < 4; r++) {
            const int16_t *row = x + (r < count ? r : 0) * x_stride + i;
            const __m512i a = _mm512_maskz_loadu_epi16((__mmask32)there, row);
            const __m512i b = _mm512_maskz_loadu_epi16((__mmask32)(there >> 32), row + 32);
            lower[r] = _mm512_inserti64x4(_mm512_castsi256_si512(lower_bytes(a)), lower_bytes(b), 1);
            upper[r] = _mm512_inserti64x4(_mm512_castsi256_si512(upper_bytes(a)), upper_bytes(b), 1);
        }
        put_columns<4, 1>(upper, out + TILE_ROWS * i + 4 * column);
        put_columns<4, 1>(lower, out + TILE_ROWS * i + 4 * column + 16);
    }
}

// Sums of 16 rows of codes (upper halves of 4 rows of x, then lower ones, at `stride`): `take(row of x, W of them, first)`.
template <class Take> static inline void join_halves(const int32_t *sums, int count, Take take) {
    __m512i z[4];
    for (int j = 0; j < 4; j++) { // rows of codes j, 4 + j, 8 + j, 12 + j in the lanes
        const int32_t *p = sums + j * TILE_ROWS;
        auto two = [&](const int32_t *q) {
            const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)q));
            return _mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i *)(q + 4 * TILE_ROWS)), 1);
        };
        const __m512i a = two(p), b = two(p + 8 * TILE_ROWS);
        z[j] = _mm512_add_epi32(_mm512_slli_epi32(_mm512_shuffle_i32x4(a, b, 0x88), 8), _mm512_shuffle_i32x4(a, b, 0xdd));
    }
    const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
    const __m512i c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
    take(0, (vi)_mm512_unpacklo_epi64(a, c), 0);
    if (count > 1) take(1, (vi)_mm512_unpackhi_epi64(a, c), 0);
    if (count > 2) take(2, (vi)_mm512_unpacklo_epi64(b, d), 0);
    if (count > 3) take(3, (vi)_mm512_unpackhi_epi64(b, d), 0);
}
#else // tests without AVX-512
static inline void pack_halves(const int16_t *x, int64_t x_stride, int count, int len, int column, uint8_t *out) {
    for (int r = 0; r < count; r++)
        for (int i = 0; i < len; i++) {
            const int16_t v = x[r * x_stride + i];
            uint8_t *to = out + i / 4 * TILE_BYTES + 4 * (column + r) + i % 4;
            to[0] = (uint8_t)((v + 128) >> 8), to[16] = (uint8_t)v;
        }
}
template <class Take> static inline void join_halves(const int32_t *sums, int count, Take take) {
    for (int r = 0; r < count; r++)
        for (int n = 0; n < TILE_ROWS; n += W) {
            vi x;
            for (int k = 0; k < W; k++) x[k] = 256 * sums[(n + k) * TILE_ROWS + r] + sums[(n + k) * TILE_ROWS + r + 4];
            take(r, x, n);
        }
}
#endif

// Rows of int16 to operands b of 8 rows each, HALVES_BYTES apart.
static inline void pack_operands(const int16_t *x, int64_t x_stride, int rows, int len, uint8_t *operands) {
    for (int r = 0; r < rows; r += 4)
        pack_halves(x + r * x_stride, x_stride, min2(4, rows - r), len, r % 8 * 2, operands + r / 8 * HALVES_BYTES);
}

// Rows of codes times all operands, `len` bytes (whole tiles, or the dim of the thread's TileScope): sums of `count` rows
// (a multiple of 16) [rows of x / 8][...][16], TILE_SUM_BYTES apart. What they are is known later: `join_sums`.
static inline void multiply_operands(const uint8_t *codes, int64_t stride, int count, const uint8_t *operands, int rows,
                                     int len, int32_t *sums) {
    constexpr int BLOCK = TILE_GROUPS * TILE_ROWS;
    for (int r = 0; r < rows; r += 8, operands += HALVES_BYTES, sums += TILE_SUM_BYTES / 4)
        for (int n = 0; n < count; n += BLOCK)
            tile_products(codes + n * stride, stride, min2(TILE_GROUPS, (count - n) / TILE_ROWS), operands, len, nullptr,
                          sums + n * TILE_ROWS, TILE_ROWS);
}

// Those sums put together: `take(r, n, x)` gets x[r] . codes[n] for W neighbouring n.
template <class Take> static inline void join_sums(const int32_t *sums, int count, int rows, Take take) {
    for (int r = 0; r < rows; r += 4) {
        const int32_t *from = sums + r / 8 * (TILE_SUM_BYTES / 4) + r % 8 * 2;
        for (int n = 0; n < count; n += TILE_ROWS)
            join_halves(from + n * TILE_ROWS, min2(4, rows - r), [&](int i, vi x, int first) { take(r + i, n + first, x); });
    }
}

} // namespace TA_ISA
