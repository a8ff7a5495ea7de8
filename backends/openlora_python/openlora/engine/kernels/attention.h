// Attention over the paged cache, which is read where it lies:
//   output[t, h] = softmax(cap(scaling · query[t, h] · keysᵀ)) · values, over the keys that token t may see,
//   cap(x) = softcap · tanh(x / softcap) if there is a cap.
// Rows are independent: a sequence's result does not depend on its neighbours.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "items.h"
#include "vector.h"

struct Sequence {
    int32_t row;     // of its first new token in the flat batch
    int32_t start;   // position of that token
    int32_t tokens;  // new ones
};

struct Shape {
    int64_t heads, kv_heads, head_dim, block_size;
    int64_t query_stride;  // from token to token, in elements; heads lie side by side
    int64_t output_stride;
    int64_t table_width;
    int64_t window;  // keys that a token sees, itself included; 0: all
    float scaling, softcap;
};

namespace {

constexpr int TILE = 4;      // rows, and keys, of a tile of scores
constexpr int ROW_BAND = 16;     // rows of an item of work
constexpr int VECTORS = 4;   // of a tile of the output
constexpr int KEYS_AHEAD = 32;    // keys asked for before they are needed

// Where the keys and the values of one sequence and head begin, in elements from those of the layer: one division a
// block, not one a key.
void find(const int32_t* table, int64_t context, const Shape& shape, int64_t kv_head, std::vector<int64_t>& offsets) {
    const int64_t token = shape.kv_heads * shape.head_dim;
    offsets.resize(std::max<int64_t>(context, offsets.size()));
    for (int64_t first = 0, block = 0; first < context; first += shape.block_size, block++) {
        const int64_t start = table[block] * shape.block_size * token + kv_head * shape.head_dim;
        for (int64_t k = first; k < std::min(first + shape.block_size, context); k++)
            offsets[k] = start + (k - first) * token;
    }
}

// Ask for the vectors of 4 keys: blocks lie anywhere, so the CPU can't foresee them.
template <typename T>
void fetch(const T* vectors, const int64_t* offsets, int64_t first, int64_t context, int64_t head_dim) {
    for (int64_t k = first; k < std::min(first + TILE, context); k++)
        for (int64_t d = 0; d < head_dim; d += 64 / sizeof(T)) __builtin_prefetch(vectors + offsets[k] + d);
}

// scores[r][k] = query[r] · key[k] for 4 rows and the keys first … first + 3; past the last key they are those of the last.
template <typename T>
void score(const T* const query[TILE], const T* keys, const int64_t* offsets, int64_t first, int64_t last,
           int64_t head_dim, float* scores, int64_t stride) {
    constexpr int STEP = Packed<T>::STEP;
    const T* key[TILE];
    for (int k = 0; k < TILE; k++) key[k] = keys + offsets[std::min(first + k, last)];
    floats sums[TILE * TILE] = {};
    for (int64_t d = 0; d < head_dim; d += STEP) {
        const bool whole = d + STEP <= head_dim;
        typename Packed<T>::type row[TILE], other;
        for (int r = 0; r < TILE; r++)
            row[r] = whole ? load_packed(query[r] + d) : load_tail(query[r] + d, head_dim - d);
        for (int k = 0; k < TILE; k++) {
            other = whole ? load_packed(key[k] + d) : load_tail(key[k] + d, head_dim - d);
            for (int r = 0; r < TILE; r++) sums[r * TILE + k] = dot(sums[r * TILE + k], row[r], other);
        }
    }
    floats totals = sum_each(sums);
    for (int r = 0; r < TILE; r++) memcpy(scores + r * stride + first, (const float*)&totals + r * TILE, 16);
}

// Scores of [begin, end) to weights that add up to 1; zero in the rest of [0, padded).
void softmax(float* scores, int64_t begin, int64_t end, int64_t padded, float scaling, float softcap) {
    const int64_t aligned = begin / LANES * LANES;
    if (softcap > 0)
        for (int64_t k = begin; k < end; k++) scores[k] = softcap * std::tanh(scaling * scores[k] / softcap) / scaling;
    for (int64_t k = aligned; k < begin; k++) scores[k] = -INFINITY;
    for (int64_t k = end; k < padded; k++) scores[k] = -INFINITY;
    floats most = splat(-INFINITY), sums = {};
    for (int64_t k = aligned; k < padded; k += LANES) {
        floats x = load(scores + k) * scaling;
        most = x > most ? x : most;
        store(scores + k, x);
    }
    float largest = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, most[lane]);
    for (int64_t k = aligned; k < padded; k += LANES) {
        floats x = load(scores + k);
        floats weight = x == -INFINITY ? floats{} : exp_lanes(x - largest);
        store(scores + k, weight);
        sums += weight;
    }
    const float scale = 1 / sum_lanes(sums);
    for (int64_t k = 0; k < aligned; k++) scores[k] = 0;
    for (int64_t k = aligned; k < padded; k += LANES) store(scores + k, load(scores + k) * scale);
}

