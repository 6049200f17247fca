/* What a machine does whose power is cut: it writes and syncs without end, and says what is safe.
 *
 * power_cut FOLDER writes record N to slot N % SLOTS of FOLDER/log, syncs, and prints "log N". After every eighth it
 * also makes FOLDER/f/N, syncs the file and the folder, prints "file N", and removes file N - KEPT * 8.
 * xtask/src/power_cut/check.rs knows the same numbers. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { RECORD = 512, SLOTS = 4096, KEPT = 128, LARGEST = 96 << 10 };

static unsigned char buffer[LARGEST];

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

/* Bytes that tell their number: a counter from a start of each number's own. */
static void fill(uint64_t number, size_t size)
{
	uint64_t state = number * 0x9e3779b97f4a7c15u + 1;
	for (size_t i = 0; i + 8 <= size; i += 8) {
		memcpy(buffer + i, &state, 8);
		state = state * 6364136223846793005u + 1442695040888963407u;
	}
	memcpy(buffer, &number, 8);
}

static void say(const char *what, uint64_t number)
{
	char line[40];
	int length = snprintf(line, sizeof line, "%s %llu\n", what, (unsigned long long)number);
	if (write(1, line, length) != length)
		exit(1);
}

/* Where an earlier life, perhaps cut short, ended; its last file is made again. */
static uint64_t first_number(int log)
{
	uint64_t last = 0, number;
	for (int slot = 0; slot < SLOTS; slot++)
		if (pread(log, &number, 8, (off_t)slot * RECORD) == 8 && number > last)
			last = number;
	return last < 8 ? 1 : last / 8 * 8;
}

static void make_file(int folder, uint64_t number)
{
	char name[24];
	size_t size = 8 + number * 7919 % (LARGEST / 8) * 8;
	if (size > LARGEST)
		size = LARGEST;
	snprintf(name, sizeof name, "%llu", (unsigned long long)number);
	int file = openat(folder, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (file < 0)
		fail(name);
	fill(number, size);
	if (write(file, buffer, size) != (ssize_t)size || fsync(file) || close(file) || fsync(folder))
		fail(name);
	say("file", number);
	if (number > KEPT * 8) {
		snprintf(name, sizeof name, "%llu", (unsigned long long)number - KEPT * 8);
		unlinkat(folder, name, 0);
	}
}

int main(int count, char **words)
{
	if (count != 2 || chdir(words[1]))
		fail("power_cut FOLDER");
	mkdir("f", 0700);
	int folder = open("f", O_RDONLY | O_DIRECTORY);
	int log = open("log", O_RDWR | O_CREAT, 0600);
	if (folder < 0 || log < 0)
		fail("log");
	for (uint64_t number = first_number(log);; number++) {
		fill(number, RECORD);
		if (pwrite(log, buffer, RECORD, (off_t)(number % SLOTS) * RECORD) != RECORD || fsync(log))
			fail("log");
		say("log", number);
		if (number % 8 == 0)
			make_file(folder, number);
	}
}
