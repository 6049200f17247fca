// What the rows of the benchmark share.
#ifndef BENCH_H
#define BENCH_H

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>

// One figure. Units of time (ns, us) are the better the lower, all others the higher.
struct row {
    const char *name;
    const char *unit;
    double (*measure)(void);
};

// Rows that belong together; a row without a name ends the list.
struct group {
    const char *name;
    const struct row *rows;
};

extern const struct group integer_group, float_group, vector_group, memory_group, kernel_group, process_group;
extern const struct group shell_group, smp_group;

// Seconds on a clock that only goes forward.
double now(void);

// Runs `work` for about the asked-for time after a warm-up, and returns its steps per second.
double rate(void (*work)(unsigned long steps));

// Ends the row: it computed something wrong, or can't be measured here.
_Noreturn void bad(const char *why);
_Noreturn void skip(const char *why);

// Ends the row as bad unless the condition holds.
#define check(condition) ((condition) ? (void)0 : bad(#condition))

// Anonymous memory, in pages of 4 KiB; ends the row if there is none.
void *pages(size_t bytes);

// Pseudo-random numbers that are the same everywhere.
static inline uint32_t next_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

// Path of busybox, and of this program.
extern const char *busybox, *program;

// Binds the calling thread to the index-th CPU that the program may use; the number of those.
void bind_to_cpu(int index);
int cpu_count(void);

// Waits for a child that must end with status 0.
void wait_for(int pid);

// Takes a page's write permission away and gives it back, so many times.
void protect(unsigned long times);

// Two threads wake each other by futex, so many times; the second one on this CPU, by index, unless it is negative.
void futex_rounds(unsigned long times);
extern int futex_partner;

// The same computation for every caller: a recursive function, so many times.
void call_recursively(unsigned long times);
// Calls made by one of these times.
#define CALLS_PER_TIME 63609.0

// A file in memory with the same text everywhere; its path, to be opened again by children.
const char *text_file(size_t bytes);

// Keeps the compiler from leaving out work whose result nobody uses.
#define keep(value) __asm__ volatile("" : : "r,m"(value) : "memory")

#endif
