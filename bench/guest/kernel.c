// Ways into the kernel and back: system calls, signals, faults, mappings, clocks.
#include "bench.h"

#include <cpuid.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

// ---- system calls ----

static void getpids(unsigned long times) {
    long own = getpid();
    while (times--) check(syscall(SYS_getpid) == own);
}
static double measure_getpid(void) { return rate(getpids) * 1e-3; }

static int zero;
static void reads(unsigned long times) {
    while (times--) {
        char byte = 1;
        check(read(zero, &byte, 1) == 1 && byte == 0);
    }
}
static double measure_read(void) {
    zero = open("/dev/zero", O_RDONLY);
    if (zero < 0) skip("no /dev/zero");
    return rate(reads) * 1e-3;
}

static void stats(unsigned long times) {
    struct stat status;
    while (times--) check(stat("/proc/self", &status) == 0 && S_ISDIR(status.st_mode));
}
static double measure_stat(void) { return rate(stats) * 1e-3; }

static void opens(unsigned long times) {
    while (times--) {
        int file = open("/dev/null", O_RDONLY);
        check(file >= 0 && close(file) == 0);
    }
}
static double measure_open(void) { return rate(opens) * 1e-3; }

static void read_clock(unsigned long times) {
    struct timespec before = {0}, time;
    while (times--) {
        check(clock_gettime(CLOCK_MONOTONIC, &time) == 0 && time.tv_sec >= before.tv_sec);
        before = time;
    }
}
static double measure_clock(void) { return rate(read_clock) * 1e-6; }

// ---- instructions that look at the machine ----

static void read_tsc(unsigned long times) {
    uint64_t before = 0;
    while (times--) {
        uint64_t time = __rdtsc();
        check(time >= before);
        before = time;
    }
}
static double measure_rdtsc(void) { return rate(read_tsc) * 1e-6; }

static void identify(unsigned long times) {
    unsigned a, b, c, d;
    while (times--) {
        __cpuid(0, a, b, c, d);
        check(a > 0 && b > 0);
    }
}
static double measure_cpuid(void) { return rate(identify) * 1e-6; }

// ---- signals and faults ----

static volatile sig_atomic_t signals;
static void on_signal(int number) { signals += number == SIGUSR1; }

static void signal_self(unsigned long times) {
    signals = 0;
    long process = getpid(), thread = syscall(SYS_gettid);
    for (unsigned long step = 0; step < times; step++) syscall(SYS_tgkill, process, thread, SIGUSR1);
    check((unsigned long)signals == times);
}
static double measure_signal(void) {
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &action, NULL);
    return rate(signal_self) * 1e-3;
}

static sigjmp_buf before_fault;
static void on_fault(int number) { siglongjmp(before_fault, number); }

static void fault(unsigned long times) {
    volatile char *forbidden = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    volatile unsigned long left = times;
    while (left > 0) {
        if (sigsetjmp(before_fault, 0) == 0) {
            *forbidden = 1;
            bad("a write to a forbidden page went through");
        }
        left--;
    }
    munmap((void *)forbidden, 4096);
}
static double measure_fault(void) {
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    return rate(fault) * 1e-3;
}

// ---- mappings ----

// Pages of 4 KiB that are touched for the first time, 8 MiB at a time.
static void touch(unsigned long count) {
    while (count > 0) {
        size_t now = count < 2048 ? count : 2048;
        volatile char *memory = pages(now * 4096);
        for (size_t page = 0; page < now; page++) {
            check(memory[page * 4096 + 8] == 0);
            memory[page * 4096] = 1;
        }
        munmap((void *)memory, now * 4096);
        count -= now;
    }
}
static double measure_touch(void) { return rate(touch) * 1e-3; }

static void map_and_unmap(unsigned long times) {
    while (times--) {
        char *memory = mmap(NULL, 16384, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(memory != MAP_FAILED);
        memory[0] = memory[8192] = 1;
        check(munmap(memory, 16384) == 0);
    }
}
static double measure_map(void) { return rate(map_and_unmap) * 1e-3; }

void protect(unsigned long times) {
    volatile char *memory = pages(4096);
    while (times--) {
        memory[0] = (char)times;
        check(mprotect((void *)memory, 4096, PROT_READ) == 0 && memory[0] == (char)times);
        check(mprotect((void *)memory, 4096, PROT_READ | PROT_WRITE) == 0);
    }
    munmap((void *)memory, 4096);
}
static double measure_protect(void) { return rate(protect) * 1e-3; }

// ---- the timer: how late a sleep of a millisecond ends, in the middle of all ----

static int compare(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}
static double measure_lateness(void) {
    enum { SLEEPS = 151 };
    double late[SLEEPS];
    for (int index = 0; index < SLEEPS; index++) {
        double start = now();
        check(nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL) == 0);
        late[index] = (now() - start) * 1e6 - 1000;
        check(late[index] >= -20);
    }
    qsort(late, SLEEPS, sizeof *late, compare);
    return late[SLEEPS / 2];
}

static const struct row rows[] = {
    {"getpid", "k/s", measure_getpid},
    {"read", "k/s", measure_read},
    {"stat", "k/s", measure_stat},
    {"open_close", "k/s", measure_open},
    {"clock_gettime", "M/s", measure_clock},
    {"rdtsc", "M/s", measure_rdtsc},
    {"cpuid", "M/s", measure_cpuid},
    {"signal", "k/s", measure_signal},
    {"fault", "k/s", measure_fault},
    {"touch", "k/s", measure_touch},
    {"mmap_munmap", "k/s", measure_map},
    {"mprotect", "k/s", measure_protect},
    {"sleep_late", "us", measure_lateness},
    {0},
};
const struct group kernel_group = {"kernel", rows};
