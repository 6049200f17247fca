// Memory: copies and strings, caches and TLBs, atomic operations, and code that is written and run.
#include "bench.h"

#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

// ---- copies, fills, searches, by the C library and by string instructions ----

static char *from, *to;
static size_t length;

static void copy(unsigned long times) {
    while (times--) {
        memcpy(to, from, length);
        keep(to);
    }
}
static void fill(unsigned long times) {
    while (times--) {
        memset(to, (int)times, length);
        keep(to);
    }
}
static void find_end(unsigned long times) {
    while (times--) {
        keep(from);
        check(strlen(from) == length);
    }
}
static void rep_movsb(unsigned long times) {
    while (times--) {
        char *source = from, *target = to;
        size_t count = length;
        __asm__ volatile("rep movsb" : "+S"(source), "+D"(target), "+c"(count) : : "memory");
    }
}
static void rep_stosq(unsigned long times) {
    while (times--) {
        char *target = to;
        size_t count = length / 8;
        __asm__ volatile("rep stosq" : "+D"(target), "+c"(count) : "a"(times) : "memory");
    }
}
static void repne_scasb(unsigned long times) {
    while (times--) {
        char *end = from;
        size_t count = length + 1;
        __asm__ volatile("repne scasb" : "+D"(end), "+c"(count) : "a"(0) : "memory", "cc");
        check(end == from + length + 1);
    }
}
static void repe_cmpsb(unsigned long times) {
    while (times--) {
        char *source = from, *target = to;
        size_t count = length;
        __asm__ volatile("repe cmpsb" : "+S"(source), "+D"(target), "+c"(count) : : "memory", "cc");
        check(source == from + length);
    }
}

// GB/s of an operation on so many bytes.
static double measure(void (*operation)(unsigned long), size_t bytes) {
    length = bytes;
    from = pages(bytes + 4096), to = pages(bytes + 4096);
    memset(from, 'x', bytes);
    memset(to, 'x', bytes);
    double result = rate(operation) * (double)bytes * 1e-9;
    if (operation == copy || operation == rep_movsb) check(memcmp(from, to, bytes) == 0);
    return result;
}
static double measure_memcpy_16k(void) { return measure(copy, 16 << 10); }
static double measure_memcpy_32m(void) { return measure(copy, 32 << 20); }
static double measure_memset_16k(void) { return measure(fill, 16 << 10); }
static double measure_memset_32m(void) { return measure(fill, 32 << 20); }
static double measure_strlen_64k(void) { return measure(find_end, 64 << 10); }
static double measure_rep_movsb_16k(void) { return measure(rep_movsb, 16 << 10); }
static double measure_rep_movsb_64(void) { return measure(rep_movsb, 64); }
static double measure_rep_stosq_4k(void) { return measure(rep_stosq, 4 << 10); }
static double measure_repne_scasb_1k(void) { return measure(repne_scasb, 1 << 10); }
static double measure_repe_cmpsb_16k(void) { return measure(repe_cmpsb, 16 << 10); }

// ---- lists that visit every element in an order that nothing foresees ----

static void **list;

static void walk(unsigned long steps) {
    void **place = list;
    while (steps--) place = *place;
    keep(place);
}
// Nanoseconds per element, of a ring of elements so many bytes apart.
static double measure_list(size_t bytes, size_t distance) {
    size_t count = bytes / distance;
    char *elements = pages(bytes);
    uint32_t *order = pages(count * sizeof *order);
    uint64_t random = 23;
    for (size_t index = 0; index < count; index++) order[index] = (uint32_t)index;
    for (size_t index = count - 1; index > 0; index--) {
        // Never with itself, which makes one ring of all (Sattolo).
        size_t other = next_random(&random) % index;
        uint32_t kept = order[index];
        order[index] = order[other], order[other] = kept;
    }
    // Not all at the same place of their pages: they would share few lines of the cache.
#define PLACE(index) (elements + (index) * distance + ((index) * 64) % distance)
    for (size_t index = 0; index < count; index++) *(void **)PLACE(index) = PLACE((size_t)order[index]);
    list = (void **)PLACE((size_t)0);
    size_t seen = 0;
    void **place = list;
    do place = *place, seen++;
    while (place != list && seen <= count);
    check(seen == count);
    return 1e9 / rate(walk);
}
static double measure_list_16k(void) { return measure_list(16 << 10, 64); }
static double measure_list_4m(void) { return measure_list(4 << 20, 64); }
static double measure_list_64m(void) { return measure_list(64 << 20, 64); }
static double measure_list_pages(void) { return measure_list(32 << 20, 4096); }

