// What decoding on a CPU spends its time on: linear layers of a few rows, and attention of one new
// position of each row to its cache. decoding_kernels.py compiles and calls this file.
//
// A few rows do not keep the arithmetic busy, so the time is that of reading the weights. They are
// read once, from the first byte to the last, and quantised ones become floats in registers.
//
// Each row of a result depends on that row of the input alone, to the last bit: its sums are made in
// the same order whatever the number of rows. A text then does not depend on its neighbours.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// ---- vectors of floats ----

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));

constexpr int GROUP = 32;               // numbers of an output that share a scale
constexpr int VECTORS = GROUP / LANES;  // of a group

inline Vector load(const float* numbers) {
    Vector result;
    memcpy(&result, numbers, sizeof result);
    return result;
}

inline void store(float* numbers, Vector vector) {
    memcpy(numbers, &vector, sizeof vector);
}

inline float sum(Vector vector) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += vector[lane];
    return total;
}

// GCC converts small integers to floats one by one, unless it is told the instructions.

inline Vector from_int8s(const int8_t* numbers) {
#if defined(__AVX512F__)
    __m128i bytes = _mm_loadu_si128((const __m128i*)numbers);
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64((const __m128i*)numbers);
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
    Vector result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = numbers[lane];
    return result;
#endif
}

// The 4 bits of each word from `shift` on, minus 8, times scale, plus zero.
inline Vector from_nibbles(const uint32_t* words, int shift, Vector scale, Vector zero) {
#if defined(__AVX512F__)
    // The instruction that looks numbers up in a table of 16 reads no more than the last 4 bits.
    const Vector numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    __m512i places = _mm512_srli_epi32(_mm512_loadu_si512(words), shift);
    return (Vector)_mm512_permutexvar_ps(places, (__m512)(numbers * scale + zero));
#elif defined(__AVX2__)
    __m256i numbers = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i*)words), shift);
    numbers = _mm256_and_si256(numbers, _mm256_set1_epi32(15));
    return (Vector)_mm256_cvtepi32_ps(numbers) * scale + (zero - 8 * scale);
#else
    Vector result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = float((words[lane] >> shift) & 15) - 8;
    return result * scale + zero;
#endif
}

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

// How many outputs are computed together: each number of x is then loaded once for all of them, and
// all sums fit into the registers.
template <int ROWS>
constexpr int outputs_at_once() {
    constexpr int registers = LANES == 16 ? 32 : 16;
    if (ROWS * 4 <= registers / 2) return 4;
    if (ROWS * 2 <= registers / 2) return 2;
    return 1;
}

template <class Weights, int ROWS>
void multiply_tile(const Weights& weights, const float* x, const float* bias, float* y,
                   int64_t inputs, int64_t outputs, int64_t tile) {
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
            int64_t inputs, int64_t outputs, int threads) {
    constexpr int MOST = 8;  // rows that are computed together
    const int64_t tiles = (outputs + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t tile = 0; tile < tiles; tile++) {
        for (int64_t row = 0; row < rows; row += MOST) {
            auto multiply_rows = multiply_tile<Weights, MOST>;
            switch (rows - row) {
                case 1: multiply_rows = multiply_tile<Weights, 1>; break;
                case 2: multiply_rows = multiply_tile<Weights, 2>; break;
                case 3: multiply_rows = multiply_tile<Weights, 3>; break;
                case 4: multiply_rows = multiply_tile<Weights, 4>; break;
                case 5: multiply_rows = multiply_tile<Weights, 5>; break;
                case 6: multiply_rows = multiply_tile<Weights, 6>; break;
                case 7: multiply_rows = multiply_tile<Weights, 7>; break;
            }
            multiply_rows(weights, x + row * inputs, bias, y + row * outputs, inputs, outputs,
                          tile);
        }
    }
}

// The floats (count, inputs) of these outputs, or of all if there is no list.
template <class Weights>
void dequantise(const Weights& weights, const int64_t* listed, float* floats, int64_t count,
                int64_t inputs, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        const int64_t output = listed ? listed[i] : i;
        for (int64_t group = 0; group < inputs / GROUP; group++) {
            Vector numbers[VECTORS];
            weights.read(output / TILE, output % TILE, group, numbers);
            for (int v = 0; v < VECTORS; v++) {
                store(floats + i * inputs + group * GROUP + v * LANES, numbers[v]);
            }
        }
    }
}

