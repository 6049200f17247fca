// Floating point, one number at a time.
#include "bench.h"

#include <math.h>

static double size_of(double x) { return x < 0 ? -x : x; }

// ---- planets around a star: square roots, divisions, little parallel work ----

#define BODIES 5

static struct body {
    double place[3], speed[3], mass;
} bodies[BODIES];

static void attract(double step) {
    for (int i = 0; i < BODIES; i++)
        for (int j = i + 1; j < BODIES; j++) {
            struct body *a = &bodies[i], *b = &bodies[j];
            double x = a->place[0] - b->place[0], y = a->place[1] - b->place[1], z = a->place[2] - b->place[2];
            double square = x * x + y * y + z * z, pull = step / (square * sqrt(square));
            a->speed[0] -= x * b->mass * pull, b->speed[0] += x * a->mass * pull;
            a->speed[1] -= y * b->mass * pull, b->speed[1] += y * a->mass * pull;
            a->speed[2] -= z * b->mass * pull, b->speed[2] += z * a->mass * pull;
        }
}
static double distance(const struct body *a, const struct body *b) {
    return hypot(a->place[0] - b->place[0], a->place[1] - b->place[1]);
}
static void orbit(unsigned long steps) {
    const double step = 1e-3;
    // Circular orbits of light bodies, which nearly keep their distance from the heavy one.
    bodies[0] = (struct body){.mass = 1};
    for (int i = 1; i < BODIES; i++)
        bodies[i] = (struct body){.place = {i}, .speed = {0, 1 / sqrt(i)}, .mass = 1e-6};
    while (steps--) {
        attract(step);
        for (int i = 0; i < BODIES; i++)
            for (int axis = 0; axis < 3; axis++) bodies[i].place[axis] += bodies[i].speed[axis] * step;
    }
    for (int i = 1; i < BODIES; i++)
        check(size_of(distance(&bodies[i], &bodies[0]) / i - 1) < 0.02);
}
static double measure_orbits(void) { return rate(orbit) * 1e-6; }

// ---- linear equations by elimination with pivots ----

#define UNKNOWNS 100

static void solve(unsigned long times) {
    static double matrix[UNKNOWNS][UNKNOWNS + 1];
    uint64_t random = 17;
    while (times--) {
        // The solution is 1, 2, 3 …
        for (int row = 0; row < UNKNOWNS; row++) {
            matrix[row][UNKNOWNS] = 0;
            for (int column = 0; column < UNKNOWNS; column++) {
                matrix[row][column] = next_random(&random) * 0x1p-31;
                matrix[row][UNKNOWNS] += matrix[row][column] * (column + 1);
            }
        }
        for (int step = 0; step < UNKNOWNS; step++) {
            int pivot = step;
            for (int row = step + 1; row < UNKNOWNS; row++)
                if (size_of(matrix[row][step]) > size_of(matrix[pivot][step])) pivot = row;
            for (int column = step; column <= UNKNOWNS; column++) {
                double kept = matrix[step][column];
                matrix[step][column] = matrix[pivot][column], matrix[pivot][column] = kept;
            }
            for (int row = step + 1; row < UNKNOWNS; row++) {
                double factor = matrix[row][step] / matrix[step][step];
                for (int column = step; column <= UNKNOWNS; column++)
                    matrix[row][column] -= factor * matrix[step][column];
            }
        }
        for (int row = UNKNOWNS - 1; row >= 0; row--) {
            double value = matrix[row][UNKNOWNS];
            for (int column = row + 1; column < UNKNOWNS; column++)
                value -= matrix[row][column] * matrix[column][UNKNOWNS];
            matrix[row][UNKNOWNS] = value / matrix[row][row];
            check(size_of(matrix[row][UNKNOWNS] - (row + 1)) < 1e-6);
        }
    }
}
static double measure_equations(void) {
    return rate(solve) * (2.0 / 3 * UNKNOWNS + 2) * UNKNOWNS * UNKNOWNS * 1e-6;
}

// ---- the Mandelbrot set: long loops on few registers ----

#define SIDE 64

static void mandelbrot(unsigned long times) {
    while (times--) {
        unsigned inside = 0;
        for (int row = 0; row < SIDE; row++)
            for (int column = 0; column < SIDE; column++) {
                double x = 0, y = 0, a = column * (3.0 / SIDE) - 2, b = row * (2.5 / SIDE) - 1.25;
                int count = 0;
                while (count < 100 && x * x + y * y < 4) {
                    double next = x * x - y * y + a;
                    y = 2 * x * y + b, x = next, count++;
                }
                inside += count == 100;
            }
        check(inside == 862);
    }
}
static double measure_mandelbrot(void) { return rate(mandelbrot) * SIDE * SIDE * 1e-6; }

// ---- a Fourier transform there and back ----

#define POINTS 1024

static double real[POINTS], imaginary[POINTS], cosine[POINTS], sine[POINTS];

static void transform(int back) {
    for (unsigned index = 1, reversed = 0; index < POINTS; index++) {
        unsigned bit = POINTS / 2;
        for (; reversed & bit; bit /= 2) reversed ^= bit;
        reversed ^= bit;
        if (index >= reversed) continue;
        double kept = real[index];
        real[index] = real[reversed], real[reversed] = kept;
        kept = imaginary[index], imaginary[index] = imaginary[reversed], imaginary[reversed] = kept;
    }
    for (int length = 2; length <= POINTS; length *= 2)
        for (int start = 0; start < POINTS; start += length)
            for (int index = 0; index < length / 2; index++) {
                int low = start + index, high = low + length / 2, angle = index * (POINTS / length);
                double s = back ? sine[angle] : -sine[angle], c = cosine[angle];
                double x = real[high] * c - imaginary[high] * s, y = real[high] * s + imaginary[high] * c;
                real[high] = real[low] - x, imaginary[high] = imaginary[low] - y;
                real[low] += x, imaginary[low] += y;
            }
}
static void transform_often(unsigned long times) {
    while (times--) {
        for (int index = 0; index < POINTS; index++) real[index] = index % 37, imaginary[index] = index % 11;
        transform(0);
        transform(1);
        for (int index = 0; index < POINTS; index++) {
            check(size_of(real[index] / POINTS - index % 37) < 1e-9);
            check(size_of(imaginary[index] / POINTS - index % 11) < 1e-9);
        }
    }
}
static double measure_transform(void) {
    for (int index = 0; index < POINTS; index++)
        cosine[index] = cos(2 * M_PI * index / POINTS), sine[index] = sin(2 * M_PI * index / POINTS);
    return rate(transform_often) * 2 * 10 * POINTS / 2 * 10 * 1e-6;
}

// ---- the x87 unit ----

static void newton(unsigned long times) {
    long double seed = 2;
    keep(seed);
    for (; times; times--) {
        long double root = seed;
        for (int step = 0; step < 8; step++) root = (root + seed / root) * 0.5L;
        check(root * root - seed < 1e-17L && seed - root * root < 1e-17L);
    }
}
static double measure_x87(void) { return rate(newton) * 8e-6; }

static const struct row rows[] = {
    {"orbits", "M/s", measure_orbits},
    {"equations", "Mflop/s", measure_equations},
    {"mandelbrot", "M/s", measure_mandelbrot},
    {"fourier", "Mflop/s", measure_transform},
    {"x87", "M/s", measure_x87},
    {0},
};
const struct group float_group = {"float", rows};
