// Products of a few rows with a large matrix, which is read once, from the first byte to the last.
//
// The matrix (N, K) lies in panels of WIDTH outputs, [N / WIDTH][K][WIDTH]: what a step of the innermost loop reads is
// one vector of it, and one number of each row. Eight rows at a time keep their sums in registers.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace {

constexpr int64_t ROWS = 8;
constexpr int64_t AHEAD = 1536;  // floats that are asked of memory in advance

// rows: (K, R). Few rows take turns in several sums each, for one waits for its last addition. A row or two wait for
// memory alone, which needs no reminder.
template <int R>
void panel(const float* matrix, const float* rows, int64_t K, float* out) {
    constexpr int TURNS = R <= 4 ? ROWS / R : 1, STEP = std::max(TURNS, 2);  // two vectors are a line of memory
    Floats sum[TURNS][R] = {};
    int64_t k = 0;
    for (; k + STEP <= K; k += STEP)
        for (int i = 0; i < STEP; i++) {
            const float* w = matrix + (k + i) * WIDTH;
            if (R > 2 && i % 2 == 0) __builtin_prefetch(w + AHEAD);
            for (int r = 0; r < R; r++) sum[i % TURNS][r] += load(w) * rows[(k + i) * R + r];
        }
    for (; k < K; k++)
        for (int r = 0; r < R; r++) sum[0][r] += load(matrix + k * WIDTH) * rows[k * R + r];
    for (int r = 0; r < R; r++) {
        for (int turn = 1; turn < TURNS; turn++) sum[0][r] += sum[turn][r];
        store(out + r * WIDTH, sum[0][r]);
    }
}

using Panel = void (*)(const float*, const float*, int64_t, float*);
constexpr Panel PANELS[] = {nullptr,  panel<1>, panel<2>, panel<3>, panel<4>,
                            panel<5>, panel<6>, panel<7>, panel<8>};

}  // namespace

void linear(const float* x, int64_t x_stride, const float* panels, float* y, int64_t y_stride, int64_t rows, int64_t N,
            int64_t K, int threads) {
    thread_local std::vector<float> held;
    held.resize(rows * K);
    float* columns = held.data();  // of each block of rows: (K, rows)
    for (int64_t first = 0; first < rows; first += ROWS) {
        const int64_t here = std::min(ROWS, rows - first);
        for (int64_t r = 0; r < here; r++)
            for (int64_t k = 0; k < K; k++) columns[first * K + k * here + r] = x[(first + r) * x_stride + k];
    }
    if (rows * N * K < WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < N; n += WIDTH) {
        const int64_t outputs = std::min<int64_t>(WIDTH, N - n);
        float out[ROWS * WIDTH];
        for (int64_t first = 0; first < rows; first += ROWS) {
            const int64_t here = std::min(ROWS, rows - first);
            PANELS[here](panels + n * K, columns + first * K, K, out);
            for (int64_t r = 0; r < here; r++)
                memcpy(y + (first + r) * y_stride + n, out + r * WIDTH, outputs * sizeof(float));
        }
    }
}

extern "C" void andromeda_linear(const float* x, int64_t x_stride, const float* panels, float* y, int64_t rows,
                                 int64_t N, int64_t K, int64_t threads) {
    linear(x, x_stride, panels, y, N, rows, N, K, int(threads));
}
