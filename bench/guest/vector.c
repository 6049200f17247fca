// Vectors of floats and of bytes, and AES.
#include "bench.h"

#include <immintrin.h>

// ---- products of matrices, in vectors ----

#define ORDER 64

static float left[ORDER][ORDER] __attribute__((aligned(64))), right[ORDER][ORDER] __attribute__((aligned(64)));
static float product[ORDER][ORDER] __attribute__((aligned(64)));

static void prepare_matrices(void) {
    for (int row = 0; row < ORDER; row++)
        for (int column = 0; column < ORDER; column++) {
            left[row][column] = (float)((row * 3 + column) % 7);
            right[row][column] = (float)((row + column * 5) % 11);
        }
}
static void check_product(void) {
    for (int row = 0; row < ORDER; row++)
        for (int column = 0; column < ORDER; column++) {
            float sum = 0;
            for (int k = 0; k < ORDER; k++) sum += left[row][k] * right[k][column];
            check(product[row][column] == sum);
        }
}
static void multiply_sse(unsigned long times) {
    for (; times; times--)
        for (int row = 0; row < ORDER; row++)
            for (int column = 0; column < ORDER; column += 16) {
                __m128 sums[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()};
                for (int k = 0; k < ORDER; k++) {
                    __m128 factor = _mm_set1_ps(left[row][k]);
#pragma GCC unroll 4
                    for (int part = 0; part < 4; part++)
                        sums[part] += factor * _mm_load_ps(&right[k][column + 4 * part]);
                }
#pragma GCC unroll 4
                for (int part = 0; part < 4; part++) _mm_store_ps(&product[row][column + 4 * part], sums[part]);
            }
}
__attribute__((target("avx2,fma"))) static void multiply_avx2(unsigned long times) {
    for (; times; times--)
        for (int row = 0; row < ORDER; row++)
            for (int column = 0; column < ORDER; column += 32) {
                __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
                for (int k = 0; k < ORDER; k++) {
                    __m256 factor = _mm256_broadcast_ss(&left[row][k]);
#pragma GCC unroll 4
                    for (int part = 0; part < 4; part++)
                        sums[part] = _mm256_fmadd_ps(factor, _mm256_load_ps(&right[k][column + 8 * part]), sums[part]);
                }
#pragma GCC unroll 4
                for (int part = 0; part < 4; part++) _mm256_store_ps(&product[row][column + 8 * part], sums[part]);
            }
}
static double measure_matrix(void (*multiply)(unsigned long)) {
    prepare_matrices();
    double result = rate(multiply) * 2.0 * ORDER * ORDER * ORDER * 1e-6;
    check_product();
    return result;
}
static double measure_matrix_sse(void) { return measure_matrix(multiply_sse); }
static double measure_matrix_avx2(void) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) skip("the CPU has no AVX2");
    return measure_matrix(multiply_avx2);
}

// ---- bytes in vectors: counts the letters of a text, whatever their case ----

static uint8_t text[4096] __attribute__((aligned(64)));
static uint64_t letters;

static void count_sse2(unsigned long times) {
    const __m128i zero = _mm_setzero_si128(), low = _mm_set1_epi8(0x20);
    const __m128i below = _mm_set1_epi8('a' - 1), above = _mm_set1_epi8('z' + 1);
    for (letters = 0; times; times--) {
        __m128i sums = zero;
        for (size_t index = 0; index < sizeof text; index += 16) {
            __m128i bytes = _mm_or_si128(_mm_load_si128((const __m128i *)(text + index)), low);
            __m128i is_letter = _mm_and_si128(_mm_cmpgt_epi8(bytes, below), _mm_cmplt_epi8(bytes, above));
            sums = _mm_add_epi64(sums, _mm_sad_epu8(_mm_sub_epi8(zero, is_letter), zero));
        }
        letters += (uint64_t)_mm_cvtsi128_si64(sums) + (uint64_t)_mm_cvtsi128_si64(_mm_unpackhi_epi64(sums, sums));
        check(letters % 3072 == 0);
    }
}
__attribute__((target("avx2"))) static void count_avx2(unsigned long times) {
    const __m256i zero = _mm256_setzero_si256(), low = _mm256_set1_epi8(0x20);
    const __m256i below = _mm256_set1_epi8('a' - 1), above = _mm256_set1_epi8('z' + 1);
    for (letters = 0; times; times--) {
        __m256i sums = zero;
        for (size_t index = 0; index < sizeof text; index += 32) {
            __m256i bytes = _mm256_or_si256(_mm256_load_si256((const __m256i *)(text + index)), low);
            __m256i is_letter = _mm256_and_si256(_mm256_cmpgt_epi8(bytes, below), _mm256_cmpgt_epi8(above, bytes));
            sums = _mm256_add_epi64(sums, _mm256_sad_epu8(_mm256_sub_epi8(zero, is_letter), zero));
        }
        __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        letters += (uint64_t)_mm_cvtsi128_si64(half) + (uint64_t)_mm_cvtsi128_si64(_mm_unpackhi_epi64(half, half));
        check(letters % 3072 == 0);
    }
}
static double measure_bytes(void (*count)(unsigned long)) {
    for (size_t index = 0; index < sizeof text; index++) text[index] = (uint8_t) "a0Zm"[index % 4];
    return rate(count) * sizeof text * 1e-9;
}
static double measure_bytes_sse2(void) { return measure_bytes(count_sse2); }
static double measure_bytes_avx2(void) {
    if (!__builtin_cpu_supports("avx2")) skip("the CPU has no AVX2");
    return measure_bytes(count_avx2);
}

