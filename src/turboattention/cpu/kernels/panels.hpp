// Products of bytes with panels: out[r][c] = sum_i a[r][i] b[i][c], a in rows, b in panels of 16 columns.
//
// A panel holds its columns side by side, 4 bytes of each in turn: what one multiplication with sums takes. The sums of
// 16 columns then stand in one (or two, or four) vectors, and nothing is added across a vector.
#pragma once
#include "vec.hpp"
#if TA_TILES
#include "tiles.hpp"
#endif

namespace TA_ISA {

constexpr int PANEL = 16;             // columns
constexpr int PANEL_STEP = 4 * PANEL; // bytes of 4 bytes of each column

#if TA_TILES
typedef int32_t Lanes __attribute__((vector_size(64)));
constexpr bool PAIRS = false;
constexpr int COLUMN_STEP = TILE_BYTES; // columns of scores, which are rows of the next product, come in whole tiles
static inline Lanes lanes_at(const void *p) { return load_as<Lanes>((const uint8_t *)p); }
#elif TA_WIDE
typedef __m512i Lanes;
constexpr bool PAIRS = false; // signed times signed: bytes, one side moved by 128
constexpr int ROWS = 4, PANELS = 4;
static inline Lanes lanes_at(const void *p) { return _mm512_loadu_si512(p); }
static inline void put_lanes(int32_t *p, Lanes x) { _mm512_storeu_si512(p, x); }
static inline Lanes spread4(const uint8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}
static inline Lanes add_bytes(Lanes sum, Lanes a, Lanes b) { return _mm512_dpbusd_epi32(sum, a, b); }
static inline Lanes add_signed(Lanes sum, Lanes a, Lanes b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVX2__)
typedef __m256i Lanes;
constexpr bool PAIRS = true; // signed times signed: pairs of int16, because pairs of bytes overflow 16 bits
constexpr int ROWS = 4, PANELS = 1;
static inline Lanes lanes_at(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void put_lanes(int32_t *p, Lanes x) { _mm256_storeu_si256((__m256i *)p, x); }
static inline Lanes spread4(const uint8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
}
// At most 127 times 127, twice: that fits 16 bits.
static inline Lanes add_bytes(Lanes sum, Lanes a, Lanes b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
static inline Lanes add_signed(Lanes sum, Lanes a, Lanes b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
#else
typedef int32_t Lanes __attribute__((vector_size(16)));
constexpr bool PAIRS = true;
constexpr int ROWS = 2, PANELS = 1;
static inline Lanes lanes_at(const void *p) { return load_as<Lanes>((const uint8_t *)p); }
static inline void put_lanes(int32_t *p, Lanes x) { memcpy(p, &x, sizeof x); }
static inline Lanes spread4(const uint8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x - Lanes{};
}
static inline Lanes add_bytes(Lanes sum, Lanes a, Lanes b) {
    sum += (a & 255) * (b << 24 >> 24);
    sum += (a >> 8 & 255) * (b << 16 >> 24);
    sum += (a >> 16 & 255) * (b << 8 >> 24);
    return sum + (a >> 24) * (b >> 24); // a is at most 127
}
static inline Lanes add_signed(Lanes sum, Lanes a, Lanes b) {
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
#endif

#if !TA_TILES
constexpr int COLUMN_STEP = PANEL;
#endif
constexpr int PARTS = PANEL_STEP / (int)sizeof(Lanes); // vectors of a panel
constexpr int COLUMNS = (int)sizeof(Lanes) / 4;        // of a vector
constexpr int SIGNED_BYTES = PAIRS ? 2 : 1;            // of one number of a product of signed ones

#if TA_TILES
// `rows` are those of a buffer of whole groups of 16; what lies in the others does not matter. a is unsigned, b signed.
template <bool SIGNED, class Take>
static inline void panel_products(const uint8_t *a, int64_t a_stride, int rows, const uint8_t *b, int64_t b_stride,
                                  int panels, int steps, const int32_t *first, Take take) {
    alignas(64) int32_t sums[TILE_GROUPS * TILE_SUMS];
    constexpr int BLOCK = TILE_GROUPS * TILE_ROWS;
    for (int r = 0; r < rows; r += BLOCK)
        for (int p = 0; p < panels; p++) {
            const int here = min2(BLOCK, rows - r);
            tile_products(a + r * a_stride, a_stride, (here + TILE_ROWS - 1) / TILE_ROWS, b + p * b_stride, 4 * steps,
                          first ? first + p * PANEL : nullptr, sums, PANEL);
            for (int i = 0; i < here; i++) take(r + i, p * PANEL, lanes_at(sums + i * PANEL));
        }
}

// As panel_products, to out[row][column]: rows in whole groups of 16 there too.
template <bool SIGNED>
static inline void panel_sums(const uint8_t *a, int64_t a_stride, int rows, const uint8_t *b, int64_t b_stride, int panels,
                              int steps, const int32_t *first, int32_t *out, int64_t out_stride) {
    constexpr int BLOCK = TILE_GROUPS * TILE_ROWS;
    for (int r = 0; r < rows; r += BLOCK)
        for (int p = 0; p < panels; p++)
            tile_products(a + r * a_stride, a_stride, (min2(BLOCK, rows - r) + TILE_ROWS - 1) / TILE_ROWS, b + p * b_stride,
                          4 * steps, first ? first + p * PANEL : nullptr, out + r * out_stride + p * PANEL, out_stride);
}
#else
// Sums of R rows and N panels: sums[r][column]. `first`: what the sums of each column begin with, or NULL. A function of
// its own, or the compiler runs out of registers among those of the caller.
template <int R, int N, bool SIGNED>
static __attribute__((noinline)) void panel_tile(const uint8_t *a, int64_t a_stride, const uint8_t *b, int64_t b_stride,
                                                 int steps, const int32_t *first, int32_t *sums) {
    constexpr int C = N * PARTS;
    Lanes sum[R][C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
        const Lanes begin = first ? lanes_at(first + c * COLUMNS) : Lanes{};
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) sum[r][c] = begin;
    }
    for (int i = 0; i < steps; i++) {
        Lanes column[C];
#pragma GCC unroll 16
        for (int c = 0; c < C; c++)
            column[c] = lanes_at(b + c / PARTS * b_stride + i * PANEL_STEP + c % PARTS * (int)sizeof(Lanes));
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const Lanes x = spread4(a + r * a_stride + 4 * i);
#pragma GCC unroll 16
            for (int c = 0; c < C; c++)
                sum[r][c] = SIGNED ? add_signed(sum[r][c], x, column[c]) : add_bytes(sum[r][c], x, column[c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) put_lanes(sums + r * N * PANEL + c * COLUMNS, sum[r][c]);
}

template <int N, bool SIGNED, class Take>
static inline void panel_strip(const uint8_t *a, int64_t a_stride, int rows, const uint8_t *b, int64_t b_stride,
                               int steps, const int32_t *first, Take take) {
    int32_t sums[ROWS * N * PANEL];
    for (int r = 0; r < rows; r += ROWS) {
        panel_tile<ROWS, N, SIGNED>(a + r * a_stride, a_stride, b, b_stride, steps, first, sums);
        for (int i = 0; i < ROWS; i++)
            for (int c = 0; c < N * PANEL; c += COLUMNS) take(r + i, c, lanes_at(sums + i * N * PANEL + c));
    }
}

// All of `rows` (a multiple of 4) and `panels`; `take(row, column, lanes)` gets each vector of sums once.
template <bool SIGNED, class Take>
static inline void panel_products(const uint8_t *a, int64_t a_stride, int rows, const uint8_t *b, int64_t b_stride,
                                  int panels, int steps, const int32_t *first, Take take) {
    for (int p = 0; p < panels;) {
        const int column = p * PANEL;
        const int32_t *begin = first ? first + column : nullptr;
        const uint8_t *from = b + p * b_stride;
        auto moved = [&](int r, int c, Lanes x) { take(r, column + c, x); };
        if (p + PANELS <= panels) {
            panel_strip<PANELS, SIGNED>(a, a_stride, rows, from, b_stride, steps, begin, moved);
            p += PANELS;
        } else {
            panel_strip<1, SIGNED>(a, a_stride, rows, from, b_stride, steps, begin, moved);
            p++;
        }
    }
}

// As panel_products, to out[row][column].
template <bool SIGNED>
static inline void panel_sums(const uint8_t *a, int64_t a_stride, int rows, const uint8_t *b, int64_t b_stride, int panels,
                              int steps, const int32_t *first, int32_t *out, int64_t out_stride) {
    auto put = [&](int r, int c, Lanes x) { put_lanes(out + r * out_stride + c, x); };
    panel_products<SIGNED>(a, a_stride, rows, b, b_stride, panels, steps, first, put);
}
#endif

} // namespace TA_ISA