// output[r][d …] = Σ weights[r][k] · value[k][d …] for 4 rows and V_COUNT vectors, over the keys [begin, end).
template <typename T, int V_COUNT>
void weigh(const float* weights, int64_t stride, const T* values, const int64_t* offsets, int64_t begin, int64_t end,
           int64_t d, T* const output[TILE]) {
    floats sums[TILE][V_COUNT] = {};
    for (int64_t k = begin; k < end; k++) {
        const T* value = values + offsets[k] + d;
        floats part[V_COUNT];
        for (int v = 0; v < V_COUNT; v++) part[v] = load(value + v * LANES);
        for (int r = 0; r < TILE; r++) {
            const float weight = weights[r * stride + k];
            for (int v = 0; v < V_COUNT; v++) sums[r][v] += weight * part[v];
        }
    }
    for (int r = 0; r < TILE; r++)
        for (int v = 0; v < V_COUNT; v++) store(output[r] + d + v * LANES, sums[r][v]);
}

struct AttentionScratch {  // of a thread
    std::vector<int64_t> firsts;
    std::vector<float> scores;
    std::vector<int64_t> offsets;
    std::vector<char> discarded;
};

template <typename T>
void attend(const T* query, const T* keys, const T* values, T* output, const Shape& shape, const Sequence& sequence,
            const int32_t* table, int64_t kv_head, int64_t first, int64_t tokens, AttentionScratch& scratch) {
    const int64_t group = shape.heads / shape.kv_heads, rows = tokens * group;
    const int64_t padded_rows = (rows + TILE - 1) / TILE * TILE;
    const int64_t context = sequence.start + first + tokens;
    const int64_t stride = (context + LANES) / LANES * LANES;
    const int64_t oldest = sequence.start + first;  // position of the first token here
    const int64_t begin = shape.window ? std::max<int64_t>(0, oldest - shape.window + 1) : 0;
    scratch.scores.resize(std::max<size_t>(scratch.scores.size(), padded_rows * stride));
    scratch.discarded.resize(shape.head_dim * sizeof(T));
    find(table, context, shape, kv_head, scratch.offsets);
    const int64_t* offsets = scratch.offsets.data();
    for (int64_t k = begin; k < begin + KEYS_AHEAD; k += TILE) fetch(keys, offsets, k, context, shape.head_dim);
    for (int64_t tile = 0; tile < rows; tile += TILE) {
        const T* from[TILE];
        T* to[TILE];
        for (int r = 0; r < TILE; r++) {
            const int64_t row = std::min(tile + r, rows - 1), token = sequence.row + first + row / group;
            const int64_t head = kv_head * group + row % group;
            from[r] = query + token * shape.query_stride + head * shape.head_dim;
            to[r] = tile + r < rows ? output + token * shape.output_stride + head * shape.head_dim
                                    : (T*)scratch.discarded.data();
        }
        float* scores = scratch.scores.data() + tile * stride;
        for (int64_t k = begin / TILE * TILE; k < context; k += TILE) {
            if (tile == 0) {  // keys some way ahead, and the values of these for what follows
                fetch(keys, offsets, k + KEYS_AHEAD, context, shape.head_dim);
                fetch(values, offsets, k, context, shape.head_dim);
            }
            score(from, keys, offsets, k, context - 1, shape.head_dim, scores, stride);
        }
        for (int r = 0; r < TILE; r++) {
            const int64_t position = oldest + std::min(tile + r, rows - 1) / group;
            const int64_t seen = shape.window ? std::max<int64_t>(0, position - shape.window + 1) : 0;
            softmax(scores + r * stride, seen, position + 1, stride, shape.scaling, shape.softcap);
        }
        int64_t d = 0;
        for (; d + VECTORS * LANES <= shape.head_dim; d += VECTORS * LANES)
            weigh<T, VECTORS>(scores, stride, values, offsets, begin, context, d, to);
        for (; d < shape.head_dim; d += LANES) weigh<T, 1>(scores, stride, values, offsets, begin, context, d, to);
    }
}

// What a thread does of the sequences; an item is some new tokens of one, under one head of the keys.
template <typename T>
void paged_attention(Member& member, const T* query, const T* keys, const T* values, T* output, const Shape& shape,
                     const Sequence* sequences, int64_t count, const int32_t* tables, AttentionScratch& scratch) {
    const int64_t band = std::max<int64_t>(1, ROW_BAND / (shape.heads / shape.kv_heads));
    std::vector<int64_t>& firsts = scratch.firsts;  // bands before each sequence
    firsts.assign(count + 1, 0);
    for (int64_t s = 0; s < count; s++)
        firsts[s + 1] = firsts[s] + (sequences[s].tokens + band - 1) / band;
    Items items(member, firsts[count] * shape.kv_heads);
    for (int64_t item; (item = items.take()) >= 0;) {
        const int64_t head = item % shape.kv_heads, index = item / shape.kv_heads;
        const int64_t s = std::upper_bound(firsts.begin(), firsts.end(), index) - firsts.begin() - 1;
        const int64_t first = (index - firsts[s]) * band;
        attend<T>(query, keys, values, output, shape, sequences[s], tables + s * shape.table_width, head, first,
                  std::min<int64_t>(band, sequences[s].tokens - first), scratch);
    }
}

}  // namespace
