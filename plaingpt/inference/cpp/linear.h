// Linear layers of a few rows.
//
// A few rows do not keep the arithmetic busy, so the time is that of reading the weights. They are
// read once, from the first byte to the last, and quantised ones become floats in registers.
//
// Each row of a result depends on that row of the input alone, to the last bit: its sums are made
// in the same order whatever the number of rows. A text then does not depend on its neighbours.
#pragma once
#include <type_traits>
#include <vector>
#include "thread_pool.h"
#include "vectors.h"

// ---- weights ----

constexpr int TILE = 4;  // outputs of a matrix that lie side by side

// Matrices are cut into tiles of TILE outputs. A tile holds one group of all its outputs after the
// other, each with its scales (bfloat16) before its numbers, so that it is read in one stream.
// Each kind of weights knows the floats of a group of one output of a tile, and how to multiply it.

struct Int8 {
    typedef FastMath Math;
    static constexpr bool SIDE_BY_SIDE = true;  // the outputs of a tile
    const uint8_t* tiles;
    int64_t groups;  // of an output
    static constexpr int BYTES = TILE * (2 + GROUP);  // a group of all outputs of a tile

    void read_floats(int64_t tile, int output, int64_t group, Vector* floats) const {
        const uint8_t* begin = tiles + (tile * groups + group) * BYTES;
        uint16_t bits;
        memcpy(&bits, begin + 2 * output, sizeof bits);
        Vector scale = (Vector)((Words{} + bits) << 16);
        const int8_t* numbers = (const int8_t*)begin + 2 * TILE + output * GROUP;
        for (int v = 0; v < VECTORS; v++) {
            floats[v] = from_int8s(numbers + v * LANES) * scale;
        }
    }

    Math::Group read(int64_t tile, int output, int64_t group) const {
        Vector floats[VECTORS];
        read_floats(tile, output, group, floats);
        return Math::to_group(floats);
    }
};

// A number from 0 to 15 stands for (number - 8) * scale + zero. The numbers of a tile's group are
// in GROUP words of 16 bits: number i of an output is in word i, in the 4 bits from 4 output on.

struct Int4 {
    typedef FastMath Math;
    static constexpr bool SIDE_BY_SIDE = true;
    const uint8_t* tiles;
    int64_t groups;
    static constexpr int BYTES = TILE * 4 + GROUP * 2;

    // Reads a group up to its words, which are returned.
    const uint16_t* begin(int64_t tile, int output, int64_t group, Vector* scale,
                          Vector* zero) const {
        const uint8_t* begin = tiles + (tile * groups + group) * BYTES;
        uint32_t both;  // the scale in the lower half, the zero in the upper one
        memcpy(&both, begin + 4 * output, sizeof both);
        Words repeated = Words{} + both;
        *scale = (Vector)(repeated << 16);
        *zero = (Vector)(repeated & 0xffff0000);
        return (const uint16_t*)(begin + 4 * TILE);
    }

    void read_floats(int64_t tile, int output, int64_t group, Vector* floats) const {
        Vector scale, zero;
        const uint16_t* words = begin(tile, output, group, &scale, &zero);
        for (int v = 0; v < VECTORS; v++) {
            floats[v] = from_nibbles(words + v * LANES, 4 * output, scale, zero);
        }
    }

    Math::Group read(int64_t tile, int output, int64_t group) const {
        Vector scale, zero;
        const uint16_t* words = begin(tile, output, group, &scale, &zero);
        return Math::group_from_nibbles(words, 4 * output, scale, zero);
    }
};

// Matrices that are not quantised lie as torch has them, (outputs, inputs). The last tile may end
// beyond the last output, which is then read again.

template <class Number, class Kind>
struct Plain {
    typedef Kind Math;
    static constexpr bool SIDE_BY_SIDE = false;
    const Number* numbers;
    int64_t inputs;
    int64_t outputs;

    typename Math::Group read(int64_t tile, int output, int64_t group) const {
        const int64_t row = std::min(tile * TILE + output, outputs - 1);
        return Math::load_weights(numbers + row * inputs + group * GROUP);
    }
};

typedef Plain<float, FloatMath> Float32;
typedef Plain<uint16_t, FastMath> BFloat16;

// ---- linear layers ----

// A number of x, as these weights are multiplied by it.
template <class Weights>
using Input = typename Weights::Math::Input;

