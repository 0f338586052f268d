// The blocks of a step in which texts are written: token shift, products, attention and norms, block by block, in one
// call. What inference/engine/packed.py and batch.py say in PyTorch.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "vectors.h"

struct Block {
    const float *way_in, *way_out;     // panels of (F + (H + 2 K) D, dim) and of (dim, F + H D)
    const float* factor;               // (H + K, D): gains and temperature
    const float* norm;                 // (dim,)
    float* shifts;                     // (pages, amount, dim): shift states
    const float* slopes;               // (H,)
    const int64_t* windows;            // (H,)
    Pages pages;
};

struct Model {
    int64_t depth, dim, inner;  // inner: channels of the feed-forward
    int64_t activation;         // 0: relu squared, 1: gelu, 2: silu
    int64_t amount;             // tokens of the shift
    int64_t deepnorm, normalises;
    float alpha, eps;
    Heads heads;
    const Block* blocks;
};

struct Step {
    Rows rows;
    const int64_t* positions;  // (tokens,)
    const int64_t* cells;      // (tokens,) where keys and values go, counted in tokens of all pages
    const float* q_scale;      // (tokens, H), or none
    const int64_t* before;     // (rows,) pages of the states before rows
    int64_t drafted;           // so many rows, from `first_drafted` on, end only after the draw
    int64_t first_drafted;
    float* kept;  // (depth, drafted * amount + their tokens, dim): before them, and what they are, for what follows
    float* x;     // (tokens, dim), in and out
    int64_t threads;
};

namespace {

void layer_norm(float* x, int64_t dim, const float* weight, float eps) {
    float mean = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : mean)
    for (int64_t d = 0; d < dim; d++) mean += x[d];
    mean /= dim;
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < dim; d++) square += (x[d] - mean) * (x[d] - mean);
    const float scale = 1.0f / std::sqrt(square / dim + eps);
    for (int64_t d = 0; d < dim; d++) x[d] = (x[d] - mean) * scale * weight[d];
}

void activate(float* x, int64_t count, int64_t kind) {
    if (kind == 0)
        for (int64_t i = 0; i < count; i++) x[i] = x[i] < 0.0f ? 0.0f : x[i] * x[i];
    else if (kind == 1)
        for (int64_t i = 0; i < count; i++) x[i] *= 0.5f * (1.0f + std::erf(x[i] * float(M_SQRT1_2)));
    else
        for (int64_t i = 0; i < count; i++) x[i] /= 1.0f + std::exp(-x[i]);
}

class Pass {
  public:
    Pass(const Model& model, const Step& step)
        : model(model), step(step), tokens(step.rows.tokens), outer(model.inner + model.heads.queries * model.heads.D),
          width(outer + 2 * model.heads.keys * model.heads.D) {
        residual.resize(tokens * model.dim);
        shifted.resize(tokens * model.dim);
        mixed.resize(tokens * width);
        states.resize(model.amount * model.dim);
    }

    void run() {
        for (int64_t index = 0; index < model.depth; index++) run(model.blocks[index], index);
    }

  private:
    const Model& model;
    const Step& step;
    const int64_t tokens, outer, width;
    std::vector<float> residual, shifted, mixed, states;

    void run(const Block& block, int64_t index) {
        const int64_t dim = model.dim;
        float* x = step.x;
        residual.assign(x, x + tokens * dim);
        if (!model.deepnorm)
            for (int64_t t = 0; t < tokens; t++) layer_norm(x + t * dim, dim, block.norm, model.eps);
        shift(block, index);
        linear(shifted.data(), dim, block.way_in, mixed.data(), width, tokens, width, dim, step.threads);
        for (int64_t t = 0; t < tokens; t++) {
            normalise(block, t);
            append(block, t);
        }
        float* q = mixed.data() + model.inner;
        attention(step.rows, model.heads, block.pages, block.slopes, block.windows, q, width, q, width, step.threads);
        for (int64_t t = 0; t < tokens; t++) activate(&mixed[t * width], model.inner, model.activation);
        linear(mixed.data(), width, block.way_out, x, dim, tokens, dim, outer, step.threads);
        const float alpha = model.deepnorm ? model.alpha : 1.0f;
        for (int64_t i = 0; i < tokens * dim; i++) x[i] += alpha * residual[i];
        if (model.deepnorm)
            for (int64_t t = 0; t < tokens; t++) layer_norm(x + t * dim, dim, block.norm, model.eps);
    }

