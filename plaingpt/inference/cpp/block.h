// A block of a GPT that decodes: one new position of each row, from its inputs to its outputs.
#pragma once
#include <vector>
#include "attention.h"
#include "layer.h"

// decoding_kernels.py has the same fields.
struct Block {
    // These change from call to call.
    const float* x;            // (rows, channels)
    float* y;                  // the same
    int64_t rows;
    int64_t threads;
    float* keys;               // these six as in Attention
    float* values;
    const int64_t* slots;
    const int64_t* positions;
    const float* slopes;
    int64_t room;
    // These do not.
    const Layer* make_qkv;     // the heads of queries, keys and values, in this order
    const Layer* mix_heads;
    const Layer* widen;        // and narrow: the MLP
    const Layer* narrow;
    int64_t heads;
    int64_t kv_heads;
    int64_t size;              // of a head
};

// A layer of this block, for these inputs.
inline void run_layer_of(const Block& block, const Layer* which, const float* x, float* y,
                         const float* residual = nullptr) {
    Layer layer = *which;
    layer.x = x;
    layer.residual = residual;
    layer.y = y;
    layer.rows = block.rows;
    layer.threads = block.threads;
    run(layer);
}

inline void run(const Block& block) {
    const int64_t rows = block.rows;
    const int64_t width = block.heads * block.size;  // of all queries
    const int64_t kv_width = block.kv_heads * block.size;
    const int64_t stride = width + 2 * kv_width;
    std::vector<float> qkv(rows * stride);
    run_layer_of(block, block.make_qkv, block.x, qkv.data());

    const float* q = qkv.data();
    const float* k = q + width;
    const float* v = k + kv_width;
    std::vector<float> mixed(rows * width);
    attend_all({q, stride, k, stride, v, stride, block.keys, block.values, block.slots,
                block.positions, block.slopes, mixed.data(), rows, block.heads, block.kv_heads,
                block.size, block.room, block.threads});
    std::vector<float> x(rows * block.mix_heads->outputs);
    run_layer_of(block, block.mix_heads, mixed.data(), x.data(), block.x);

    std::vector<float> wide(rows * block.narrow->inputs);
    run_layer_of(block, block.widen, x.data(), wide.data());
    run_layer_of(block, block.narrow, wide.data(), block.y, x.data());
}
