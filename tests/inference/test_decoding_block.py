import pytest
import torch
from conftest import tiny_gpt, tiny_ids

from plaingpt.inference import decoding_kernels
from plaingpt.inference.cache import KVCache
from plaingpt.inference.decoding_block import DecodingBlock
from plaingpt.inference.decoding_kernels import MOST_ROWS, Layer
from plaingpt.inference.quantization import quantize_for_cpu

pytestmark = pytest.mark.skipif(decoding_kernels.library() is None,
                                reason='the C++ cannot be compiled here')
CPU = torch.device('cpu')
ARCHITECTURES = {
    'GPT-2': dict(),
    'without biases': dict(bias=False),
    'exact GELU': dict(gelu='exact'),
    'squared ReLU': dict(mlp='relu2'),
    'SwiGLU, RMSNorm': dict(mlp='swiglu', norm='rmsnorm', norm_eps=1e-3, mlp_width=96),
    'rope, grouped heads': dict(position='rope', n_head=4, n_kv_head=2, qk_norm=True),
    'alibi, soft cap': dict(position='alibi', logit_softcap=3.0),
    'biases of queries': dict(bias=False, qkv_bias=True),
}


def lively(kind, **changes):
    """A quantised GPT whose norms and biases are not 1 and 0."""
    gpt = tiny_gpt(n_embd=64, vocab_size=65, **changes)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    quantize_for_cpu(gpt, kind)
    return gpt


def logits_of_one_position(gpt, rows):
    """Logits (rows, V) after a position with a cache of three more, which holds random numbers."""
    torch.manual_seed(5)
    cache = KVCache(gpt.config, rows, 5, torch.float32, CPU)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(MOST_ROWS, *tensor.shape[1:])[:rows])
    positions = torch.full((rows, 1), 3)
    with torch.no_grad():
        logits, _ = gpt(tiny_ids(rows, 1, vocab_size=65), positions=positions,
                        caches=cache.decode_in_cpp(positions))
    return logits[:, 0]


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('kind', ['int8', 'int4'])
@pytest.mark.parametrize('rows', [1, 5])
def test_it_computes_what_the_block_does(architecture, kind, rows):
    gpt = lively(kind, **ARCHITECTURES[architecture])
    blocks = gpt.transformer.h
    assert all(isinstance(block, DecodingBlock) for block in blocks)
    logits = logits_of_one_position(gpt, rows)
    for i, block in enumerate(blocks):
        blocks[i] = block.block
    expected = logits_of_one_position(gpt, rows)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours():
    gpt = lively('int4', mlp='swiglu')
    together = logits_of_one_position(gpt, MOST_ROWS)
    assert torch.equal(logits_of_one_position(gpt, 3), together[:3])


def test_it_is_used_to_decode_and_the_block_for_all_else(monkeypatch):
    gpt = lively('int8')
    runs = []
    run = Layer.run

    def spy(layer, *arguments, **options):
        runs.append(layer)
        return run(layer, *arguments, **options)

    monkeypatch.setattr(Layer, 'run', spy)
    block = gpt.transformer.h[0]
    fused = {block.make_qkv, block.mix_heads, block.widen, block.narrow}
    gpt(tiny_ids(1, 12, vocab_size=65))
    gpt(tiny_ids(MOST_ROWS + 1, 1, vocab_size=65))
    assert not fused & set(runs)
    gpt.generate(tiny_ids(1, 4, vocab_size=65), 3)
    assert fused <= set(runs)


def test_a_block_with_a_layer_that_is_not_quantised_stays():
    gpt = lively('int8', mlp_width=40)
    assert not any(isinstance(block, DecodingBlock) for block in gpt.transformer.h)
