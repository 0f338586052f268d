// Attention of a few new tokens a row over pages of keys and values: one walk over the keys of each row.
//
// Keys go by in tiles of TILE, counted backwards from the row's last token. All queries of one key/value head (its heads
// times the new tokens) pass over a tile while it is in the nearest cache: logits, softmax by a running maximum (Milakov
// and Gimelshein 2018), sums of values. A head whose window ends before a tile leaves it out.
//
// A rotation by distance is two: a key is turned by its place in the tile, a query by the tile's distance. Decay goes
// with both, and both only shrink.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace {

constexpr int64_t LINE = 16;           // floats that memory brings at a time
constexpr int64_t WORTH_A_PART = 512;  // keys
constexpr float NOTHING = -INFINITY;

struct Call {
    const Rows& rows;
    const Heads& heads;
    const Pages& pages;
    const float* slopes;
    const int64_t* windows;
    const float* q;
    int64_t q_stride;
    float* out;
    int64_t out_stride;
};

// Queries of one row and kv head over a part of the tiles: what is left of them is a maximum, a total and sums of values.
struct Part {
    std::vector<float> top, total, acc;  // (queries,), (queries,), (queries, D)
};

struct Query {
    int64_t behind, window;  // tokens behind the row's last one; seen, itself included
    float slope;
    bool rotated;
};

void turn(const float* x, const Turns& turns, int64_t entry, int64_t D, float* out) {
    const int64_t pairs = D / 2;
    const float *cos = turns.cos + entry * pairs, *sin = turns.sin + entry * pairs;
    int64_t p = 0;
    for (; p + WIDTH <= pairs; p += WIDTH) {
        const Floats a = load(x + p), b = load(x + pairs + p), c = load(cos + p), s = load(sin + p);
        store(out + p, a * c - b * s);
        store(out + pairs + p, b * c + a * s);
    }
    for (; p < pairs; p++) {
        const float a = x[p], b = x[pairs + p];
        out[p] = a * cos[p] - b * sin[p];
        out[pairs + p] = b * cos[p] + a * sin[p];
    }
}

// e^x for x <= 0, to two units in the last place (Cephes' expf); 0 below -87; no number stays none.
Floats exp_of_negative(Floats x) {
    const Floats lowest = all(-87.0f);
    const Floats y = x < lowest ? lowest : x;
    const Floats shifted = y * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to integers
    const Floats n = shifted - 12582912.0f;
    const Floats r = y - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    Integers bits;
    memcpy(&bits, &shifted, sizeof bits);
    const Integers exponent = (bits + (127 - 0x4B400000)) << 23;
    Floats scale;
    memcpy(&scale, &exponent, sizeof scale);
    return x < lowest ? all(0.0f) : p * scale;
}

// Eight keys with one query.
Floats products(const float* const* keys, const float* q, int64_t D) {
    Floats sum[WIDTH] = {};
    for (int64_t d = 0; d < D; d += WIDTH) {
        const Floats x = load(q + d);
        for (int j = 0; j < WIDTH; j++) sum[j] += load(keys[j] + d) * x;
    }
    return sums(sum);
}

// acc (Q, D) += p (Q, count) * values: for Q queries and N vectors of the channels.
template <int Q, int N>
void add_values(const float* const* values, const float* const* p, int64_t count, int64_t d, float* const* acc) {
    Floats sum[Q][N];
    for (int q = 0; q < Q; q++)
        for (int n = 0; n < N; n++) sum[q][n] = load(acc[q] + d + n * WIDTH);
    for (int64_t j = 0; j < count; j++)
        for (int n = 0; n < N; n++) {
            const Floats v = load(values[j] + d + n * WIDTH);
            for (int q = 0; q < Q; q++) sum[q][n] += v * p[q][j];
        }
    for (int q = 0; q < Q; q++)
        for (int n = 0; n < N; n++) store(acc[q] + d + n * WIDTH, sum[q][n]);
}

struct Room {  // that a thread keeps
    std::vector<Query> queries;
    std::vector<int> seeing;                               // queries that see something of the tile
    std::vector<float> unturned, turned, logits, rotated;  // (queries, D) twice, (queries, TILE), (TILE, D)
};

