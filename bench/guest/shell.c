// What shells do: busybox interprets, starts programs, compresses and hashes.
#include "bench.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// What the scripts work on.
#define TEXT_BYTES (256 << 10)

static const char *script;

// Runs the script with $N, $B (busybox) and $TEXT set; it must write the number N at its end.
static void run_script(unsigned long times) {
    char number[32], output[128] = "";
    snprintf(number, sizeof number, "%lu", times);
    setenv("N", number, 1);
    int ends[2];
    check(pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 1);
        close(ends[0]), close(ends[1]);
        execl(busybox, "busybox", "sh", "-c", script, (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    size_t length = 0;
    for (ssize_t got; (got = read(ends[0], output + length, sizeof output - 1 - length)) > 0;) length += (size_t)got;
    close(ends[0]);
    wait_for(child);
    check(strtoul(output, NULL, 10) == times);
}
static double measure(const char *text) {
    if (access(busybox, X_OK) != 0) skip("no busybox");
    script = text;
    setenv("B", busybox, 1);
    setenv("TEXT", text_file(TEXT_BYTES), 1);
    return rate(run_script);
}

#define LOOP(body) "i=0; while [ $i -lt $N ]; do " body "; i=$((i+1)); done; "

static double measure_loop(void) { return measure(LOOP(":") "echo $i") * 1e-3; }
static double measure_start(void) { return measure(LOOP("$B true") "echo $i"); }
static double measure_pipeline(void) {
    return measure(LOOP("$B echo one two three | $B cut -d' ' -f2 | $B grep -q two || exit 1") "echo $i");
}
static double measure_substitution(void) {
    return measure("sum=0; " LOOP("x=$(echo $i); sum=$((sum+x-x+1))") "echo $sum");
}

// These give the text so many times to a program; MB/s. What comes out must be the same every time.
#define EACH(pipeline) "y=; " LOOP("x=$(" pipeline "); [ \"$x\" = \"${y:=$x}\" ] || exit 1")

static double measure_text(const char *text) { return measure(text) * TEXT_BYTES * 1e-6; }

static double measure_sha256(void) { return measure_text(EACH("$B sha256sum <$TEXT") "echo $i"); }
static double measure_gzip(void) { return measure_text(EACH("$B gzip -c <$TEXT | $B md5sum") "echo $i"); }
static double measure_gunzip(void) {
    return measure_text(EACH("$B gzip -c <$TEXT | $B gunzip -c | $B md5sum") "echo $i");
}
static double measure_sort(void) { return measure_text(EACH("$B sort $TEXT | $B uniq -c | $B md5sum") "echo $i"); }
static double measure_awk(void) {
    const char *text = EACH("$B awk '{ for (i = 1; i <= NF; i++) n[$i]++ } END { print n[\"the\"] }' $TEXT") "echo $i";
    return measure_text(text);
}
static double measure_grep(void) {
    return measure_text(EACH("$B grep -c -E '(guest|host) [a-z]+er ' $TEXT") "echo $i");
}

static const struct row rows[] = {
    {"sh_loop", "k/s", measure_loop},
    {"sh_start", "/s", measure_start},
    {"sh_pipeline", "/s", measure_pipeline},
    {"sh_subshell", "/s", measure_substitution},
    {"sha256sum", "MB/s", measure_sha256},
    {"gzip", "MB/s", measure_gzip},
    {"gzip_gunzip", "MB/s", measure_gunzip},
    {"sort_uniq", "MB/s", measure_sort},
    {"awk", "MB/s", measure_awk},
    {"grep", "MB/s", measure_grep},
    {0},
};
const struct group shell_group = {"shell", rows};
