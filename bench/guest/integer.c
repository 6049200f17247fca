// Integer code: loops, tables, calls, jumps that are hard to foresee.
#include "bench.h"

#include <stdlib.h>
#include <string.h>

// ---- primes: a sieve of the odd numbers below a million ----

#define LIMIT 1000000

static void sieve(unsigned long times) {
    static uint8_t composite[LIMIT / 2];
    while (times--) {
        memset(composite, 0, sizeof composite);
        unsigned primes = 1; // 2
        for (uint32_t half = 1; half < LIMIT / 2; half++) {
            if (composite[half]) continue;
            primes++;
            uint32_t prime = 2 * half + 1;
            for (uint64_t multiple = (uint64_t)prime * prime / 2; multiple < LIMIT / 2; multiple += prime)
                composite[multiple] = 1;
        }
        check(primes == 78498);
    }
}
static double measure_sieve(void) { return rate(sieve); }

// ---- CRC-32 by a table, byte by byte ----

static uint32_t crc_table[256];
static uint8_t crc_data[1 << 16];

static uint32_t crc32(const uint8_t *data, size_t length) {
    uint32_t crc = ~0u;
    while (length--) crc = crc_table[(uint8_t)(crc ^ *data++)] ^ crc >> 8;
    return ~crc;
}
static void crc(unsigned long times) {
    uint32_t all = 0;
    while (times--) all ^= crc32(crc_data, sizeof crc_data);
    keep(all);
}
static double measure_crc(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t entry = byte;
        for (int bit = 0; bit < 8; bit++) entry = entry & 1 ? entry >> 1 ^ 0xedb88320u : entry >> 1;
        crc_table[byte] = entry;
    }
    check(crc32((const uint8_t *)"123456789", 9) == 0xcbf43926u);
    uint64_t random = 1;
    for (size_t index = 0; index < sizeof crc_data; index++) crc_data[index] = (uint8_t)next_random(&random);
    return rate(crc) * sizeof crc_data * 1e-6;
}

// ---- calls and returns: Takeuchi's function ----

__attribute__((noinline)) static int tak(int x, int y, int z) {
    return y < x ? tak(tak(x - 1, y, z), tak(y - 1, z, x), tak(z - 1, x, y)) : z;
}
void call_recursively(unsigned long times) {
    while (times--) {
        int x = 18;
        keep(x);
        check(tak(x, 12, 6) == 7);
    }
}
static double measure_calls(void) { return rate(call_recursively) * CALLS_PER_TIME * 1e-6; }

// ---- calls through pointers, picked at random ----

static uint64_t add_three(uint64_t x) { return x + 3; }
static uint64_t mix(uint64_t x) { return (x ^ x >> 7) * 9; }
static uint64_t turn(uint64_t x) { return x << 11 | x >> 53; }
static uint64_t flip(uint64_t x) { return ~x + 0x1234567; }
static uint64_t (*const methods[])(uint64_t) = {add_three, mix, turn, flip, mix, add_three, flip, turn};

static void call_pointers(unsigned long times) {
    uint64_t random = 5, value = 1;
    while (times--) value = methods[next_random(&random) & 7](value);
    keep(value);
}
static double measure_pointers(void) { return rate(call_pointers) * 1e-6; }

// ---- an interpreter of byte code: every instruction ends in an indirect jump ----

enum { LOAD, ADD, REMAINDER, MOVE, JUMP_IF_NOT_ZERO, JUMP_IF_LESS, HALT };
#define CODE(operation, a, b) {operation, a, b}

// The sum of all n below a bound that are coprime to 3 and 5, modulo 65521; r0 is the bound.
static const struct { uint8_t operation, a, b; } byte_code[] = {
    CODE(LOAD, 1, 0),             // 0: n = 0
    CODE(LOAD, 2, 0),             //    sum = 0
    CODE(LOAD, 3, 1),             //    one
    CODE(LOAD, 4, 3),             //
    CODE(LOAD, 5, 5),             //
    CODE(ADD, 1, 3),              // 5: n += 1
    CODE(MOVE, 6, 1),             //
    CODE(REMAINDER, 6, 4),        //    n % 3
    CODE(JUMP_IF_NOT_ZERO, 6, 1), //    over the next
    CODE(JUMP_IF_NOT_ZERO, 3, 5), //    on with the next n
    CODE(MOVE, 6, 1),             // 10
    CODE(REMAINDER, 6, 5),        //    n % 5
    CODE(JUMP_IF_NOT_ZERO, 6, 1), //
    CODE(JUMP_IF_NOT_ZERO, 3, 1), //
    CODE(ADD, 2, 1),              //    sum += n
    CODE(JUMP_IF_LESS, 1, 0),     // 15: back to 5
    CODE(HALT, 2, 0),
};

