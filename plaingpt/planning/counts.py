"""
How many parameters a GPT has, and how many FLOPs a pass through it takes, by part.

transformer_sizing.ipynb derives these formulas and compares them with the model itself.

Reference: Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B (which FLOPs count)
"""


def parameters(config):
    """Numbers of parameters of a GPT with this GPTConfig, as {part: number}.

    They add up to GPT(config).get_num_params(non_embedding=False)."""
    C = config.n_embd
    embedding = config.vocab_size * C
    positions = config.block_size * C if config.position == 'learned' else 0
    head = 0 if config.tied else embedding  # a tied head is the embedding, and counts once

    # Each output of a linear layer has a weight for each input, and perhaps a bias.
    bias = 1 if config.bias else 0
    qkv_bias = 1 if config.bias or config.qkv_bias else 0

    norm = C
    if config.norm == 'layernorm':
        norm += bias * C  # RMSNorm has no bias
    qk_norm = 2 * config.head_size if config.qk_norm_weight else 0
    return {
        'token embedding and head': embedding + head,
        'position embedding': positions,
        'attention: query, key, value': config.n_layer * qkv_width(config) * (C + qkv_bias),
        'attention: projection': config.n_layer * C * (heads_width(config) + bias),
        'MLP: up': config.n_layer * up_width(config) * (C + bias),
        'MLP: down': config.n_layer * C * (config.mlp_width + bias),
        'layer norms': (2 * config.n_layer + 1) * norm + config.n_layer * qk_norm,
    }


def head_size(config):
    """Parameters of the head, and of the token embedding."""
    return config.vocab_size * config.n_embd


def multiplied_parameters(config):
    """Parameters of all linear layers, which autocast copies; the head is one of them."""
    parts = parameters(config)
    number = sum(parts.values()) - parts['position embedding'] - parts['layer norms']
    if not config.tied:
        number -= head_size(config)  # the token embedding, which is only looked up
    return number


def flops(config, tokens=None):
    """FLOPs of a forward pass over one sequence of so many tokens, as {part: FLOPs}.

    tokens: length of the sequence; None: block_size. The backward pass takes twice as many.
    Only matrix products count, (n, m) times (m, k) with 2 n m k FLOPs, and all T x T attention
    scores count, masked or not, as in PaLM's formula."""
    C = config.n_embd
    T = config.block_size if tokens is None else tokens
    L = config.n_layer
    return {
        'attention: query, key, value': L * 2 * T * C * qkv_width(config),
        'attention: scores': L * 2 * T * T * heads_width(config),
        'attention: weighted sum': L * 2 * T * T * heads_width(config),
        'attention: projection': L * 2 * T * heads_width(config) * C,
        'MLP: up': L * 2 * T * C * up_width(config),
        'MLP: down': L * 2 * T * config.mlp_width * C,
        'head': 2 * T * C * config.vocab_size,
    }


def heads_width(config):
    """Channels of the queries of all heads; in most models as many as n_embd."""
    return config.n_head * config.head_size


def qkv_width(config):
    """Channels of queries, keys and values together; grouped heads share keys and values."""
    return (config.n_head + 2 * config.n_kv_head) * config.head_size


def up_width(config):
    """Outputs of the MLP's first layer: SwiGLU makes gates and values at once."""
    if config.mlp == 'swiglu':
        return 2 * config.mlp_width
    return config.mlp_width