// ---- attention ----

inline float dot(const float* a, const float* b, int64_t length) {
    Vector total = {};
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) total += load(a + i) * load(b + i);
    float result = sum(total);
    for (; i < length; i++) result += a[i] * b[i];
    return result;
}

// total += weight * numbers
inline void add_scaled(float* total, float weight, const float* numbers, int64_t length) {
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
        store(total + i, load(total + i) + weight * load(numbers + i));
    }
    for (; i < length; i++) total[i] += weight * numbers[i];
}

// Turns scores into the weights of a softmax.
inline void softmax(std::vector<float>& scores) {
    float highest = *std::max_element(scores.begin(), scores.end());
    float total = 0;
    for (float& score : scores) {
        score = std::exp(score - highest);
        total += score;
    }
    for (float& score : scores) score /= total;
}

}  // namespace

extern "C" {

void linear_int8(const float* x, const uint8_t* tiles, const float* bias, float* y, int64_t rows,
                 int64_t inputs, int64_t outputs, int threads) {
    linear(Int8{tiles, inputs / GROUP}, x, bias, y, rows, inputs, outputs, threads);
}

void linear_int4(const float* x, const uint8_t* tiles, const float* bias, float* y, int64_t rows,
                 int64_t inputs, int64_t outputs, int threads) {
    linear(Int4{tiles, inputs / GROUP}, x, bias, y, rows, inputs, outputs, threads);
}

void dequantise_int8(const uint8_t* tiles, const int64_t* listed, float* floats, int64_t count,
                     int64_t inputs, int threads) {
    dequantise(Int8{tiles, inputs / GROUP}, listed, floats, count, inputs, threads);
}

void dequantise_int4(const uint8_t* tiles, const int64_t* listed, float* floats, int64_t count,
                     int64_t inputs, int threads) {
    dequantise(Int4{tiles, inputs / GROUP}, listed, floats, count, inputs, threads);
}

// Attention of one new position of each row to its own cache, which first gets its key and value.
//
// q (rows, heads, size), k and v (rows, kv_heads, size): heads lie together, rows are
// q_stride, k_stride and v_stride floats apart.
// keys, values: (slots, room, kv_heads, size). slots, positions: of each row.
// slopes: ALiBi's, of each head, or nullptr. y: (rows, heads, size).
void decode_attention(const float* q, int64_t q_stride, const float* k, int64_t k_stride,
                      const float* v, int64_t v_stride, float* keys, float* values,
                      const int64_t* slots, const int64_t* positions, const float* slopes, float* y,
                      int64_t rows, int64_t heads, int64_t kv_heads, int64_t size, int64_t room,
                      int threads) {
    const int64_t shared_by = heads / kv_heads;  // queries of a head of keys
    const float scale = 1 / std::sqrt(float(size));
    const int64_t position_stride = kv_heads * size;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < rows * kv_heads; task++) {
        const int64_t row = task / kv_heads;
        const int64_t kv_head = task % kv_heads;
        const int64_t position = positions[row];
        const int64_t begin = slots[row] * room * position_stride + kv_head * size;
        float* row_keys = keys + begin;
        float* row_values = values + begin;
        memcpy(row_keys + position * position_stride, k + row * k_stride + kv_head * size,
               size * sizeof(float));
        memcpy(row_values + position * position_stride, v + row * v_stride + kv_head * size,
               size * sizeof(float));

        std::vector<float> scores(position + 1);
        for (int64_t head = kv_head * shared_by; head < (kv_head + 1) * shared_by; head++) {
            const float* query = q + row * q_stride + head * size;
            for (int64_t t = 0; t <= position; t++) {
                scores[t] = dot(query, row_keys + t * position_stride, size) * scale;
                if (slopes) scores[t] -= slopes[head] * float(position - t);
            }
            softmax(scores);
            float* result = y + (row * heads + head) * size;
            std::fill(result, result + size, 0.0f);
            for (int64_t t = 0; t <= position; t++) {
                add_scaled(result, scores[t], row_values + t * position_stride, size);
            }
        }
    }
}

}  // extern "C"
