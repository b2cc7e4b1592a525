// Linear layers of a few rows with quantised weights.
//
// A few rows do not keep the arithmetic busy, so the time is that of reading the weights. They are
// read once, from the first byte to the last, and become floats in registers.
//
// Each row of a result depends on that row of the input alone, to the last bit: its sums are made in
// the same order whatever the number of rows. A text then does not depend on its neighbours.
#pragma once
#include "thread_pool.h"
#include "vectors.h"

// ---- weights ----

constexpr int TILE = 4;  // outputs of a matrix that lie side by side

// Matrices are cut into tiles of TILE outputs. A tile holds one group of all its outputs after the
// other, each with its scales (bfloat16) before its numbers, so that it is read in one stream.
// Each kind of weights knows how to turn a group of one output of a tile into floats.

struct Int8 {
    const uint8_t* tiles;
    int64_t groups;  // of an output
    static constexpr int BYTES = TILE * (2 + GROUP);  // a group of all outputs of a tile

    void read(int64_t tile, int output, int64_t group, Vector* floats) const {
        const uint8_t* begin = tiles + (tile * groups + group) * BYTES;
        uint16_t bits;
        memcpy(&bits, begin + 2 * output, sizeof bits);
        Vector scale = (Vector)((Words{} + bits) << 16);
        const int8_t* numbers = (const int8_t*)begin + 2 * TILE + output * GROUP;
        for (int v = 0; v < VECTORS; v++) {
            floats[v] = from_int8s(numbers + v * LANES) * scale;
        }
    }
};

// A number from 0 to 15 stands for (number - 8) * scale + zero. The numbers of a tile's group are in
// GROUP / 2 words: number i of an output is in word i % 16, in bits 8 output + 4 (i / 16) and on.

struct Int4 {
    const uint8_t* tiles;
    int64_t groups;
    static constexpr int WORDS = GROUP / 2;
    static constexpr int BYTES = TILE * 4 + WORDS * 4;

    void read(int64_t tile, int output, int64_t group, Vector* floats) const {
        const uint8_t* begin = tiles + (tile * groups + group) * BYTES;
        uint32_t both;  // the scale in the lower half, the zero in the upper one
        memcpy(&both, begin + 4 * output, sizeof both);
        Words repeated = Words{} + both;
        Vector scale = (Vector)(repeated << 16);
        Vector zero = (Vector)(repeated & 0xffff0000);
        const uint32_t* words = (const uint32_t*)(begin + 4 * TILE);
        for (int v = 0; v < VECTORS; v++) {
            int first = v * LANES;
            int shift = 8 * output + 4 * (first / WORDS);
            floats[v] = from_nibbles(words + first % WORDS, shift, scale, zero);
        }
    }
};

// Writes what an output of a tile stands for.
template <class Weights>
void write_floats(const Weights& weights, int64_t tile, int output, int64_t inputs, float* floats) {
    for (int64_t group = 0; group < inputs / GROUP; group++) {
        Vector numbers[VECTORS];
        weights.read(tile, output, group, numbers);
        for (int v = 0; v < VECTORS; v++) store(floats + group * GROUP + v * LANES, numbers[v]);
    }
}

// ---- linear layers ----

// y[row][output] for ROWS rows of x and OUTPUTS outputs of a tile from `first` on.
template <class Weights, int ROWS, int OUTPUTS>
inline void multiply(const Weights& weights, const float* x, const float* bias, float* y,
                     int64_t inputs, int64_t outputs, int64_t tile, int first) {
    Vector sums[OUTPUTS][ROWS];
#pragma GCC unroll 8
    for (int o = 0; o < OUTPUTS; o++) {
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) sums[o][row] = Vector{};
    }
    for (int64_t group = 0; group < inputs / GROUP; group++) {
        Vector floats[OUTPUTS][VECTORS];
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) weights.read(tile, first + o, group, floats[o]);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                Vector numbers = load(x + row * inputs + group * GROUP + v * LANES);
#pragma GCC unroll 8
                for (int o = 0; o < OUTPUTS; o++) sums[o][row] += floats[o][v] * numbers;
            }
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < OUTPUTS; o++) {
        int64_t output = tile * TILE + first + o;
        if (output >= outputs) return;  // the last tile may have rows that only fill it
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            float added = bias ? bias[output] : 0.0f;
            y[row * outputs + output] = sum(sums[o][row]) + added;
        }
    }
}

// How many outputs are computed together: each number of x is then loaded once for all of them. The
// sums take half of the registers at most.
template <int ROWS>
constexpr int outputs_at_once() {
    constexpr int sums = LANES == 16 ? 16 : 8;
    if (ROWS * 4 <= sums) return 4;
    if (ROWS * 2 <= sums) return 2;
    return 1;
}

// y[row][output] for all outputs of a tile, and `rows` rows of x, at most ROWS.
template <class Weights, int ROWS>
void multiply_tile(const Weights& weights, const float* x, const float* bias, float* y,
                   int64_t rows, int64_t inputs, int64_t outputs, int64_t tile) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            multiply_tile<Weights, ROWS - 1>(weights, x, bias, y, rows, inputs, outputs, tile);
            return;
        }
    }
    constexpr int AT_ONCE = outputs_at_once<ROWS>();
#pragma GCC unroll 4
    for (int first = 0; first < TILE; first += AT_ONCE) {
        multiply<Weights, ROWS, AT_ONCE>(weights, x, bias, y, inputs, outputs, tile, first);
    }
}

// x (rows, inputs) times the transposed weights (outputs, inputs), plus the bias (outputs) or
// nullptr; y (rows, outputs).
template <class Weights>
void linear(const Weights& weights, const float* x, const float* bias, float* y, int64_t rows,
            int64_t inputs, int64_t outputs, int64_t threads) {
    constexpr int MOST = 8;  // rows that are computed together
    const int64_t tiles = (outputs + TILE - 1) / TILE;
    each_of(tiles, threads, [&](int64_t tile) {
        for (int64_t row = 0; row < rows; row += MOST) {
            multiply_tile<Weights, MOST>(weights, x + row * inputs, bias, y + row * outputs,
                                         rows - row, inputs, outputs, tile);
        }
    });
}

// The floats (count, inputs) of these outputs, or of all if there is no list.
template <class Weights>
void dequantise(const Weights& weights, const int64_t* listed, float* floats, int64_t count,
                int64_t inputs, int64_t threads) {
    each_of(count, threads, [&](int64_t i) {
        const int64_t output = listed ? listed[i] : i;
        write_floats(weights, output / TILE, output % TILE, inputs, floats + i * inputs);
    });
}
