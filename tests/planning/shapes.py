"""GPTConfigs for the tests of the arithmetic: GPT-2's architecture, and each later option."""
import torch

from model import GPT, GPTConfig

SHAPES = [
    GPTConfig(64, 65, 4, 4, 128, 0.0, False),
    GPTConfig(48, 300, 2, 3, 96, 0.1, True),
    GPTConfig(1024, 50257, 12, 12, 768, 0.0, True),
    GPTConfig(1024, 50304, 48, 25, 1600, 0.0, False),
]
LLAMA = dict(position='rope', norm='rmsnorm', mlp='swiglu', n_kv_head=1, tied=False)
OPTIONS = [
    GPTConfig(64, 65, 4, 4, 128, 0.0, False, **LLAMA),
    GPTConfig(48, 300, 2, 6, 96, 0.0, True, **LLAMA, qk_norm=True),
    GPTConfig(48, 300, 2, 4, 96, 0.1, True, position='alibi', n_kv_head=2, mlp='relu2',
              norm='rmsnorm'),
    GPTConfig(48, 300, 2, 4, 96, bias=False, **LLAMA, qk_norm=True, qk_norm_weight=True,
              head_size=32, mlp_width=200),
    GPTConfig(48, 300, 2, 4, 96, bias=False, **LLAMA, qkv_bias=True),
    GPTConfig(48, 300, 2, 4, 96, position='none', mlp='swiglu', logit_softcap=15.0, tied=False),
]


def meta_gpt(config):
    """A GPT without memory for its weights."""
    with torch.device('meta'):
        return GPT(config)