// ---- atomic operations of one thread ----

static _Atomic uint64_t counter;

static void add_atomically(unsigned long times) {
    uint64_t before = atomic_load(&counter);
    for (unsigned long step = 0; step < times; step++) atomic_fetch_add(&counter, 3);
    check(atomic_load(&counter) == before + 3 * times);
}
static double measure_atomic_add(void) { return rate(add_atomically) * 1e-6; }

static void exchange_atomically(unsigned long times) {
    uint64_t before = atomic_load(&counter), expected = before;
    for (unsigned long step = 0; step < times; step++)
        while (!atomic_compare_exchange_weak(&counter, &expected, expected + 5)) {}
    check(atomic_load(&counter) == before + 5 * times);
}
static double measure_atomic_exchange(void) { return rate(exchange_atomically) * 1e-6; }

// ---- code that is written and then run ----

static uint8_t *code;

// `mov eax, value; ret`
static void write_function(uint8_t *at, uint32_t value) {
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
    keep(at);
}
static uint32_t call_function(const uint8_t *at) { return ((uint32_t (*)(void))(uintptr_t)at)(); }

// Each function anew before each call.
static void write_and_call(unsigned long times) {
    for (unsigned long step = 0; step < times; step++) {
        write_function(code, (uint32_t)step);
        check(call_function(code) == (uint32_t)step);
    }
}
// As a compiler at run time does it: a page of functions, each called many times.
static void compile_and_call(unsigned long times) {
    for (unsigned long step = 0; step < times; step++) {
        uint32_t base = (uint32_t)step;
        for (uint32_t function = 0; function < 128; function++) write_function(code + function * 32, function + base);
        uint64_t sum = 0;
        for (int round = 0; round < 64; round++)
            for (uint32_t function = 0; function < 128; function++) sum += call_function(code + function * 32) - base;
        check(sum == 64 * 127 * 64);
    }
}
static double measure_code(void (*work)(unsigned long)) {
    code = pages(4096);
    check(mprotect(code, 4096, PROT_READ | PROT_WRITE | PROT_EXEC) == 0);
    return rate(work);
}
static double measure_code_written(void) { return measure_code(write_and_call) * 1e-3; }
static double measure_code_compiled(void) { return measure_code(compile_and_call); }

static const struct row rows[] = {
    {"memcpy_16k", "GB/s", measure_memcpy_16k},
    {"memcpy_32m", "GB/s", measure_memcpy_32m},
    {"memset_16k", "GB/s", measure_memset_16k},
    {"memset_32m", "GB/s", measure_memset_32m},
    {"strlen_64k", "GB/s", measure_strlen_64k},
    {"rep_movsb_64", "GB/s", measure_rep_movsb_64},
    {"rep_movsb_16k", "GB/s", measure_rep_movsb_16k},
    {"rep_stosq_4k", "GB/s", measure_rep_stosq_4k},
    {"repne_scasb_1k", "GB/s", measure_repne_scasb_1k},
    {"repe_cmpsb_16k", "GB/s", measure_repe_cmpsb_16k},
    {"list_16k", "ns", measure_list_16k},
    {"list_4m", "ns", measure_list_4m},
    {"list_64m", "ns", measure_list_64m},
    {"list_of_pages", "ns", measure_list_pages},
    {"atomic_add", "M/s", measure_atomic_add},
    {"atomic_exchange", "M/s", measure_atomic_exchange},
    {"code_written", "k/s", measure_code_written},
    {"code_compiled", "/s", measure_code_compiled},
    {0},
};
const struct group memory_group = {"memory", rows};
