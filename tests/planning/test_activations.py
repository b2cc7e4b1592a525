"""Activations by part, compared with what autograd saves."""
import pytest
import torch
from measuring import CPU
from shapes import LLAMA

from model import GPT, GPTConfig
from plaingpt.planning.activations import Activations
from plaingpt.system.devices import place, precision


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('options', [
    {},
    LLAMA,
    LLAMA | dict(qk_norm=True),
    dict(qk_norm=True),
    dict(position='rope'),
    dict(position='rope', qk_norm=True, qk_norm_weight=True, head_size=40),
    dict(qk_norm=True, qk_norm_weight=True, qkv_bias=True),
    dict(head_size=16, mlp_width=80),
    dict(n_kv_head=1, mlp='relu2'),
    dict(position='alibi', n_kv_head=1),
], ids=str)
@pytest.mark.parametrize('T', [96, 1040])  # above 1024, bfloat16 alone does not write attention out
def test_activations_are_what_autograd_saves_to_the_byte(options, T, dropout, dtype):
    check_activations(options, T, dropout, dtype, bf16_residual=False)


@pytest.mark.parametrize('options', [{}, LLAMA], ids=str)
def test_a_bfloat16_residual_stream_is_counted_to_the_byte(options):
    check_activations(options, 96, 0.1, 'bfloat16', bf16_residual=True)


def check_activations(options, T, dropout, dtype, bf16_residual):
    # All three sequences fit into the cache, so that attention is computed in one piece.
    rows = 3
    config = GPTConfig(T, 65, 2, 2, 64, dropout, False, **options)
    gpt = place(GPT(config), CPU)
    gpt.residual_dtype = torch.bfloat16 if bf16_residual else None

    # Not counted here: weights in 16 bits, and rope's angles and ALiBi's bias, which all share.
    # Nor are the weights of queries and keys, one row a head.
    others = {(1, T, 1, config.head_size // 2), (1, 2, T, T)}
    others.add((config.n_head + config.n_kv_head, config.head_size))
    for parameter in gpt.parameters():
        others |= {parameter.shape, parameter.shape[::-1]}

    modules = ['']  # the names of those that compute now, the innermost last
    saved = {}      # by address: (module, bytes, the tensor, so that its memory is not used again)

    def enter(name):
        return lambda module, arguments: modules.append(name)

    def leave(module, arguments, output):
        modules.pop()

    def save(tensor):
        if tensor.shape not in others:
            storage = tensor.untyped_storage()
            saved.setdefault(storage.data_ptr(), (modules[-1], storage.nbytes(), tensor))
        return tensor

    for name, module in gpt.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave)
    _, autocast, _ = precision(CPU, dtype, 64)
    with autocast(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        gpt.residuals(torch.randint(65, (rows, T)), torch.arange(T))

    def saved_by(*names):
        return sum(size for module, size, _ in saved.values() if any(n in module for n in names))

    expected = Activations(config, dtype, 'cpu', bf16_residual=bf16_residual)
    tokens = rows * T
    layers = config.n_layer
    assert saved_by('.ln_1', '.ln_2') == tokens * layers * 2 * expected.norm()
    assert saved_by('.attn') == tokens * layers * expected.attention()
    assert saved_by('.mlp') == tokens * layers * expected.mlp()
