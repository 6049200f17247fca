// The benchmark program: a static Linux program that is the same on the host and in a machine. As process 1 it mounts
// what it needs and powers the machine off at the end.
//
//   bench [--seconds S] [--cpus N] [--busybox PATH] [--list] [GROUP | ROW]...
//
// It prints "GROUP name" and, for each figure, "RESULT name value unit". "BAD name why" is a wrong result, "SKIP name
// why" something that can't be measured here.
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// What a row may take at most, in seconds: one that hangs must not hold up the others.
#define ROW_LIMIT 60

static const struct group *const groups[] = {
    &integer_group, &float_group, &vector_group, &memory_group, &kernel_group, &process_group, &shell_group, &smp_group,
};
#define GROUPS (sizeof groups / sizeof *groups)

const char *busybox = "/bin/busybox", *program = "/proc/self/exe";
static double seconds = 0.35;
static const char *row_name = "";
static cpu_set_t usable;

// One line in one piece, so that nothing comes in between.
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (write(1, line, (size_t)length) != length) _exit(3);
}

double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static double time_of(void (*work)(unsigned long), unsigned long steps) {
    double start = now();
    work(steps);
    return now() - start;
}

double rate(void (*work)(unsigned long)) {
    // What comes before the call that is long enough is the warm-up.
    unsigned long steps = 1;
    for (;;) {
        double time = time_of(work, steps);
        if (time >= seconds * 0.75) return (double)steps / time;
        double factor = seconds * 1.1 / (time + 1e-9);
        steps = (unsigned long)((double)steps * (factor < 16 ? factor : 16)) + 1;
    }
}

void bad(const char *why) {
    say("BAD %s %s\n", row_name, why);
    _exit(1);
}

void skip(const char *why) {
    say("SKIP %s %s\n", row_name, why);
    _exit(0);
}

void *pages(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) skip("not enough memory");
    madvise(memory, bytes, MADV_NOHUGEPAGE);
    return memory;
}

void wait_for(int pid) {
    int status;
    while (waitpid(pid, &status, 0) < 0) check(errno == EINTR);
    check(status == 0);
}

int cpu_count(void) { return CPU_COUNT(&usable); }

void bind_to_cpu(int index) {
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &usable) || index-- > 0) continue;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        check(sched_setaffinity(0, sizeof one, &one) == 0);
        return;
    }
    skip("too few CPUs");
}

const char *text_file(size_t bytes) {
    static const char *const words[] = {"virtual ", "machine ", "of ", "page ",  "the ",  "a ",    "interrupt ", "is ",
                                        "that ",    "guest ",   "to ", "table ", "and\n", "host ", "register ",  "in "};
    static char path[64];
    int file = memfd_create("text", 0);
    check(file >= 0);
    char *text = pages(bytes + 16);
    uint64_t random = 7;
    for (size_t length = 0; length < bytes;) {
        // Squared: some words are much more frequent than others, as in real text.
        uint32_t number = next_random(&random) & 15;
        length += (size_t)(stpcpy(text + length, words[number * number / 15]) - (text + length));
    }
    check(write(file, text, bytes) == (ssize_t)bytes);
    munmap(text, bytes + 16);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", getpid(), file);
    return path;
}

// Limits the program to the first CPUs of those it was given.
static void use_cpus(int wanted) {
    check(sched_getaffinity(0, sizeof usable, &usable) == 0);
    for (int cpu = 0, used = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &usable) && ++used > wanted) CPU_CLR(cpu, &usable);
    check(sched_setaffinity(0, sizeof usable, &usable) == 0);
}

// Each row in a process of its own, with fresh memory, so that none can disturb another.
static void run_row(const struct row *row) {
    pid_t child = fork();
    if (child == 0) {
        setpgid(0, 0);
        row_name = row->name;
        alarm(ROW_LIMIT);
        say("RESULT %s %.6g %s\n", row->name, row->measure(), row->unit);
        _exit(0);
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    // What it has left behind, if it ended before its time.
    kill(-child, SIGKILL);
    if (WIFSIGNALED(status)) say("BAD %s ended by signal %d\n", row->name, WTERMSIG(status));
}

static int is_wanted(const struct group *group, const struct row *row, char **wanted) {
    if (*wanted == NULL) return 1;
    for (; *wanted; wanted++)
        if (strcmp(*wanted, group->name) == 0 || strcmp(*wanted, row->name) == 0) return 1;
    return 0;
}

static void run(int list, char **wanted) {
    for (size_t index = 0; index < GROUPS; index++) {
        const struct group *group = groups[index];
        int told = 0;
        for (const struct row *row = group->rows; row->name; row++) {
            if (!is_wanted(group, row, wanted)) continue;
            if (list) {
                say("%s %s %s\n", group->name, row->name, row->unit);
                continue;
            }
            if (!told++) say("GROUP %s\n", group->name);
            run_row(row);
        }
    }
}

// Process 1: the kernel gives nothing but the root file system and the console.
static void prepare_machine(void) {
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/tmp", 01777);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
}

int main(int count, char **arguments) {
    int first = getpid() == 1, list = 0, cpus = CPU_SETSIZE;
    if (first) {
        say("FIRST LINE\n");
        prepare_machine();
    }
    char *wanted[64] = {NULL};
    int wants = 0;
    for (int index = 1; index < count; index++) {
        char *word = arguments[index], *value = index + 1 < count ? arguments[index + 1] : NULL;
        if (strcmp(word, "--nothing") == 0) return 0;
        if (strcmp(word, "--list") == 0) {
            list = 1;
        } else if (value && strcmp(word, "--seconds") == 0) {
            seconds = atof(value), index++;
        } else if (value && strcmp(word, "--cpus") == 0) {
            cpus = atoi(value), index++;
        } else if (value && strcmp(word, "--busybox") == 0) {
            busybox = value, index++;
        } else if (*word != '-' && wants < 63) {
            wanted[wants++] = word;
        } else {
            say("bench: %s is not understood\n", word);
            if (!first) return 2;
        }
    }
    use_cpus(cpus);
    run(list, wanted);
    if (!first) return 0;
    say("LAST LINE\n");
    sync();
    reboot(RB_POWER_OFF);
    return 1;
}
