// Linear layers of a few rows, with matrices in float32 or bfloat16.
//
// A few rows do not keep the arithmetic busy, so the time is that of reading the weights. They are
// read once, from the first byte to the last.
//
// Each row of a result depends on that row of the input alone, to the last bit: its sums are made
// in the same order whatever the number of rows. A text then does not depend on its neighbours.
#pragma once
#include <type_traits>
#include <vector>
#include "thread_pool.h"
#include "vectors.h"

template <int number>
using Count = std::integral_constant<int, number>;

// Calls run(Count<n>, row) for the rows from `row` on: MOST of them at a time, and then the rest.
template <int MOST, class Run>
void each_stretch(int64_t rows, const Run& run, int64_t row = 0) {
    for (; row + MOST <= rows; row += MOST) run(Count<MOST>{}, row);
    if constexpr (MOST > 1) each_stretch<MOST - 1>(rows, run, row);
}

// Matrices lie as torch has them, (outputs, inputs).
template <class Number, class Kind>
struct Plain {
    typedef Kind Math;
    const Number* numbers;
    int64_t inputs;
    int64_t outputs;

    // Outputs beyond the last one are that one again.
    typename Math::Group read(int64_t output, int64_t group) const {
        const int64_t row = std::min(output, outputs - 1);
        return Math::load_weights(numbers + row * inputs + group * GROUP);
    }
};

typedef Plain<float, FloatMath> Float32;
typedef Plain<uint16_t, FastMath> BFloat16;

// A number of x, as these weights are multiplied by it.
template <class Weights>
using Input = typename Weights::Math::Input;

// y[row][output] for ROWS rows of x and OUTPUTS outputs from `first` on.
template <class Weights, int ROWS, int OUTPUTS>
inline void multiply(const Weights& weights, const Input<Weights>* x, const float* bias, float* y,
                     int64_t first) {
    typedef typename Weights::Math Math;
    const int64_t inputs = weights.inputs;
    const int64_t outputs = weights.outputs;
    Vector sums[OUTPUTS][ROWS];
#pragma GCC unroll 16
    for (int o = 0; o < OUTPUTS; o++) {
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) sums[o][row] = Vector{};
    }
    // What comes after these outputs is fetched in the order in which it lies.
    constexpr int64_t GROUP_BYTES = OUTPUTS * GROUP * sizeof(*weights.numbers);
    const int64_t bytes = inputs / GROUP * GROUP_BYTES;
    const char* next = (const char*)(weights.numbers + first * inputs) + std::max(bytes, AHEAD_BYTES);
    for (int64_t group = 0; group < inputs / GROUP; group++) {
        fetch(next + group * GROUP_BYTES, GROUP_BYTES);
        typename Math::Group read[OUTPUTS];
#pragma GCC unroll 16
        for (int o = 0; o < OUTPUTS; o++) read[o] = weights.read(first + o, group);
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
        const int64_t output = first + o;
        if (output >= outputs) return;
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            const float added = bias ? bias[output] : 0.0f;
            y[row * outputs + output] = sum(sums[o][row]) + added;
        }
    }
}

// How many outputs are computed together: each number of x is then loaded once for all of them.
template <class Weights, int ROWS>
constexpr int outputs_together() {
    typedef typename Weights::Math Math;
    if (ROWS == 1) return 1;  // reads the weights in one stream
    if (ROWS * 4 <= Math::MOST_SUMS) return 4;
    if (ROWS * 2 <= Math::MOST_SUMS) return 2;
    return 1;
}

constexpr int TASK = 4;  // outputs

// x (rows, inputs) times the transposed weights (outputs, inputs), plus the bias (outputs) or
// nullptr; y (rows, outputs).
template <class Weights>
void multiply_all(const Weights& weights, const Input<Weights>* x, const float* bias, float* y,
                  int64_t rows, int64_t threads) {
    const int64_t tasks = (weights.outputs + TASK - 1) / TASK;
    each_of(tasks, threads, [&](int64_t task) {
        each_stretch<Weights::Math::MOST_ROWS>(rows, [&](auto count, int64_t row) {
            constexpr int TOGETHER = outputs_together<Weights, count>();
#pragma GCC unroll 4
            for (int first = 0; first < TASK; first += TOGETHER) {
                multiply<Weights, count, TOGETHER>(weights, x + row * weights.inputs, bias,
                                                   y + row * weights.outputs, task * TASK + first);
            }
        });
    });
}

// The same for x in floats.
template <class Weights>
void linear(const Weights& weights, const float* x, const float* bias, float* y, int64_t rows,
            int64_t threads) {
    typedef typename Weights::Math Math;
    if constexpr (std::is_same<Input<Weights>, float>::value) {
        multiply_all(weights, x, bias, y, rows, threads);
    } else {
        const int64_t inputs = weights.inputs;
        std::vector<uint16_t> rounded(rows * inputs);
        each_of(rows, threads, [&](int64_t row) {
            for (int64_t i = row * inputs; i < (row + 1) * inputs; i += GROUP) {
                const Vector floats[] = {load(x + i), load(x + i + LANES)};
                const auto group = Math::to_group(floats);
                memcpy(&rounded[i], &group, sizeof group);
            }
        });
        multiply_all(weights, rounded.data(), bias, y, rows, threads);
    }
}