// y[row][output] for ROWS rows of x and OUTPUTS outputs of a tile from `first` on.
template <class Weights, int ROWS, int OUTPUTS>
inline void multiply(const Weights& weights, const Input<Weights>* x, const float* bias, float* y,
                     int64_t inputs, int64_t outputs, int64_t tile, int first) {
    typedef typename Weights::Math Math;
    Vector sums[OUTPUTS][ROWS];
#pragma GCC unroll 16
    for (int o = 0; o < OUTPUTS; o++) {
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) sums[o][row] = Vector{};
    }
    for (int64_t group = 0; group < inputs / GROUP; group++) {
        typename Math::Group read[OUTPUTS];
#pragma GCC unroll 16
        for (int o = 0; o < OUTPUTS; o++) read[o] = weights.read(tile, first + o, group);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            const auto numbers = Math::load_group(x + row * inputs + group * GROUP);
#pragma GCC unroll 16
            for (int o = 0; o < OUTPUTS; o++) {
                sums[o][row] = Math::add_products(sums[o][row], read[o], numbers);
            }
        }
    }
#pragma GCC unroll 16
    for (int o = 0; o < OUTPUTS; o++) {
        int64_t output = tile * TILE + first + o;
        if (output >= outputs) return;  // the last tile may have rows that only fill it
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            float added = bias ? bias[output] : 0.0f;
            y[row * outputs + output] = sum(sums[o][row]) + added;
        }
    }
}

// How many outputs are computed together: each number of x is then loaded once for all of them.
template <class Weights, int ROWS>
constexpr int outputs_at_once() {
    typedef typename Weights::Math Math;
    if (ROWS == 1 && !Weights::SIDE_BY_SIDE) return 1;  // reads them in one stream
    if (ROWS * 4 <= Math::MOST_SUMS) return 4;
    if (ROWS * 2 <= Math::MOST_SUMS) return 2;
    return 1;
}

// y[row][output] for all outputs of a tile, and `rows` rows of x, at most ROWS.
template <class Weights, int ROWS>
void multiply_tile(const Weights& weights, const Input<Weights>* x, const float* bias, float* y,
                   int64_t rows, int64_t inputs, int64_t outputs, int64_t tile) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            multiply_tile<Weights, ROWS - 1>(weights, x, bias, y, rows, inputs, outputs, tile);
            return;
        }
    }
    constexpr int AT_ONCE = outputs_at_once<Weights, ROWS>();
#pragma GCC unroll 4
    for (int first = 0; first < TILE; first += AT_ONCE) {
        multiply<Weights, ROWS, AT_ONCE>(weights, x, bias, y, inputs, outputs, tile, first);
    }
}

// x (rows, inputs) times the transposed weights (outputs, inputs), plus the bias (outputs) or
// nullptr; y (rows, outputs).
template <class Weights>
void multiply_all(const Weights& weights, const Input<Weights>* x, const float* bias, float* y,
                  int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
    const int64_t tiles = (outputs + TILE - 1) / TILE;
    each_of(tiles, threads, [&](int64_t tile) {
        constexpr int AT_ONCE = Weights::Math::MOST_ROWS;
        for (int64_t row = 0; row < rows; row += AT_ONCE) {
            multiply_tile<Weights, AT_ONCE>(weights, x + row * inputs, bias, y + row * outputs,
                                            rows - row, inputs, outputs, tile);
        }
    });
}

// The same for x in floats.
template <class Weights>
void linear(const Weights& weights, const float* x, const float* bias, float* y, int64_t rows,
            int64_t inputs, int64_t outputs, int64_t threads) {
    typedef typename Weights::Math Math;
    if constexpr (std::is_same<Input<Weights>, float>::value) {
        multiply_all(weights, x, bias, y, rows, inputs, outputs, threads);
    } else {
        std::vector<uint16_t> rounded(rows * inputs);
        each_of(rows, threads, [&](int64_t row) {
            for (int64_t i = row * inputs; i < (row + 1) * inputs; i += GROUP) {
                const Vector floats[] = {load(x + i), load(x + i + LANES)};
                const auto group = Math::to_group(floats);
                memcpy(&rounded[i], &group, sizeof group);
            }
        });
        multiply_all(weights, rounded.data(), bias, y, rows, inputs, outputs, threads);
    }
}

// The floats (count, inputs) of these outputs, or of all if there is no list.
template <class Weights>
void dequantise(const Weights& weights, const int64_t* listed, float* floats, int64_t count,
                int64_t inputs, int64_t threads) {
    each_of(count, threads, [&](int64_t i) {
        const int64_t output = listed ? listed[i] : i;
        for (int64_t group = 0; group < inputs / GROUP; group++) {
            Vector numbers[VECTORS];
            weights.read_floats(output / TILE, output % TILE, group, numbers);
            for (int v = 0; v < VECTORS; v++) {
                store(floats + i * inputs + group * GROUP + v * LANES, numbers[v]);
            }
        }
    });
}