// The queries of a row and kv head over its tiles.
class Walk {
  public:
    Walk(const Call& call, int64_t row, int64_t kv, Room& room)
        : call(call), row(row), kv(kv), D(call.heads.D), length(call.rows.lengths[row]),
          page_bits(__builtin_ctzll(call.pages.page_size)), queries(room.queries), seeing(room.seeing) {
        const int64_t group = call.heads.queries / call.heads.keys, count = call.rows.counts[row];
        queries.clear();
        for (int64_t n = 0; n < count; n++)
            for (int64_t h = kv * group; h < (kv + 1) * group; h++)
                queries.push_back({count - 1 - n, call.windows[h], call.slopes[h], h < call.heads.rotated});
        const int64_t size = int64_t(queries.size());
        unturned = space(room.unturned, size * D);
        turned = space(room.turned, size * D);
        logits = space(room.logits, size * TILE);
        rotated = space(room.rotated, TILE * D);
        for (int64_t i = 0; i < size; i++) {
            const int64_t token = call.rows.firsts[row] + i / group, head = kv * group + i % group;
            const float* q = call.q + token * call.q_stride + head * D;
            if (queries[i].rotated)
                turn(q, call.heads.of_queries, queries[i].behind, D, unturned + i * D);
            else
                memcpy(unturned + i * D, q, D * sizeof(float));
        }
    }

    void over(int64_t first_tile, int64_t end_tile, Part& part) {
        part.top.assign(queries.size(), NOTHING);
        part.total.assign(queries.size(), 0.0f);
        part.acc.assign(queries.size() * D, 0.0f);
        for (int64_t tile = first_tile; tile < end_tile; tile++) over(tile, part);
    }

  private:
    const Call& call;
    const int64_t row, kv, D, length, page_bits;
    std::vector<Query>& queries;
    std::vector<int>& seeing;
    float *unturned, *turned, *logits, *rotated;
    const float *keys[TILE], *rotated_keys[TILE], *values[TILE];

    static float* space(std::vector<float>& held, int64_t size) {
        held.resize(size);
        return held.data();
    }

    void over(int64_t tile, Part& part) {
        const int64_t back = tile * TILE, end = std::min(back + TILE, length);
        seeing.clear();
        bool any_rotated = false;
        int64_t reach = 0;
        for (size_t i = 0; i < queries.size(); i++) {
            const Query& query = queries[i];
            if (back - query.behind >= query.window || end <= query.behind) continue;
            seeing.push_back(int(i));
            any_rotated |= query.rotated;
            reach = std::max(reach, std::min(end, query.window + query.behind));
        }
        if (seeing.empty()) return;
        const int64_t count = reach - back;
        find(back, count, any_rotated);
        for (int i : seeing)
            if (queries[i].rotated) turn(unturned + i * D, call.heads.of_tiles, tile, D, turned + i * D);
        for (int64_t j = 0; j < count; j += WIDTH)
            for (int i : seeing) weigh(i, back, count, j);
        for (int i : seeing) normalise(i, count, part);
        size_t s = 0;
        for (; s + 3 <= seeing.size(); s += 3) add<3>(&seeing[s], count, part);
        if (seeing.size() - s == 2)
            add<2>(&seeing[s], count, part);
        else if (seeing.size() - s == 1)
            add<1>(&seeing[s], count, part);
    }

    int64_t place(int64_t position) const {
        const Pages& pages = call.pages;
        const int64_t page = call.rows.table[row * call.rows.table_row + (position >> page_bits)];
        return page * pages.page + (position & (pages.page_size - 1)) * pages.token + kv * pages.head;
    }

    // Memory brings what the next tile needs, while this one is worked on.
    void ask_for(int64_t position) const {
        const int64_t at = place(position);
        for (int64_t d = 0; d < D; d += LINE) {
            __builtin_prefetch(call.pages.keys + at + d);
            __builtin_prefetch(call.pages.values + at + d);
        }
    }

    // The tile's keys and values, the last token first; beyond its end the last of them again.
    void find(int64_t back, int64_t count, bool any_rotated) {
        for (int64_t j = 0; j < count; j++) {
            const int64_t position = length - 1 - back - j;
            const int64_t at = place(position);
            keys[j] = call.pages.keys + at;
            values[j] = call.pages.values + at;
            if (position >= TILE) ask_for(position - TILE);
            rotated_keys[j] = rotated + j * D;
            if (any_rotated) turn(keys[j], call.heads.of_keys, j, D, rotated + j * D);
        }
        for (int64_t j = count; j % WIDTH; j++) {
            keys[j] = keys[count - 1];
            rotated_keys[j] = rotated_keys[count - 1];
        }
    }

    // Logits of a query and eight keys from the j-th of the tile on.
    void weigh(int i, int64_t back, int64_t count, int64_t j) {
        static const Floats PLACES = {0, 1, 2, 3, 4, 5, 6, 7};
        const Query& query = queries[i];
        const float* q = (query.rotated ? turned : unturned) + i * D;
        const float first = float(back - query.behind);  // its distance to the tile's first key
        const float seen = float(std::min(query.window + query.behind - back, count)), future = -first;
        const Floats place = PLACES + float(j);
        Floats x = products((query.rotated ? rotated_keys : keys) + j, q, D) - query.slope * (place + first);
        x = place < seen ? x : all(NOTHING);
        store(logits + i * TILE + j, place < future ? all(NOTHING) : x);
    }

