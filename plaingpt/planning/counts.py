"""
How big and how long: the arithmetic of a GPT's parameters, FLOPs and memory, and what this machine does in what time,
which plan.py and the two notebooks share. The notebooks derive it, and hold it against measurements.

References:
[1] Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B: FLOPs per token and MFU
[2] Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198, section 4
"""




def parameters(config):
    """{part: number of parameters} of a GPT with this GPTConfig; the sum is GPT(config).get_num_params(False)."""
    c, C, bias = config, config.n_embd, int(config.bias)
    up = c.mlp_width * (2 if c.mlp == 'swiglu' else 1)
    return {
        'token embedding and head': c.vocab_size * C * (1 if c.tied else 2),
        'position embedding': (c.position == 'learned') * c.block_size * C,
        'attention: query, key, value': c.n_layer * (C + 2 * c.n_kv_head * c.head_size) * (C + bias),
        'attention: projection': c.n_layer * C * (C + bias),
        'MLP: up': c.n_layer * up * (C + bias),
        'MLP: down': c.n_layer * C * (c.mlp_width + bias),
        'layer norms': (2 * c.n_layer + 1) * C * (1 + (c.norm == 'layernorm') * bias),
    }


def flops(config, tokens=None):
    """{part: FLOPs} of the forward pass over one sequence of so many tokens (block_size unless told), a product of
    (n, m) and (m, k) being 2 n m k. All T x T scores count, as in [1]; what is no matrix product does not. The backward
    pass takes twice as many."""
    c, C, T = config, config.n_embd, tokens or config.block_size
    up = c.mlp_width * (2 if c.mlp == 'swiglu' else 1)
    return {
        'attention: query, key, value': c.n_layer * 2 * T * C * (C + 2 * c.n_kv_head * c.head_size),
        'attention: scores': c.n_layer * 2 * T * T * C,
        'attention: weighted sum': c.n_layer * 2 * T * T * C,
        'attention: projection': c.n_layer * 2 * T * C * C,
        'MLP: up': c.n_layer * 2 * T * C * up,
        'MLP: down': c.n_layer * 2 * T * C * c.mlp_width,
        'head': 2 * T * C * c.vocab_size,
    }