static uint64_t interpret(uint64_t bound, uint64_t *executed) {
    static void *const labels[] = {&&load, &&add, &&remainder, &&move, &&not_zero, &&less, &&halt};
    uint64_t registers[8] = {bound}, count = 0;
    size_t at = 0;
#define NEXT                                          \
    do {                                              \
        count++;                                      \
        goto *labels[byte_code[at].operation];        \
    } while (0)
#define A registers[byte_code[at].a]
#define B registers[byte_code[at].b]
    NEXT;
load: A = byte_code[at].b; at++; NEXT;
add: A += B; at++; NEXT;
remainder: A = (uint32_t)A % (uint32_t)B; at++; NEXT;
move: A = B; at++; NEXT;
not_zero: at += A ? (size_t)byte_code[at].b + 1 : 1; NEXT;
less: at = A < B ? 5 : at + 1; NEXT;
halt:
    *executed += count;
    return A;
#undef NEXT
#undef A
#undef B
}
static uint64_t byte_codes;
static void interpret_often(unsigned long times) {
    while (times--) {
        // 800 of the numbers up to 1500, and as many below as above the middle of what is summed.
        check(interpret(1500, &byte_codes) == 600000);
    }
}
static double measure_interpreter(void) {
    uint64_t once = 0;
    interpret(1500, &once);
    return rate(interpret_often) * (double)once * 1e-6;
}

// ---- multiplication and division of 64 bits ----

static void divide(unsigned long times) {
    uint64_t x = 0x9e3779b97f4a7c15u, sum = 0;
    for (unsigned long step = 0; step < times; step++) {
        x = x * 0xd1342543de82ef95u + 1;
        uint64_t divisor = (x >> 40) + 3, quotient = x / divisor;
        check(quotient * divisor + x % divisor == x);
        sum += quotient;
    }
    keep(sum);
}
static double measure_division(void) { return rate(divide) * 1e-6; }

// ---- a hash of additions, rotations and exclusive ors: SipHash-2-4 ----

#define ROTATE(x, by) ((x) << (by) | (x) >> (64 - (by)))
#define ROUND                                                                        \
    (v0 += v1, v1 = ROTATE(v1, 13) ^ v0, v0 = ROTATE(v0, 32), v2 += v3,              \
     v3 = ROTATE(v3, 16) ^ v2, v0 += v3, v3 = ROTATE(v3, 21) ^ v0, v2 += v1,         \
     v1 = ROTATE(v1, 17) ^ v2, v2 = ROTATE(v2, 32))

static uint64_t siphash(const uint8_t *data, size_t length, uint64_t k0, uint64_t k1) {
    uint64_t v0 = k0 ^ 0x736f6d6570736575u, v1 = k1 ^ 0x646f72616e646f6du;
    uint64_t v2 = k0 ^ 0x6c7967656e657261u, v3 = k1 ^ 0x7465646279746573u, word;
    uint64_t last = (uint64_t)length << 56;
    for (; length >= 8; length -= 8, data += 8) {
        memcpy(&word, data, 8);
        v3 ^= word;
        ROUND, ROUND;
        v0 ^= word;
    }
    for (size_t index = 0; index < length; index++) last |= (uint64_t)data[index] << 8 * index;
    v3 ^= last;
    ROUND, ROUND;
    v0 ^= last;
    v2 ^= 0xff;
    ROUND, ROUND, ROUND, ROUND;
    return v0 ^ v1 ^ v2 ^ v3;
}
static uint8_t hash_data[4096];
static void hash(unsigned long times) {
    uint64_t key = 1;
    while (times--) key = siphash(hash_data, sizeof hash_data, key, 2);
    keep(key);
}
static double measure_hash(void) {
    for (size_t index = 0; index < sizeof hash_data; index++) hash_data[index] = (uint8_t)index;
    // The example of the paper: keys 00 to 0f, message 00 to 0e.
    check(siphash(hash_data, 15, 0x0706050403020100u, 0x0f0e0d0c0b0a0908u) == 0xa129ca6149be45e5u);
    return rate(hash) * sizeof hash_data * 1e-6;
}

// ---- sorting by the C library, with a function that compares ----

#define SORTED 8192

static int compare(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}
static void sort(unsigned long times) {
    static uint32_t numbers[SORTED];
    uint64_t random = 3;
    while (times--) {
        uint64_t before = 0, after = 0;
        for (int index = 0; index < SORTED; index++) before += numbers[index] = next_random(&random);
        qsort(numbers, SORTED, sizeof *numbers, compare);
        after = numbers[0];
        for (int index = 1; index < SORTED; index++) {
            check(numbers[index - 1] <= numbers[index]);
            after += numbers[index];
        }
        check(before == after);
    }
}
static double measure_sort(void) { return rate(sort) * SORTED * 1e-6; }

// ---- branches that nothing foresees: binary search ----

#define ENTRIES 4096

static uint32_t dictionary[ENTRIES];
static void search(unsigned long times) {
    uint64_t random = 11;
    while (times--) {
        uint32_t wanted = next_random(&random) % ENTRIES, low = 0, high = ENTRIES;
        while (high - low > 1) {
            uint32_t middle = (low + high) / 2;
            keep(middle);
            if (dictionary[middle] <= wanted * 7) low = middle;
            else high = middle;
        }
        check(low == wanted);
    }
}
static double measure_search(void) {
    for (uint32_t index = 0; index < ENTRIES; index++) dictionary[index] = index * 7;
    return rate(search) * 1e-6;
}

static const struct row rows[] = {
    {"sieve", "/s", measure_sieve},
    {"crc32", "MB/s", measure_crc},
    {"calls", "M/s", measure_calls},
    {"pointer_calls", "M/s", measure_pointers},
    {"byte_code", "M/s", measure_interpreter},
    {"division", "M/s", measure_division},
    {"siphash", "MB/s", measure_hash},
    {"sort", "M/s", measure_sort},
    {"search", "M/s", measure_search},
    {0},
};
const struct group integer_group = {"integer", rows};
