// Linear layers with quantised weights.
//
// The inputs are rounded as well: each GROUP of x has a scale, and whole numbers of 8 bits. The
// products of a group are summed in whole numbers, many in one instruction and all of them exactly.
// Only these sums become floats. So a row of a result depends on that row of x alone, to the last
// bit: its groups are added in the same order whatever the number of rows.
#pragma once
#include <vector>
#include "linear.h"
#include "thread_pool.h"
#include "vectors.h"

// ---- inputs ----

constexpr int QUADS = GROUP / 4;  // four numbers of one byte fill a lane

struct RoundedGroup {
    int8_t numbers[GROUP];  // -127 to 127
    int32_t offset;         // what multiply_group() begins with
    float scale;            // of an input: its number times this
    float scaled_sum;       // of all inputs
    float unused;           // so that groups lie at multiples of 16 bytes
};

// The scale of numbers that are not all finite is not finite either.
template <int middle>
inline void round_group(const float* x, RoundedGroup& group) {
    // Without their signs, floats are in the order of their bits, and NaN comes last.
    Numbers highest = {};
    for (int i = 0; i < GROUP; i += LANES) {
        const Numbers bits = (Numbers)load(x + i) & 0x7fffffff;
        highest = bits > highest ? bits : highest;
    }
    const int32_t bits = largest(highest);
    float size;
    memcpy(&size, &bits, sizeof size);
    group.scale = size / 127;
    const float factor = group.scale > 0 ? 1 / group.scale : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i += LANES) {
        const Numbers rounded = round(load(x + i) * factor);
        for (int lane = 0; lane < LANES; lane++) {
            group.numbers[i + lane] = int8_t(rounded[lane]);
            sum += rounded[lane];
        }
    }
    group.offset = -middle * sum;
    group.scaled_sum = group.scale * float(sum);
}

// ---- products of bytes ----

typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));  // four numbers in each lane

inline Bytes load_bytes(const uint8_t* bytes) {
    Bytes result;
    memcpy(&result, bytes, sizeof result);
    return result;
}

// Four numbers of x in every lane.
inline Bytes repeat(const int8_t* numbers) {
    uint32_t four;
    memcpy(&four, numbers, sizeof four);
    return (Bytes)(Words{} + four);
}

// multiply_group() sums in each lane the products of its numbers in `weights`, minus `middle`, and
// those of x. The weights have QUADS vectors, with numbers from 0 to 2 * middle - 1.

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

template <int middle>
inline Numbers multiply_group(const Bytes* weights, const RoundedGroup& x) {
    Numbers sums = Numbers{} + x.offset;
#pragma GCC unroll 8
    for (int i = 0; i < QUADS; i++) {
        const Bytes numbers = repeat(x.numbers + 4 * i);
#if defined(__AVX512VNNI__)
        sums = (Numbers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights[i], (__m512i)numbers);
#else
        sums = (Numbers)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights[i],
                                                (__m256i)numbers);
#endif
    }
    return sums;
}

#elif defined(__AVX2__)

// This instruction multiplies bytes without a sign by bytes with one. Two products are summed in 16
// bits, so the first bytes may not exceed 127.
template <int middle>
inline Numbers multiply_group(const Bytes* weights, const RoundedGroup& x) {
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (middle == 8) {
        __m256i sums = _mm256_setzero_si256();  // at most 8 * 2 * 15 * 127, which is 30480
#pragma GCC unroll 8
        for (int i = 0; i < QUADS; i++) {
            const __m256i numbers = (__m256i)repeat(x.numbers + 4 * i);
            sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16((__m256i)weights[i], numbers));
        }
        return (Numbers)_mm256_madd_epi16(sums, ones) + x.offset;
    } else {
        __m256i sums = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = 0; i < QUADS; i++) {
            const __m256i numbers = (__m256i)repeat(x.numbers + 4 * i);
            const __m256i with_sign = (__m256i)(weights[i] - uint8_t(middle));
            const __m256i products = _mm256_maddubs_epi16(
                _mm256_abs_epi8(with_sign), _mm256_sign_epi8(numbers, with_sign));
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(products, ones));
        }
        return (Numbers)sums;
    }
}

