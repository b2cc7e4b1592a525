// Decoding on a CPU: the functions that decoding_kernels.py calls.
#include "attention.h"
#include "layer.h"
#include "linear.h"

extern "C" {

void run_layer(const Layer* layer) {
    run(*layer);
}

void dequantise_rows(const uint8_t* tiles, int64_t bits, const int64_t* listed, float* floats,
                     int64_t count, int64_t inputs, int64_t threads) {
    const int64_t groups = inputs / GROUP;
    if (bits == 8) {
        dequantise(Int8{tiles, groups}, listed, floats, count, inputs, threads);
    } else {
        dequantise(Int4{tiles, groups}, listed, floats, count, inputs, threads);
    }
}

void attend(const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,
            int64_t v_stride, float* keys, float* values, const int64_t* slots,
            const int64_t* positions, const float* slopes, float* y, int64_t rows, int64_t heads,
            int64_t kv_heads, int64_t size, int64_t room, int64_t threads) {
    decode_attention(q, q_stride, k, k_stride, v, v_stride, keys, values, slots, positions, slopes,
                     y, rows, heads, kv_heads, size, room, threads);
}

}  // extern "C"
