// Processes and threads: making them, and passing something between two of them.
#include "bench.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

// ---- making ----

static void forks(unsigned long times) {
    while (times--) {
        pid_t child = fork();
        if (child == 0) _exit(0);
        check(child > 0);
        wait_for(child);
    }
}
static double measure_fork(void) { return rate(forks); }

static void execs(unsigned long times) {
    while (times--) {
        pid_t child = fork();
        if (child == 0) {
            execl(program, "bench", "--nothing", (char *)NULL);
            _exit(1);
        }
        check(child > 0);
        wait_for(child);
    }
}
static double measure_exec(void) { return rate(execs); }

static void *give_back(void *argument) { return argument; }

static void threads(unsigned long times) {
    while (times--) {
        pthread_t thread;
        void *result;
        check(pthread_create(&thread, NULL, give_back, &times) == 0);
        check(pthread_join(thread, &result) == 0 && result == &times);
    }
}
static double measure_thread(void) { return rate(threads); }

// ---- passing on ----

// There and back, a byte at a time.
static void pipe_rounds(unsigned long times) {
    int there[2], back[2];
    check(pipe(there) == 0 && pipe(back) == 0);
    pid_t child = fork();
    char byte = 0;
    if (child == 0) {
        close(there[1]), close(back[0]);
        while (read(there[0], &byte, 1) == 1 && ++byte && write(back[1], &byte, 1) == 1) {}
        _exit(0);
    }
    close(there[0]), close(back[1]);
    while (times--) {
        char sent = (char)(times & 63);
        check(write(there[1], &sent, 1) == 1 && read(back[0], &byte, 1) == 1 && byte == sent + 1);
    }
    close(there[1]), close(back[0]);
    wait_for(child);
}
static double measure_pipe_rounds(void) { return rate(pipe_rounds) * 1e-3; }

// One way, 64 KiB at a time.
static void pipe_stream(unsigned long times) {
    static char buffer[65536];
    int ends[2];
    check(pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) {
        close(ends[1]);
        unsigned long bytes = 0;
        for (ssize_t got; (got = read(ends[0], buffer, sizeof buffer)) > 0;) bytes += (unsigned long)got;
        _exit(bytes != times * sizeof buffer);
    }
    close(ends[0]);
    for (unsigned long step = 0; step < times; step++) check(write(ends[1], buffer, sizeof buffer) == sizeof buffer);
    close(ends[1]);
    wait_for(child);
}
static double measure_pipe_stream(void) { return rate(pipe_stream) * 65536 * 1e-9; }

int futex_partner = -1;
static _Atomic uint32_t turn;
static unsigned long rounds;

static void wait_for_turn(uint32_t own) {
    uint32_t seen;
    while ((seen = atomic_load(&turn)) != own) syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}
static void pass_turn(uint32_t to) {
    atomic_store(&turn, to);
    syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}
static void *other_side(void *argument) {
    if (futex_partner >= 0) bind_to_cpu(futex_partner);
    for (unsigned long step = 0; step < rounds; step++) wait_for_turn(1), pass_turn(0);
    return argument;
}
void futex_rounds(unsigned long times) {
    pthread_t thread;
    rounds = times;
    check(pthread_create(&thread, NULL, other_side, NULL) == 0);
    while (times--) pass_turn(1), wait_for_turn(0);
    check(pthread_join(thread, NULL) == 0);
}
static double measure_futex_rounds(void) { return rate(futex_rounds) * 1e-3; }

static const struct row rows[] = {
    {"fork", "/s", measure_fork},
    {"fork_exec", "/s", measure_exec},
    {"thread", "/s", measure_thread},
    {"pipe_rounds", "k/s", measure_pipe_rounds},
    {"pipe_stream", "GB/s", measure_pipe_stream},
    {"futex_rounds", "k/s", measure_futex_rounds},
    {0},
};
const struct group process_group = {"process", rows};
