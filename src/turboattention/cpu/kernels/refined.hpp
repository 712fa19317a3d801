// The refined channels of K: their lower planes times q, for AVX-512 in integers, else in float32.
//
// A code of a refined channel is upper * 2^bits + lower; the upper part is among the codes of the page, the lower planes
// lie channel by channel. With q folded to integers both parts multiply the same number.
#pragma once
#include "softmax.hpp"
#include "unpack.hpp"

namespace TA_ISA {

constexpr bool REFINED_INTEGERS = TA_WIDE;
constexpr int MOST_REFINED = 256;

#if TA_WIDE

// Four channels of 64 tokens, one vector of bytes each, in the order of one multiplication: 4 bytes of each of 16 tokens.
static inline void interleave4(const __m512i *plane, __m512i *out) {
    // Then each of the four vectors has 16 neighbouring tokens.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i p0 = _mm512_permutexvar_epi32(order, plane[0]), p1 = _mm512_permutexvar_epi32(order, plane[1]);
    const __m512i p2 = _mm512_permutexvar_epi32(order, plane[2]), p3 = _mm512_permutexvar_epi32(order, plane[3]);
    const __m512i a = _mm512_unpacklo_epi8(p0, p1), b = _mm512_unpackhi_epi8(p0, p1);
    const __m512i c = _mm512_unpacklo_epi8(p2, p3), d = _mm512_unpackhi_epi8(p2, p3);
    out[0] = _mm512_unpacklo_epi16(a, c), out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, d), out[3] = _mm512_unpackhi_epi16(b, d);
}

template <int SIZE, int BITS>
static inline void interleave_planes(const uint8_t *codes, int refined, uint8_t *out) {
    for (int j = 0; j < refined; j += 4, out += 4 * SIZE)
        for (int m = 0; m < SIZE / 64; m++) {
            __m512i plane[4], four[4];
            for (int i = 0; i < 4; i++)
                plane[i] = j + i < refined ? wide_parts<SIZE * BITS / 8, BITS>(codes + (j + i) * (SIZE * BITS / 8), m)
                                           : _mm512_setzero_si512();
            interleave4(plane, four);
            for (int i = 0; i < 4; i++) _mm512_storeu_si512(out + 256 * m + 64 * i, four[i]);
        }
}

// The planes as groups of 4 channels, [refined / 4 rounded up][page_size][4] bytes.
static inline void refined_groups(const TaPageFormat &f, const uint8_t *page, uint8_t *out) {
    const uint8_t *codes = page + f.key_refined_codes;
    const bool wide = f.page_size == 128; // else 64
    switch (f.refined_bits) {
    case 1: wide ? interleave_planes<128, 1>(codes, f.refined, out) : interleave_planes<64, 1>(codes, f.refined, out); break;
    case 2: wide ? interleave_planes<128, 2>(codes, f.refined, out) : interleave_planes<64, 2>(codes, f.refined, out); break;
    default: wide ? interleave_planes<128, 4>(codes, f.refined, out) : interleave_planes<64, 4>(codes, f.refined, out);
    }
}

// Where `fold_halves` puts channel c among 64; elsewhere they lie in order.
static inline __m512i folded_place(__m512i c) {
    if (!TA_TILES) return c;
    auto bits = [&](int16_t mask) { return _mm512_and_si512(c, _mm512_set1_epi16(mask)); };
    return _mm512_or_si512(bits(0xe3), _mm512_or_si512(_mm512_srli_epi16(bits(0x10), 2), _mm512_slli_epi16(bits(0x0c), 1)));
}

// folded[index[j]] of one row as halves; zeros behind the last.
static inline void refined_row(const int16_t *folded, int dim, const uint8_t *index, int refined, uint8_t *upper,
                               uint8_t *lower) {
    for (int j = 0; j < refined; j += 32) {
        const int left = min2(32, refined - j);
        const __mmask32 some = left == 32 ? 0xffffffffu : (1u << left) - 1;
        const __m512i at = folded_place(_mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, index + j)));
        __m512i x = _mm512_setzero_si512();
        for (int c = 0; c < dim; c += 64) { // a permutation takes 64 numbers
            const uint64_t there = c + 64 <= dim ? ~(uint64_t)0 : ((uint64_t)1 << (dim - c)) - 1;
            const __m512i low = _mm512_maskz_loadu_epi16((__mmask32)there, folded + c);
            const __m512i high = _mm512_maskz_loadu_epi16((__mmask32)(there >> 32), folded + c + 32);
            const __mmask32 here = _mm512_mask_cmpeq_epi16_mask(some, _mm512_srli_epi16(at, 6), _mm512_set1_epi16(c / 64));
            x = _mm512_mask_blend_epi16(here, x, _mm512_permutex2var_epi16(low, at, high));
        }
        _mm256_storeu_si256((__m256i *)(upper + j), upper_bytes(x));
        _mm256_storeu_si256((__m256i *)(lower + j), lower_bytes(x));
    }
}

// Sums of one row over the refined channels: out[t], int32.
static inline void refined_sums(const uint8_t *groups, int refined, int size, const uint8_t *upper, const uint8_t *lower,
                                int32_t *out) {
    for (int t = 0; t < size; t += 64) {
        __m512i high[4], low[4];
        for (int i = 0; i < 4; i++) high[i] = low[i] = _mm512_setzero_si512();
        for (int j = 0; j < refined; j += 4) {
            const __m512i x = four_bytes(upper + j), y = four_bytes(lower + j);
            const uint8_t *from = groups + j * size + 4 * t;
            for (int i = 0; i < 4; i++) {
                const __m512i codes = _mm512_loadu_si512(from + 64 * i);
                high[i] = _mm512_dpbusd_epi32(high[i], codes, x), low[i] = _mm512_dpbusd_epi32(low[i], codes, y);
            }
        }
        for (int i = 0; i < 4; i++)
            _mm512_storeu_si512(out + t + 16 * i, _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]));
    }
}
#endif

} // namespace TA_ISA
