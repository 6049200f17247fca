// What the guests do whose exits are counted. Static, called by the guest's shell.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void check(int good, const char *what) {
    if (!good) {
        perror(what);
        exit(1);
    }
}

static void stay_on(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    check(sched_setaffinity(0, sizeof set, &set) == 0, "sched_setaffinity");
}

// A byte goes to a process on the other processor and comes back, so many times.
static void pipes(long rounds) {
    int there[2], back[2];
    char byte = 1;
    check(pipe(there) == 0 && pipe(back) == 0, "pipe");
    pid_t other = fork();
    check(other >= 0, "fork");
    if (other == 0) {
        stay_on(1);
        for (long round = 0; round < rounds; round++)
            check(read(there[0], &byte, 1) == 1 && write(back[1], &byte, 1) == 1, "the other end");
        exit(0);
    }
    stay_on(0);
    for (long round = 0; round < rounds; round++)
        check(write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1, "this end");
    int status;
    check(waitpid(other, &status, 0) == other && status == 0, "waitpid");
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

// Sends to a TCP port for so many seconds.
static void sends(const char *host, const char *port, double seconds) {
    static char buffer[1 << 16];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    check(inet_pton(AF_INET, host, &address.sin_addr) == 1, "inet_pton");
    int line = socket(AF_INET, SOCK_STREAM, 0);
    check(line >= 0 && connect(line, (struct sockaddr *)&address, sizeof address) == 0, "connect");
    for (double end = now() + seconds; now() < end;)
        check(write(line, buffer, sizeof buffer) > 0, "write");
    close(line);
}

int main(int count, char **words) {
    if (count == 3 && strcmp(words[1], "pipes") == 0)
        pipes(atol(words[2]));
    else if (count == 5 && strcmp(words[1], "send") == 0)
        sends(words[2], words[3], atof(words[4]));
    else
        return 2;
    puts("work-done");
    return 0;
}