// ---- AES-128 by the CPU's instructions, in counter mode ----

static __m128i keys[11];

// The next round key: each word is the sum of all words up to it, and of the last one transformed (FIPS 197).
#define NEXT_KEY(index, constant)                                                                     \
    do {                                                                                              \
        __m128i key = keys[(index)-1], last = _mm_aeskeygenassist_si128(key, constant);               \
        key = _mm_xor_si128(key, _mm_slli_si128(key, 4));                                             \
        key = _mm_xor_si128(key, _mm_slli_si128(key, 8));                                             \
        keys[index] = _mm_xor_si128(key, _mm_shuffle_epi32(last, 0xff));                              \
    } while (0)

__attribute__((target("aes"))) static void expand_key(__m128i key) {
    keys[0] = key;
    NEXT_KEY(1, 0x01);
    NEXT_KEY(2, 0x02);
    NEXT_KEY(3, 0x04);
    NEXT_KEY(4, 0x08);
    NEXT_KEY(5, 0x10);
    NEXT_KEY(6, 0x20);
    NEXT_KEY(7, 0x40);
    NEXT_KEY(8, 0x80);
    NEXT_KEY(9, 0x1b);
    NEXT_KEY(10, 0x36);
}
// Some blocks at a time: a processor has several of them under way.
#define BLOCKS 8
#define EACH_BLOCK _Pragma("GCC unroll 8") for (int block = 0; block < BLOCKS; block++)
__attribute__((target("aes"))) static inline void encrypt(__m128i *blocks) {
    EACH_BLOCK blocks[block] = _mm_xor_si128(blocks[block], keys[0]);
    for (int round = 1; round < 10; round++) EACH_BLOCK blocks[block] = _mm_aesenc_si128(blocks[block], keys[round]);
    EACH_BLOCK blocks[block] = _mm_aesenclast_si128(blocks[block], keys[10]);
}
__attribute__((target("aes"))) static void encrypt_text(unsigned long times) {
    __m128i *data = (__m128i *)text, one = _mm_set_epi64x(0, 1), counter = one;
    for (; times; times--)
        for (size_t index = 0; index < sizeof text / 16; index += BLOCKS) {
            __m128i blocks[BLOCKS];
            EACH_BLOCK blocks[block] = counter = _mm_add_epi64(counter, one);
            encrypt(blocks);
            EACH_BLOCK data[index + (size_t)block] = _mm_xor_si128(data[index + (size_t)block], blocks[block]);
        }
}
// Bytes as they are written, the first one first.
static __m128i bytes(uint64_t first, uint64_t second) {
    return _mm_set_epi64x((long long)__builtin_bswap64(second), (long long)__builtin_bswap64(first));
}
static double measure_aes(void) {
    if (!__builtin_cpu_supports("aes")) skip("the CPU has no AES instructions");
    // The example in FIPS 197, appendix B.
    __m128i key = bytes(0x2b7e151628aed2a6, 0xabf7158809cf4f3c), plain = bytes(0x3243f6a8885a308d, 0x313198a2e0370734);
    __m128i secret = bytes(0x3925841d02dc09fb, 0xdc118597196a0b32), blocks[BLOCKS] = {plain};
    expand_key(key);
    encrypt(blocks);
    check(_mm_movemask_epi8(_mm_cmpeq_epi8(blocks[0], secret)) == 0xffff);
    return rate(encrypt_text) * sizeof text * 1e-6;
}

static const struct row rows[] = {
    {"matrix_sse", "Mflop/s", measure_matrix_sse},
    {"matrix_avx2", "Mflop/s", measure_matrix_avx2},
    {"bytes_sse2", "GB/s", measure_bytes_sse2},
    {"bytes_avx2", "GB/s", measure_bytes_avx2},
    {"aes_128", "MB/s", measure_aes},
    {0},
};
const struct group vector_group = {"vector", rows};
