// What several CPUs do together. Each row uses two of them.
#include "bench.h"

#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static void need_two(void) {
    if (cpu_count() < 2) skip("one CPU only");
}

// ---- the same work on two CPUs at once ----

static void (*both)(unsigned long);

static void *second(void *times) {
    bind_to_cpu(1);
    both((unsigned long)times);
    return NULL;
}
static void on_both(unsigned long times) {
    pthread_t thread;
    check(pthread_create(&thread, NULL, second, (void *)times) == 0);
    both(times);
    check(pthread_join(thread, NULL) == 0);
}
static double measure_both(void (*work)(unsigned long)) {
    need_two();
    bind_to_cpu(0);
    both = work;
    return 2 * rate(on_both);
}
static double measure_calls(void) { return measure_both(call_recursively) * CALLS_PER_TIME * 1e-6; }

static _Atomic uint64_t counter __attribute__((aligned(64)));
static void add_atomically(unsigned long times) {
    while (times--) atomic_fetch_add(&counter, 1);
}
static double measure_atomic_add(void) {
    double result = measure_both(add_atomically) * 1e-6;
    check(atomic_load(&counter) % 2 == 0);
    return result;
}

// A lock that is held for a moment, wanted by both.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t guarded;
static void lock_and_add(unsigned long times) {
    while (times--) {
        pthread_mutex_lock(&lock);
        guarded += 3;
        pthread_mutex_unlock(&lock);
    }
}
static double measure_lock(void) {
    double result = measure_both(lock_and_add) * 1e-6;
    check(guarded % 6 == 0);
    return result;
}

// Faults of two threads in the same address space.
static void touch(unsigned long times) {
    while (times--) {
        volatile char *memory = pages(64 * 4096);
        for (int page = 0; page < 64; page++) memory[page * 4096] = 1;
        munmap((void *)memory, 64 * 4096);
    }
}
static double measure_touch(void) { return measure_both(touch) * 64e-3; }

static void execs(unsigned long times) {
    while (times--) {
        pid_t child = vfork();
        if (child == 0) {
            execl(program, "bench", "--nothing", (char *)NULL);
            _exit(1);
        }
        check(child > 0);
        wait_for(child);
    }
}
static double measure_execs(void) { return measure_both(execs); }

// ---- one CPU wakes the other, and back ----

static _Atomic uint32_t turn;
static unsigned long rounds;

static double measure_futex_rounds(void) {
    need_two();
    bind_to_cpu(0);
    futex_partner = 1;
    return rate(futex_rounds) * 1e-3;
}

static void *watching_side(void *argument) {
    bind_to_cpu(1);
    for (unsigned long step = 0; step < rounds; step++) {
        while (atomic_load(&turn) != 1) {}
        atomic_store(&turn, 0);
    }
    return argument;
}
static void spin_rounds(unsigned long times) {
    pthread_t thread;
    rounds = times;
    check(pthread_create(&thread, NULL, watching_side, NULL) == 0);
    while (times--) {
        atomic_store(&turn, 1);
        while (atomic_load(&turn) != 0) {}
    }
    check(pthread_join(thread, NULL) == 0);
}
static double measure_spin_rounds(void) {
    need_two();
    bind_to_cpu(0);
    return rate(spin_rounds) * 1e-3;
}

// ---- one CPU interrupts the other, which is busy ----

static _Atomic int stop;
static _Atomic uint64_t spins;

static void *busy_side(void *argument) {
    bind_to_cpu(1);
    while (!atomic_load(&stop)) atomic_fetch_add_explicit(&spins, 1, memory_order_relaxed);
    return argument;
}
// The rate of work on CPU 0 while a thread of the same process is busy on CPU 1.
static double measure_with_busy_cpu(void (*work)(unsigned long)) {
    need_two();
    bind_to_cpu(0);
    pthread_t thread;
    check(pthread_create(&thread, NULL, busy_side, NULL) == 0);
    while (atomic_load(&spins) == 0) sched_yield();
    double result = rate(work);
    atomic_store(&stop, 1);
    check(pthread_join(thread, NULL) == 0);
    return result;
}

// Taking a page's permission away must reach the other CPU's TLB.
static double measure_shoot_down(void) { return measure_with_busy_cpu(protect) * 1e-3; }

static void barriers(unsigned long times) {
    while (times--) check(syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) == 0);
}
static double measure_barriers(void) {
    if (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) != 0) skip("no membarrier");
    return measure_with_busy_cpu(barriers) * 1e-3;
}

static const struct row rows[] = {
    {"calls_2", "M/s", measure_calls},
    {"atomic_add_2", "M/s", measure_atomic_add},
    {"lock_2", "M/s", measure_lock},
    {"touch_2", "k/s", measure_touch},
    {"exec_2", "/s", measure_execs},
    {"futex_rounds_2", "k/s", measure_futex_rounds},
    {"spin_rounds_2", "k/s", measure_spin_rounds},
    {"shoot_down_2", "k/s", measure_shoot_down},
    {"barrier_2", "k/s", measure_barriers},
    {0},
};
const struct group smp_group = {"smp", rows};
