// Grouped LoRA products: for every segment and every module of a group of linears that share their input,
//   output[rows, columns] += weight · scaling · (input[rows] · Aᵀ) · Bᵀ
// A is [rank, in_features] as in the file. B is transposed and in strips of 64 columns, the last one filled up with zeros:
// float [strips, rank, 64]; bf16 [strips, ⌈rank / 2⌉, 64, 2], an odd rank with a row of zeros, so that one dot instruction
// takes two ranks. Every element of the output belongs to one thread and every sum has one order, so a row's result does
// not depend on its neighbours. With many adapters the time is that of reading them, so each thread asks for the weights
// of its next piece of work while it computes with those of this one.

#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

struct Pair {
    const void* a;
    const void* b;
    int32_t rank;  // 0: the adapter leaves this module alone
    int32_t column;
    int32_t columns;
    float scaling;
};

struct Segment {
    const Pair* pairs;  // [groups, members]
    int32_t start, stop;
    float weight;
    int32_t unused;
};

namespace {

constexpr int TOKENS = 4;  // of a tile of the shrink
constexpr int RANKS = 4;
constexpr int STREAM_RANKS = 8;  // of a tile of one token: enough loads in flight to follow memory
constexpr int BAND = 32;         // tokens of a piece of work: A and B are read once for so many
constexpr int STRIP_VECTORS = 4;       // of a strip
constexpr int STRIP = STRIP_VECTORS * LANES;
constexpr int AHEAD = 4;  // strips: memory answers after about as long as four take

// A pair of ranks in a 32-bit lane for bf16, one rank for float.
template <typename T>
struct Shrunk;
template <>
struct Shrunk<float> {
    using type = float;
    static constexpr int RANKS = 1;
    static floats spread(float value) { return splat(value); }
};
template <>
struct Shrunk<bf16> {
    using type = uint32_t;
    static constexpr int RANKS = 2;
    static words spread(uint32_t value) { return words{} + value; }
};

template <typename T>
int64_t width(const Pair& pair) {
    return (pair.rank + Shrunk<T>::RANKS - 1) / Shrunk<T>::RANKS;
}

inline void put(float* row, int rank, float value) { row[rank] = value; }
inline void put(uint32_t* row, int rank, float value) { ((bf16*)row)[rank] = round_bf16(value); }

// shrunk[t, r] = scale · Σ input[t, k] · a[r, k] for T tokens and R ranks.
template <typename T, int T_COUNT, int R_COUNT>
void shrink_tile(const T* input, int64_t stride, const T* a, int64_t features, float scale,
                 typename Shrunk<T>::type* shrunk, int64_t shrunk_stride, int rank, const T* next) {
    constexpr int STEP = Packed<T>::STEP;
    floats sums[16] = {};
    int64_t k = 0;
    for (; k + STEP <= features; k += STEP) {
        if (next)
            for (int r = 0; r < R_COUNT; r++) __builtin_prefetch(next + r * features + k, 0, 2);
        typename Packed<T>::type x[T_COUNT];
        for (int t = 0; t < T_COUNT; t++) x[t] = load_packed(input + t * stride + k);
        for (int r = 0; r < R_COUNT; r++) {
            auto row = load_packed(a + r * features + k);
            for (int t = 0; t < T_COUNT; t++) sums[t * R_COUNT + r] = dot(sums[t * R_COUNT + r], x[t], row);
        }
    }
    if (k < features)
        for (int r = 0; r < R_COUNT; r++)
            for (int t = 0; t < T_COUNT; t++)
                sums[t * R_COUNT + r] = dot(sums[t * R_COUNT + r], load_tail(input + t * stride + k, features - k),
                                            load_tail(a + r * features + k, features - k));
    floats totals = sum_each(sums);
    for (int t = 0; t < T_COUNT; t++)
        for (int r = 0; r < R_COUNT; r++) put(shrunk + t * shrunk_stride, rank + r, scale * totals[t * R_COUNT + r]);
}

template <typename T>
struct Piece {  // of the shrink
    const T* input;
    const T* a;
    typename Shrunk<T>::type* shrunk;
    int64_t shrunk_stride;
    float scale;
    int tokens, rank, ranks;
};

// A piece by the widest tiles that fit; the first pass over A asks for that of the next piece.
template <typename T>
void shrink_piece(const Piece<T>& piece, int64_t stride, int64_t features, const T* next) {
    for (int t = 0; t < piece.tokens;) {
        const bool tile = piece.tokens - t >= TOKENS;
        const T* input = piece.input + t * stride;
        auto* shrunk = piece.shrunk + t * piece.shrunk_stride;
        for (int r = 0; r < piece.ranks;) {
            const int left = piece.ranks - r, rank = piece.rank + r;
            const T* a = piece.a + r * features;
            const T* ahead = next && t == 0 ? next + r * features : nullptr;
            auto with = [&](auto kernel, int ranks) {
                kernel(input, stride, a, features, piece.scale, shrunk, piece.shrunk_stride, rank, ahead);
                r += ranks;
            };
            if (tile && left >= RANKS)
                with(shrink_tile<T, TOKENS, RANKS>, RANKS);
            else if (tile)
                with(shrink_tile<T, TOKENS, 1>, 1);
            else if (left >= STREAM_RANKS)
                with(shrink_tile<T, 1, STREAM_RANKS>, STREAM_RANKS);
            else
                with(shrink_tile<T, 1, 1>, 1);
        }
        t += tile ? TOKENS : 1;
    }
}

// output[t, c] += Σ shrunk[t, r] · b[r, c] for T_COUNT tokens and one strip.
template <typename T, int T_COUNT>
void expand_tile(const typename Shrunk<T>::type* shrunk, int64_t ranks, const T* b, T* output, int64_t stride,
                 int64_t columns, const T* next) {
    constexpr int VECTOR = LANES * Shrunk<T>::RANKS;  // elements
    floats sums[T_COUNT][STRIP_VECTORS] = {};
    for (int64_t r = 0; r < ranks; r++) {
        typename Packed<T>::type row[STRIP_VECTORS];
        for (int c = 0; c < STRIP_VECTORS; c++) {
            if (next) __builtin_prefetch(next + (r * STRIP_VECTORS + c) * VECTOR, 0, 2);
            row[c] = load_packed(b + (r * STRIP_VECTORS + c) * VECTOR);
        }
        for (int t = 0; t < T_COUNT; t++) {
            auto value = Shrunk<T>::spread(shrunk[t * ranks + r]);
            for (int c = 0; c < STRIP_VECTORS; c++) sums[t][c] = dot(sums[t][c], value, row[c]);
        }
    }
    for (int t = 0; t < T_COUNT; t++)
        for (int c = 0; c < STRIP_VECTORS; c++) {
            T* at = output + t * stride + c * LANES;
            if ((c + 1) * LANES <= columns)
                store(at, load(at) + sums[t][c]);
            else
                for (int64_t i = 0; i < columns - c * LANES; i++) store_one(at + i, to_float(at[i]) + sums[t][c][i]);
        }
}

template <typename T>
void expand_strip(const typename Shrunk<T>::type* shrunk, int64_t ranks, const T* b, int tokens, T* output, int64_t stride,
            int64_t columns, const T* next) {
    int t = 0;
    for (; t + TOKENS <= tokens; t += TOKENS)
        expand_tile<T, TOKENS>(shrunk + t * ranks, ranks, b, output + t * stride, stride, columns, t ? nullptr : next);
    for (; t < tokens; t++)
        expand_tile<T, 1>(shrunk + t * ranks, ranks, b, output + t * stride, stride, columns, t ? nullptr : next);
}

template <typename T>
struct Strips {  // of the expand: those of one pair that a thread has
    const typename Shrunk<T>::type* shrunk;
    int64_t ranks;
    T* output;
    int tokens;
    int64_t first, last, columns;
};

// What one thread does for the rows [from, to) of a group: collected first, so that it knows what comes next.
template <typename T>
class LoraShare {
  public:
    using S = typename Shrunk<T>::type;