#else

template <int middle>
inline Numbers multiply_group(const Bytes* weights, const RoundedGroup& x) {
    Numbers sums = {};
    for (int i = 0; i < GROUP; i++) {
        for (int lane = 0; lane < LANES; lane++) {
            const int number = weights[i / 4][4 * lane + i % 4] - middle;
            sums[lane] += number * x.numbers[i];
        }
    }
    return sums;
}

#endif

// ---- weights ----

// Matrices are cut into tiles of TILE outputs. A tile has the factors of all groups of its outputs,
// and then their numbers: of four inputs all outputs, and so on. The numbers of a group are QUADS
// times 4 * TILE bytes. A tile is computed in parts of LANES outputs.
constexpr int TILE = 16;
constexpr int PARTS = TILE / LANES;
constexpr int QUAD_BYTES = 4 * TILE;

struct Factors {
    Vector scale;
    Vector zero;
};

// A number from 1 to 255 stands for (number - 128) * scale; the scales are in bfloat16.
struct Int8 {
    static constexpr int MIDDLE = 128;
    static constexpr bool HAS_ZERO = false;
    static constexpr int FACTOR_BYTES = 2 * TILE;
    static constexpr int NUMBER_BYTES = QUADS * QUAD_BYTES;
    const uint8_t* tiles;
    int64_t groups;  // of an output

    static Factors read_factors(const uint8_t* factors, int part) {
        return {from_bfloat16s((const uint16_t*)factors + part * LANES), Vector{}};
    }

    static void read_numbers(const uint8_t* numbers, int part, Bytes* weights) {
        for (int i = 0; i < QUADS; i++) {
            weights[i] = load_bytes(numbers + i * QUAD_BYTES + part * 4 * LANES);
        }
    }
};

// A number from 0 to 15 stands for (number - 8) * scale + zero. A byte has two: the lower 4 bits
// are of the first half of the group. Factors are words of 32 bits, with the zero in the upper half.
struct Int4 {
    static constexpr int MIDDLE = 8;
    static constexpr bool HAS_ZERO = true;
    static constexpr int FACTOR_BYTES = 4 * TILE;
    static constexpr int NUMBER_BYTES = QUADS * QUAD_BYTES / 2;
    const uint8_t* tiles;
    int64_t groups;

    static Factors read_factors(const uint8_t* factors, int part) {
        Words both;
        memcpy(&both, factors + part * 4 * LANES, sizeof both);
        return {(Vector)(both << 16), (Vector)(both & 0xffff0000)};
    }

    static void read_numbers(const uint8_t* numbers, int part, Bytes* weights) {
        for (int i = 0; i < QUADS / 2; i++) {
            const Bytes both = load_bytes(numbers + i * QUAD_BYTES + part * 4 * LANES);
            weights[i] = both & 15;
            weights[i + QUADS / 2] = both >> 4;
        }
    }
};

// The factors of a tile, which its numbers follow.
template <class Weights>
inline const uint8_t* factors_of(const Weights& weights, int64_t tile) {
    const int64_t bytes = weights.groups * (Weights::FACTOR_BYTES + Weights::NUMBER_BYTES);
    return weights.tiles + tile * bytes;
}

// ---- linear layers ----

constexpr int ROWS_TOGETHER = LANES == 16 ? 12 : 4;  // with the weights, they fill the registers

