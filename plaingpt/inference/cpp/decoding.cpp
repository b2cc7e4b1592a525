// Decoding on a CPU: the functions that decoding_kernels.py calls.
#include "attention.h"
#include "block.h"
#include "layer.h"
#include "quantized.h"
#include "top_k.h"

extern "C" {

void run_layer(const Layer* layer) {
    run(*layer);
}

void run_block(const Block* block) {
    run(*block);
}

void dequantise_rows(const uint8_t* tiles, int64_t bits, const int64_t* listed, float* floats,
                     int64_t count, int64_t inputs, int64_t threads) {
    const int64_t groups = inputs / GROUP;
    if (bits == 8) {
        dequantise(Int8{tiles, groups}, listed, floats, count, threads);
    } else {
        dequantise(Int4{tiles, groups}, listed, floats, count, threads);
    }
}

void attend(const Attention* attention) {
    attend_all(*attention);
}

int32_t find_top_k(const float* numbers, int64_t rows, int64_t stride, int64_t size, int64_t k,
                   float* largest, int64_t* places, int64_t threads) {
    return top_k_of_rows(numbers, rows, stride, size, k, largest, places, threads);
}

}  // extern "C"