    // Logits to probabilities beside the query's maximum so far.
    void normalise(int i, int64_t count, Part& part) {
        float* p = logits + i * TILE;
        Floats top = all(part.top[i]);
        for (int64_t j = 0; j < count; j += WIDTH) {
            const Floats x = load(p + j);
            top = x > top ? x : top;
        }
        float highest = top[0];
        for (int l = 1; l < WIDTH; l++) highest = std::max(highest, top[l]);
        if (highest > part.top[i]) {
            const float scale = std::exp(part.top[i] - highest);
            part.total[i] *= scale;
            for (int64_t d = 0; d < D; d++) part.acc[i * D + d] *= scale;
            part.top[i] = highest;
        }
        if (highest == NOTHING) highest = 0.0f;  // all is unseen, or no number
        Floats total = {};
        for (int64_t j = 0; j < count; j += WIDTH) {
            const Floats x = exp_of_negative(load(p + j) - highest);
            store(p + j, x);
            total += x;
        }
        for (int l = 0; l < WIDTH; l++) part.total[i] += total[l];
    }

    template <int Q>
    void add(const int* which, int64_t count, Part& part) {
        const float* p[Q];
        float* acc[Q];
        for (int q = 0; q < Q; q++) {
            p[q] = logits + which[q] * TILE;
            acc[q] = &part.acc[which[q] * D];
        }
        int64_t d = 0;
        for (; d + 4 * WIDTH <= D; d += 4 * WIDTH) add_values<Q, 4>(values, p, count, d, acc);
        for (; d < D; d += WIDTH) add_values<Q, 1>(values, p, count, d, acc);
    }
};

// Parts of one row and kv head, put together.
void finish(const Call& call, int64_t row, int64_t kv, const Part* parts, int64_t count) {
    const int64_t group = call.heads.queries / call.heads.keys, D = call.heads.D;
    for (int64_t i = 0; i < call.rows.counts[row] * group; i++) {
        const int64_t token = call.rows.firsts[row] + i / group, head = kv * group + i % group;
        float* out = call.out + token * call.out_stride + head * D;
        float top = NOTHING, total = 0.0f;
        for (int64_t part = 0; part < count; part++) top = std::max(top, parts[part].top[i]);
        std::fill(out, out + D, 0.0f);
        for (int64_t part = 0; part < count; part++) {
            const float scale = top == NOTHING ? 1.0f : std::exp(parts[part].top[i] - top);
            total += scale * parts[part].total[i];
            for (int64_t d = 0; d < D; d++) out[d] += scale * parts[part].acc[i * D + d];
        }
        const int64_t behind = call.rows.counts[row] - 1 - i / group;
        if (behind >= call.rows.lengths[row]) continue;  // before the text's first token: zeros
        const float share = 1.0f / total;
        for (int64_t d = 0; d < D; d++) out[d] *= share;
    }
}

}  // namespace

void attention(const Rows& rows, const Heads& heads, const Pages& pages, const float* slopes, const int64_t* windows,
               const float* q, int64_t q_stride, float* out, int64_t out_stride, int threads) {
    const Call call = {rows, heads, pages, slopes, windows, q, q_stride, out, out_stride};
    const int64_t units = rows.count * heads.keys;
    int64_t longest = 0, multiplications = 0;
    for (int64_t row = 0; row < rows.count; row++) {
        longest = std::max<int64_t>(longest, rows.lengths[row]);
        multiplications += 2 * rows.counts[row] * rows.lengths[row] * heads.queries * heads.D;
    }
    if (multiplications < WORTH_THREADS) threads = 1;
    const int64_t most = units >= 2 * threads ? 1 : longest / WORTH_A_PART;  // parts of a text
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(2 * threads, most));
    thread_local std::vector<Part> held;
    if (int64_t(held.size()) < units * parts) held.resize(units * parts);
    Part* part_of = held.data();
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t item = 0; item < units * parts; item++) {
        const int64_t unit = item / parts, part = item % parts, row = unit / heads.keys;
        const int64_t here = (rows.lengths[row] + TILE - 1) / TILE;
        thread_local Room room;
        Walk(call, row, unit % heads.keys, room).over(here * part / parts, here * (part + 1) / parts, part_of[item]);
    }
    for (int64_t unit = 0; unit < units; unit++)
        finish(call, unit / heads.keys, unit % heads.keys, part_of + unit * parts, parts);
}

extern "C" void andromeda_attention(const Rows* rows, const Heads* heads, const Pages* pages, const float* slopes,
                                    const int64_t* windows, const float* q, float* out, int64_t threads) {
    const int64_t stride = heads->queries * heads->D;
    attention(*rows, *heads, *pages, slopes, windows, q, stride, out, stride, int(threads));
}