// y[row][output] for ROWS rows of x and the outputs of a part of a tile.
template <class Weights, int ROWS>
void multiply_part(const Weights& weights, const RoundedGroup* x, const float* bias, float* y,
                   int64_t outputs, int64_t tile, int part) {
    const int64_t groups = weights.groups;
    const uint8_t* factors = factors_of(weights, tile);
    const uint8_t* numbers = factors + groups * Weights::FACTOR_BYTES;
    Vector sums[ROWS];
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) sums[row] = Vector{};
    for (int64_t i = 0; i < groups; i++) {
        const Factors factor = Weights::read_factors(factors + i * Weights::FACTOR_BYTES, part);
        fetch(numbers + i * Weights::NUMBER_BYTES + AHEAD_BYTES, Weights::NUMBER_BYTES);
        Bytes quads[QUADS];
        Weights::read_numbers(numbers + i * Weights::NUMBER_BYTES, part, quads);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            const RoundedGroup& group = x[row * groups + i];
            const Numbers products = multiply_group<Weights::MIDDLE>(quads, group);
            sums[row] = multiply_add(__builtin_convertvector(products, Vector),
                                     factor.scale * group.scale, sums[row]);
            if (Weights::HAS_ZERO) {
                sums[row] = multiply_add(factor.zero, Vector{} + group.scaled_sum, sums[row]);
            }
        }
    }
    const int64_t first = tile * TILE + part * LANES;
    const int64_t count = std::min<int64_t>(LANES, outputs - first);
    if (count <= 0) return;  // the last tile may have outputs that only fill it
    float added[LANES] = {};
    if (bias) memcpy(added, bias + first, count * sizeof(float));
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) {
        const Vector result = sums[row] + load(added);
        memcpy(y + row * outputs + first, &result, count * sizeof(float));
    }
}

constexpr int64_t ROWS_AT_ONCE = 128;  // whose rounded groups stay in the CPU's second cache

// x (rows, inputs) times the transposed weights (outputs, inputs), plus the bias (outputs) or
// nullptr; y (rows, outputs).
template <class Weights>
void quantized_linear(const Weights& weights, const float* x, const float* bias, float* y,
                      int64_t rows, int64_t outputs, int64_t threads) {
    const int64_t groups = weights.groups;
    const int64_t tiles = (outputs + TILE - 1) / TILE;
    std::vector<RoundedGroup> rounded(std::min(rows, ROWS_AT_ONCE) * groups);
    for (int64_t begin = 0; begin < rows; begin += ROWS_AT_ONCE) {
        const int64_t count = std::min(rows - begin, ROWS_AT_ONCE);
        each_of(count, threads, [&](int64_t row) {
            for (int64_t i = 0; i < groups; i++) {
                const float* group = x + ((begin + row) * groups + i) * GROUP;
                round_group<Weights::MIDDLE>(group, rounded[row * groups + i]);
            }
        });
        each_of(tiles, threads, [&](int64_t tile) {
            for (int part = 0; part < PARTS; part++) {
                each_stretch<ROWS_TOGETHER>(count, [&](auto together, int64_t row) {
                    multiply_part<Weights, together>(weights, &rounded[row * groups], bias,
                                                     y + (begin + row) * outputs, outputs, tile,
                                                     part);
                });
            }
        });
    }
}

// The floats (count, inputs) of these outputs, or of all if there is no list.
template <class Weights>
void dequantise(const Weights& weights, const int64_t* listed, float* floats, int64_t count,
                int64_t threads) {
    const int64_t groups = weights.groups;
    each_of(count, threads, [&](int64_t i) {
        const int64_t output = listed ? listed[i] : i;
        const int64_t tile = output / TILE;
        const int part = output % TILE / LANES;
        const int lane = output % LANES;
        const uint8_t* factors = factors_of(weights, tile);
        const uint8_t* numbers = factors + groups * Weights::FACTOR_BYTES;
        for (int64_t group = 0; group < groups; group++) {
            const Factors factor =
                Weights::read_factors(factors + group * Weights::FACTOR_BYTES, part);
            Bytes quads[QUADS];
            Weights::read_numbers(numbers + group * Weights::NUMBER_BYTES, part, quads);
            float* result = floats + (i * groups + group) * GROUP;
            for (int j = 0; j < GROUP; j++) {
                const int number = quads[j / 4][4 * lane + j % 4] - Weights::MIDDLE;
                result[j] = number * factor.scale[lane] + factor.zero[lane];
            }
        }
    });
}
