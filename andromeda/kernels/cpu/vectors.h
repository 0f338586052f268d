// Vectors of eight floats; compilers make of them what the processor has (GCC 12 or Clang).
#pragma once
#include <cstdint>
#include <cstring>

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
constexpr int WIDTH = 8;

static inline Floats load(const float* from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }

static inline Floats all(float x) { return Floats{} + x; }

// The sums of eight vectors, as one.
static inline Floats sums(const Floats* x) {
    Floats pair[4], four[2];
    for (int i = 0; i < 4; i++)  // within each half: sums of two neighbours
        pair[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 2, 8, 10, 4, 6, 12, 14) +
                  __builtin_shufflevector(x[2 * i], x[2 * i + 1], 1, 3, 9, 11, 5, 7, 13, 15);
    for (int i = 0; i < 2; i++)
        four[i] = __builtin_shufflevector(pair[2 * i], pair[2 * i + 1], 0, 2, 8, 10, 4, 6, 12, 14) +
                  __builtin_shufflevector(pair[2 * i], pair[2 * i + 1], 1, 3, 9, 11, 5, 7, 13, 15);
    return __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
