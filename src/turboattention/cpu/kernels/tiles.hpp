// AMX: products of tiles of bytes, c[16][16] += a[16][64] b[64][16], and the layout that all files here use them in.
//
// Tiles 0 to 3 are sums of four groups of 16 rows. 4 and 5 are operands of 64 bytes a row, 6 and 7 those of what remains
// of a row (head_dim 80 and 96). Operand b lies as panels do: 4 bytes of each of 16 columns in turn.
#pragma once
#include "vec.hpp"

namespace TA_ISA {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64, TILE_SUMS = TILE_ROWS * TILE_ROWS;
constexpr int TILE_GROUPS = 4; // groups of 16 rows at once

struct alignas(64) TileShapes { // as the instruction reads it
    uint8_t palette, start_row, zeros[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];

    explicit TileShapes(int rest) : palette(1), start_row(0), zeros{}, row_bytes{}, rows{} {
        for (int i = 0; i < 8; i++) row_bytes[i] = TILE_BYTES, rows[i] = TILE_ROWS;
        if (rest) row_bytes[6] = (uint16_t)rest, rows[7] = (uint8_t)(rest / 4);
    }
};

#if defined(TA_TILES_EMULATED) // for tests on other processors: the same shapes and bytes, one product after the other
struct EmulatedTiles {
    TileShapes shapes{0};
    uint8_t bytes[8][TILE_ROWS][TILE_BYTES];
};
static thread_local EmulatedTiles emulated;

static inline void tile_shapes(const TileShapes &shapes) { emulated.shapes = shapes; }
static inline void tile_release() { emulated.shapes.palette = 0; }
static inline void emulated_load(int n, const void *p, int64_t stride) {
    if (!emulated.shapes.palette) __builtin_trap();
    for (int r = 0; r < emulated.shapes.rows[n]; r++)
        memcpy(emulated.bytes[n][r], (const uint8_t *)p + r * stride, emulated.shapes.row_bytes[n]);
}
static inline void emulated_store(int n, void *p, int64_t stride) {
    for (int r = 0; r < emulated.shapes.rows[n]; r++)
        memcpy((uint8_t *)p + r * stride, emulated.bytes[n][r], emulated.shapes.row_bytes[n]);
}
static inline void emulated_products(int c, int a, int b) {
    if (emulated.shapes.row_bytes[a] != 4 * emulated.shapes.rows[b]) __builtin_trap();
    for (int m = 0; m < emulated.shapes.rows[a]; m++)
        for (int n = 0; n < TILE_ROWS; n++) {
            int32_t sum;
            memcpy(&sum, emulated.bytes[c][m] + 4 * n, 4);
            for (int k = 0; k < emulated.shapes.row_bytes[a]; k++)
                sum += emulated.bytes[a][m][k] * (int8_t)emulated.bytes[b][k / 4][4 * n + k % 4];
            memcpy(emulated.bytes[c][m] + 4 * n, &sum, 4);
        }
}
#define TA_TILE_LOAD(n, p, stride) emulated_load(n, p, stride)
#define TA_TILE_STORE(n, p, stride) emulated_store(n, p, stride)
#define TA_TILE_ZERO(n) memset(emulated.bytes[n], 0, sizeof emulated.bytes[n])
#define TA_TILE_PRODUCTS(c, a, b) emulated_products(c, a, b)
#else
static inline void tile_shapes(const TileShapes &shapes) {
    __asm__ volatile("" ::: "memory"); // the intrinsics do not say what memory they read
    _tile_loadconfig(&shapes);
}
static inline void tile_release() { _tile_release(); }
#define TA_TILE_LOAD(n, p, stride) _tile_loadd(n, p, stride)
#define TA_TILE_STORE(n, p, stride) _tile_stored(n, p, stride)
#define TA_TILE_ZERO(n) _tile_zero(n)
#define TA_TILE_PRODUCTS(c, a, b) _tile_dpbusd(c, a, b)
#endif

// The shapes of a thread's tiles while it works on rows of `dim` bytes (and on rows of whole tiles).
struct TileScope {
    explicit TileScope(int dim) { tile_shapes(TileShapes(dim % TILE_BYTES)); }
    ~TileScope() { tile_release(); }
    TileScope(const TileScope &) = delete;
    TileScope &operator=(const TileScope &) = delete;
};

// out[r][c] = first[c] + sum_i a[r][i] b[i][c] of 1 to 4 `groups` of 16 rows and 16 columns; a unsigned, b signed bytes,
// b `len` / 4 steps of 64 bytes. len: whole tiles, or the dim of the scope. first: or NULL.
static inline void tile_products(const uint8_t *a, int64_t stride, int groups, const uint8_t *b, int len,
                                 const int32_t *first, int32_t *out, int64_t out_stride) {
    const int64_t next = TILE_ROWS * stride, out_bytes = 4 * out_stride;
    __asm__ volatile("" ::: "memory");
    if (first) {
        TA_TILE_LOAD(0, first, 0);
        TA_TILE_LOAD(1, first, 0);
        TA_TILE_LOAD(2, first, 0);
        TA_TILE_LOAD(3, first, 0);
    } else {
        TA_TILE_ZERO(0);
        TA_TILE_ZERO(1);
        TA_TILE_ZERO(2);
        TA_TILE_ZERO(3);
    }
    int i = 0;
    for (; i + TILE_BYTES <= len; i += TILE_BYTES) {
        TA_TILE_LOAD(5, b + TILE_ROWS * i, TILE_BYTES);
        TA_TILE_LOAD(4, a + i, stride);
        TA_TILE_PRODUCTS(0, 4, 5);
        if (groups > 1) {
            TA_TILE_LOAD(4, a + i + next, stride);
            TA_TILE_PRODUCTS(1, 4, 5);
        }
        if (groups > 2) {
            TA_TILE_LOAD(4, a + i + 2 * next, stride);
            TA_TILE_PRODUCTS(2, 4, 5);
        }
        if (groups > 3) {
            TA_TILE_LOAD(4, a + i + 3 * next, stride);
            TA_TILE_PRODUCTS(3, 4, 5);
        }
    }
    if (i < len) {
        TA_TILE_LOAD(7, b + TILE_ROWS * i, TILE_BYTES);
        TA_TILE_LOAD(6, a + i, stride);
        TA_TILE_PRODUCTS(0, 6, 7);
        if (groups > 1) {
            TA_TILE_LOAD(6, a + i + next, stride);
            TA_TILE_PRODUCTS(1, 6, 7);
        }
        if (groups > 2) {
            TA_TILE_LOAD(6, a + i + 2 * next, stride);
            TA_TILE_PRODUCTS(2, 6, 7);
        }
        if (groups > 3) {
            TA_TILE_LOAD(6, a + i + 3 * next, stride);
            TA_TILE_PRODUCTS(3, 6, 7);
        }
    }
    TA_TILE_STORE(0, out, out_bytes);
    if (groups > 1) TA_TILE_STORE(1, out + TILE_ROWS * out_stride, out_bytes);
    if (groups > 2) TA_TILE_STORE(2, out + 2 * TILE_ROWS * out_stride, out_bytes);
    if (groups > 3) TA_TILE_STORE(3, out + 3 * TILE_ROWS * out_stride, out_bytes);
    __asm__ volatile("" ::: "memory");
}

} // namespace TA_ISA
