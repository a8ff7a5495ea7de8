// Grouped LoRA products: for every segment and every module of a group of linears that share their input,
//   output[rows, columns] += weight · scaling · (input[rows] · Aᵀ) · Bᵀ
// A is [rank, in_features] as in the file. B is transposed and in strips of 64 columns, the last one filled up with zeros:
// float [strips, rank, 64]; bf16 [strips, ⌈rank / 2⌉, 64, 2], an odd rank with a row of zeros, so that one dot instruction
// takes two ranks. Every sum has one order, so a row's result does not depend on its neighbours. With many adapters the
// time is that of reading them, so each thread asks for the weights of its next item while it computes with those of this
// one.

#pragma once

#include <algorithm>
#include <vector>

#include "items.h"
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
constexpr int CHUNK = 4;  // strips of an item: memory answers after about as long as four take

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

// What a step's adapters add to the rows [from, to) of a group of linears, as a list of items: made by every thread for
// itself, and the same in all.
template <typename T>
class LoraWork {
  public:
    using S = typename Shrunk<T>::type;

    // `shrunk` is moved past what these rows take.
    void collect(const T* input, int64_t input_stride, T* output, int64_t output_stride, int64_t features,
                 const Segment* segments, int64_t count, int64_t group, int64_t members, int64_t from, int64_t to,
                 S*& shrunk, int team) {
        pieces.clear(), chunks.clear(), parts.resize(members);
        for (auto& of_member : parts) of_member.clear();
        for (int64_t s = 0; s < count; s++) {
            const int64_t start = std::max<int64_t>(segments[s].start, from);
            const int tokens = int(std::min<int64_t>(segments[s].stop, to) - start);
            if (tokens <= 0) continue;
            for (int64_t m = 0; m < members; m++) {
                const Pair& pair = segments[s].pairs[group * members + m];
                if (!pair.rank) continue;
                const int64_t ranks = width<T>(pair);
                for (int t = 0; t < tokens; t += BAND) {
                    const int band = std::min(BAND, tokens - t);
                    for (int r = 0; r < pair.rank; r += STREAM_RANKS)
                        pieces.push_back({input + (start + t) * input_stride, (const T*)pair.a + r * features,
                                          shrunk + t * ranks, ranks, segments[s].weight * pair.scaling, band, r,
                                          std::min(STREAM_RANKS, pair.rank - r)});
                    parts[m].push_back({shrunk + t * ranks, ranks, (const T*)pair.b,
                                        output + (start + t) * output_stride + pair.column, band, pair.columns});
                }
                shrunk += tokens * ranks;
            }
        }
        int64_t strips = 0;
        for (auto& of_member : parts) strips += of_member.empty() ? 0 : all_strips(of_member[0]);
        const int64_t most = std::max<int64_t>(1, std::min<int64_t>(CHUNK, strips / (2 * team)));
        for (auto& of_member : parts)
            for (int64_t c = 0, all = of_member.empty() ? 0 : all_strips(of_member[0]); c < all; c += most)
                chunks.push_back({&of_member, c, std::min(c + most, all)});
    }

    void shrink(Member& member, int64_t input_stride, int64_t features) const {
        take_each(Items(member, pieces.size()), [&](int64_t item, int64_t next) {
            const Piece<T>& piece = pieces[item];
            shrink_piece<T>(piece, input_stride, features, next < 0 ? nullptr : pieces[next].a);
            const int end = piece.rank + piece.ranks;
            if (Shrunk<T>::RANKS == 2 && end % 2)  // only the last piece of a pair can end so
                for (int t = 0; t < piece.tokens; t++) put(piece.shrunk + t * piece.shrunk_stride, end, 0);
        });
    }

    // After all threads have shrunk, and all of `output` is there. One item is what all adapters add to some columns, so
    // tokens of several segments add up in the order of the segments.
    void expand(Member& member, int64_t output_stride) const {
        take_each(Items(member, chunks.size()), [&](int64_t item, int64_t next) {
            const Chunk& chunk = chunks[item];
            const std::vector<Part>& of_member = *chunk.parts;
            for (size_t i = 0; i < of_member.size(); i++) {
                const Part& part = of_member[i];
                // The same strips of the next adapter, or of the first one in the next item.
                const bool last = i + 1 == of_member.size();
                const Part* ahead = !last ? &part + 1 : next < 0 ? nullptr : chunks[next].parts->data();
                const int64_t shift = last && next >= 0 ? chunks[next].first - chunk.first : 0;
                for (int64_t c = chunk.first; c < chunk.last; c++) {
                    const T* fetched = ahead && c + shift < all_strips(*ahead) ? strip(*ahead, c + shift) : nullptr;
                    expand_strip<T>(part.shrunk, part.ranks, strip(part, c), part.tokens, part.output + c * STRIP,
                                    output_stride, part.columns - c * STRIP, fetched);
                }
            }
        });
    }

  private:
    struct Part {  // of the expand: one pair and some tokens
        const S* shrunk;
        int64_t ranks;
        const T* b;
        T* output;
        int tokens;
        int64_t columns;
    };
    struct Chunk {  // strips of one member
        const std::vector<Part>* parts;
        int64_t first, last;
    };

    static int64_t all_strips(const Part& part) { return (part.columns + STRIP - 1) / STRIP; }
    static const T* strip(const Part& part, int64_t c) { return part.b + c * part.ranks * STRIP * Shrunk<T>::RANKS; }

    std::vector<Piece<T>> pieces;
    std::vector<std::vector<Part>> parts;  // of each member
    std::vector<Chunk> chunks;
};

}  // namespace
