// What the kernels tell each other, and what Python gives them: structures.py has the same structures.
#pragma once
#include <cstdint>

struct Rows {  // the texts of a step, their new tokens laid flat
    int64_t count, tokens;
    const int32_t *firsts, *counts;  // (count,) which of the tokens is a row's first, and how many are its own
    const int32_t* lengths;          // (count,) of a text, these tokens included
    const int32_t* table;            // (count, table_row) its pages
    int64_t table_row;
};

struct Pages {  // of one block; strides in numbers
    float *keys, *values;
    int64_t page_size;  // tokens, a power of two
    int64_t page, token, head;
};

struct Turns {  // (entries, D / 2) each, decay included
    const float *cos, *sin;
};

struct Heads {  // those of any block
    int64_t queries, keys, D, rotated;
    Turns of_keys;     // by 0 .. TILE - 1 tokens back
    Turns of_tiles;    // by multiples of TILE, as far as texts go
    Turns of_queries;  // of new tokens, the last one first
};

constexpr int64_t TILE = 64;                 // keys
constexpr int64_t WORTH_THREADS = 1 << 21;  // multiplications

// x (rows, K), x_stride from row to row, and a matrix (N, K) in panels -> y (rows, N).
void linear(const float* x, int64_t x_stride, const float* panels, float* y, int64_t y_stride, int64_t rows, int64_t N,
            int64_t K, int threads);

// q and out (tokens, heads, D), stride from token to token; they may be the same.
void attention(const Rows& rows, const Heads& heads, const Pages& pages, const float* slopes, const int64_t* windows,
               const float* q, int64_t q_stride, float* out, int64_t out_stride, int threads);