    // Part i of the channels comes from i tokens before; states are kept at the ends of pages and of rows.
    void shift(const Block& block, int64_t index) {
        const int64_t dim = model.dim, amount = model.amount, part = dim / (amount + 1);
        const float* x = step.x;
        shifted.assign(x, x + tokens * dim);
        if (amount == 0) return;
        for (int64_t row = 0; row < step.rows.count; row++) {
            const int64_t first = step.rows.firsts[row], count = step.rows.counts[row];
            const float* before = block.shifts + step.before[row] * amount * dim;
            states.assign(before, before + amount * dim);
            const auto behind = [&](int64_t token) {  // of the row; -1 is the last one before it
                return token >= 0 ? x + (first + token) * dim : &states[(amount + token) * dim];
            };
            for (int64_t t = 0; t < count; t++)
                for (int64_t i = 1; i <= amount; i++)
                    memcpy(&shifted[(first + t) * dim + i * part], behind(t - i) + i * part, part * sizeof(float));
            if (row >= step.first_drafted && row < step.first_drafted + step.drafted) {
                keep(index, row);
                continue;
            }
            for (int64_t t = 0; t < count; t++) {
                const int64_t size = block.pages.page_size, position = step.positions[first + t];
                if (t < count - 1 && position % size < size - 1) continue;
                float* to = block.shifts + step.cells[first + t] / size * amount * dim;
                for (int64_t i = 0; i < amount; i++)
                    memcpy(to + i * dim, behind(t - amount + 1 + i), dim * sizeof(float));
            }
        }
    }

    void keep(int64_t index, int64_t row) {
        const int64_t dim = model.dim, amount = model.amount, size = step.drafted * amount;
        const int64_t begin = step.rows.firsts[step.first_drafted], end_row = step.first_drafted + step.drafted - 1;
        const int64_t all = size + step.rows.firsts[end_row] + step.rows.counts[end_row] - begin;
        float* kept = step.kept + index * all * dim;
        const int64_t first = step.rows.firsts[row], count = step.rows.counts[row];
        memcpy(kept + (row - step.first_drafted) * amount * dim, states.data(), amount * dim * sizeof(float));
        memcpy(kept + (size + first - begin) * dim, step.x + first * dim, count * dim * sizeof(float));
    }

    void normalise(const Block& block, int64_t t) {
        const Heads& heads = model.heads;
        for (int64_t h = 0; h < heads.queries + heads.keys; h++) {
            float* x = &mixed[t * width + model.inner + h * heads.D];
            float scale = 1.0f;
            if (model.normalises) {
                float square = 0.0f;
#pragma omp simd reduction(+ : square)
                for (int64_t d = 0; d < heads.D; d++) square += x[d] * x[d];
                scale = 1.0f / std::max(std::sqrt(square), 1e-12f);
            }
            if (step.q_scale && h < heads.queries) scale *= step.q_scale[t * heads.queries + h];
            for (int64_t d = 0; d < heads.D; d++) x[d] *= scale * block.factor[h * heads.D + d];
        }
    }

    void append(const Block& block, int64_t t) {
        const int64_t D = model.heads.D, size = block.pages.page_size, cell = step.cells[t];
        const int64_t to = cell / size * block.pages.page + cell % size * block.pages.token;
        const float *k = &mixed[t * width + outer], *v = k + model.heads.keys * D;
        for (int64_t h = 0; h < model.heads.keys; h++) {
            memcpy(block.pages.keys + to + h * block.pages.head, k + h * D, D * sizeof(float));
            memcpy(block.pages.values + to + h * block.pages.head, v + h * D, D * sizeof(float));
        }
    }
};

}  // namespace

extern "C" void andromeda_blocks(const Model* model, const Step* step) { Pass(*model, *step).run(); }
