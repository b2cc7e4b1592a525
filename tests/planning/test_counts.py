"""Parameters and FLOPs by part, compared with the model."""
import re

import pytest
import torch
from shapes import OPTIONS, SHAPES, meta_gpt
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from plaingpt.planning import counts


@pytest.mark.parametrize('config', SHAPES + OPTIONS, ids=str)
def test_parameters_are_those_of_the_model(config):
    gpt = meta_gpt(config)
    parts = counts.parameters(config)
    assert sum(parts.values()) == gpt.get_num_params(non_embedding=False)
    names = {
        'token embedding and head': 'wte|lm_head',
        'position embedding': 'wpe',
        'attention: query, key, value': 'attn.c_attn',
        'attention: projection': 'attn.c_proj',
        'MLP: up': 'mlp.c_fc',
        'MLP: down': 'mlp.c_proj',
        'layer norms': 'ln_|_scale',
    }
    for part, name in names.items():
        found = [p.numel() for key, p in gpt.named_parameters() if re.search(name, key)]
        assert parts[part] == sum(found), part


@pytest.mark.parametrize('tokens', [None, 20])
@pytest.mark.parametrize('config', SHAPES[:2] + OPTIONS, ids=str)
def test_flops_are_those_that_torch_counts(config, tokens):
    gpt = meta_gpt(config)
    T = tokens or config.block_size
    idx = torch.zeros(1, T, dtype=torch.int64, device='meta')
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, loss = gpt(idx, idx)
        forward = counter.get_total_flops()
        loss.backward()
    parts = counts.flops(config, tokens)
    assert sum(parts.values()) == forward
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize('config', SHAPES + OPTIONS, ids=str)
def test_flops_for_mfu_differ_only_by_biases_and_norms(config):
    gpt = meta_gpt(config)
    not_multiplied = counts.parameters(config)['layer norms']
    for name, parameter in gpt.named_parameters():
        if name.endswith('bias') and 'ln_' not in name:
            not_multiplied += parameter.numel()
    training = 3 * sum(counts.flops(config).values())
    assert training == config.block_size * (gpt.flops_per_token() - 6 * not_multiplied)