    // `shrunk` is moved past what these rows take; it is the same in all threads.
    void collect(const T* input, int64_t input_stride, T* output, int64_t output_stride, int64_t features,
                 const Segment* segments, int64_t count, int64_t group, int64_t members, int64_t from, int64_t to,
                 S*& shrunk, int thread, int team) {
        pieces.clear(), strips.clear(), order.clear();
        int64_t turn = 0;
        for (int64_t s = 0; s < count; s++) {
            const int64_t start = std::max<int64_t>(segments[s].start, from);
            const int tokens = int(std::min<int64_t>(segments[s].stop, to) - start);
            if (tokens <= 0) continue;
            for (int64_t m = 0; m < members; m++) {
                const Pair& pair = segments[s].pairs[group * members + m];
                if (!pair.rank) continue;
                const int64_t ranks = width<T>(pair);
                for (int t = 0; t < tokens; t += BAND)
                    for (int r = 0; r < pair.rank; r += STREAM_RANKS)
                        if (turn++ % team == thread)
                            pieces.push_back({input + (start + t) * input_stride, (const T*)pair.a + r * features,
                                              shrunk + t * ranks, ranks, segments[s].weight * pair.scaling,
                                              std::min(BAND, tokens - t), r, std::min(STREAM_RANKS, pair.rank - r)});
                // Each thread has its columns: tokens of several segments add up in the order of the segments.
                const int64_t all = (pair.columns + STRIP - 1) / STRIP;
                const int64_t first = all * thread / team, last = all * (thread + 1) / team;
                for (int t = 0; t < tokens && first < last; t += BAND) {
                    strips.push_back({shrunk + t * ranks, ranks, output + (start + t) * output_stride + pair.column,
                                      std::min(BAND, tokens - t), first, last, pair.columns});
                    for (int64_t c = first; c < last; c++)
                        order.push_back((const T*)pair.b + c * ranks * STRIP * Shrunk<T>::RANKS);
                }
                shrunk += tokens * ranks;
            }
        }
    }

    void shrink(int64_t input_stride, int64_t features) const {
        for (size_t i = 0; i < pieces.size(); i++) {
            const Piece<T>& piece = pieces[i];
            shrink_piece<T>(piece, input_stride, features, i + 1 < pieces.size() ? pieces[i + 1].a : nullptr);
            const int end = piece.rank + piece.ranks;
            if (Shrunk<T>::RANKS == 2 && end % 2)  // only the last piece of a pair can end so
                for (int t = 0; t < piece.tokens; t++) put(piece.shrunk + t * piece.shrunk_stride, end, 0);
        }
    }

    // After all threads have shrunk, and all of `output` is there.
    void expand(int64_t output_stride) const {
        size_t at = 0;
        for (const Strips<T>& strip : strips)
            for (int64_t c = strip.first; c < strip.last; c++, at++)
                expand_strip<T>(strip.shrunk, strip.ranks, order[at], strip.tokens, strip.output + c * STRIP,
                                output_stride, strip.columns - c * STRIP,
                                at + AHEAD < order.size() ? order[at + AHEAD] : nullptr);
    }

  private:
    std::vector<Piece<T>> pieces;
    std::vector<Strips<T>> strips;
    std::vector<const T*> order;  // of the strips' weights
};

}  // namespace
