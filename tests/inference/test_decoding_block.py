import pytest
import torch
from conftest import tiny_gpt, tiny_ids

from plaingpt.inference import decoding_kernels
from plaingpt.inference.cache import KVCache
from plaingpt.inference.decoding_block import DecodingBlock, DecodingHead
from plaingpt.inference.decoding_kernels import BlockOfLayers, Layer
from plaingpt.inference.quantization import place_to_generate

pytestmark = pytest.mark.skipif(decoding_kernels.library() is None,
                                reason='the C++ cannot be compiled here')
CPU = torch.device('cpu')
MANY = 150  # rows, more than are rounded at once
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


KINDS = ['float32', 'bfloat16', 'int8', 'int4']


def lively(kind, **changes):
    """A GPT that decodes in C++, whose norms and biases are not 1 and 0.

    kind: 'int8' or 'int4', or the precision of matrices that are not quantised."""
    gpt = tiny_gpt(n_embd=64, vocab_size=65, **changes)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    if kind in ('int8', 'int4'):
        place_to_generate(gpt, CPU, 'auto', kind)
    else:
        place_to_generate(gpt, CPU, kind)
    return gpt


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by each Layer and each BlockOfLayers that runs."""
    found = []

    def spy_on(kind):
        run = kind.run

        def spy(this, *arguments, **options):
            found.append(this)
            return run(this, *arguments, **options)

        monkeypatch.setattr(kind, 'run', spy)

    spy_on(Layer)
    spy_on(BlockOfLayers)
    return found


def logits_of_one_position(gpt, rows):
    """Logits (rows, V) after a position with a cache of three more, which holds random numbers."""
    torch.manual_seed(5)
    cache = KVCache(gpt.config, rows, 5, torch.float32, CPU)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(MANY, *tensor.shape[1:])[:rows])
    positions = torch.full((rows, 1), 3)
    with torch.no_grad():
        logits, _ = gpt(tiny_ids(rows, 1, vocab_size=65), positions=positions,
                        caches=cache.decode_in_cpp(positions))
    return logits[:, 0]


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('rows', [1, 5])
def test_it_computes_what_the_block_does(architecture, kind, rows):
    gpt = lively(kind, **ARCHITECTURES[architecture])
    blocks = gpt.transformer.h
    assert all(isinstance(block, DecodingBlock) for block in blocks)
    logits = logits_of_one_position(gpt, rows)
    for i, block in enumerate(blocks):
        blocks[i] = block.block
    expected = logits_of_one_position(gpt, rows)
    tolerance = 0.05 if kind == 'bfloat16' else 1e-4
    assert torch.allclose(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('kind', KINDS)
def test_a_row_does_not_depend_on_its_neighbours(kind):
    gpt = lively(kind, mlp='swiglu')
    many = MANY if kind in ('int8', 'int4') else 16
    together = logits_of_one_position(gpt, many)
    for rows in (1, 2, 3, 7, 11, 13, 15):
        assert torch.equal(logits_of_one_position(gpt, rows), together[:rows])


def test_quantised_blocks_read_prompts_too(runs):
    gpt = lively('int8')
    block = gpt.transformer.h[0]
    gpt(tiny_ids(1, 12, vocab_size=65))
    assert {block.make_qkv, block.mix_heads, block.widen, block.narrow, gpt.lm_head.layer} <= set(
        runs)
    assert block.whole not in runs
    gpt.generate(tiny_ids(1, 4, vocab_size=65), 3)
    assert block.whole in runs


@pytest.mark.parametrize('kind', ['float32', 'bfloat16'])
def test_torch_reads_prompts_without_quantisation(kind, runs):
    gpt = lively(kind)
    gpt(tiny_ids(2, 12, vocab_size=65))
    assert set(runs) <= {gpt.transformer.ln_f.layer, gpt.lm_head.layer}


def test_a_block_with_a_layer_that_is_not_quantised_stays():
    gpt = lively('int8', mlp_width=40)
    assert not any(isinstance(block, DecodingBlock) for block in gpt.transformer.h)


@pytest.mark.parametrize('kind', ['float32', 'bfloat16'])
def test_texts_without_quantisation_are_those_of_torch(kind):
    changes = dict(n_embd=64, vocab_size=65, position='rope', mlp='swiglu', tied=False)
    gpt = tiny_gpt(**changes)
    place_to_generate(gpt, CPU, kind)
    assert isinstance(gpt.lm_head, DecodingHead)
    plain = tiny_gpt(**changes)
    place_to_generate(plain, CPU, kind, changing_rows=100)
    assert not isinstance(plain.transformer.h[0], DecodingBlock)
    prompt = tiny_ids(1, 5, vocab_size=65)
    length = 30 if kind == 'float32' else 1
    for options in (dict(temperature=0), dict(seeds=[3], top_k=10)):
        text = gpt.generate(prompt, length, **options)
        assert torch.equal(text, plain.generate(prompt, length, **options))


@pytest.mark.parametrize('kind', ['float32', 'bfloat16'])
def test_many_rows_without_quantisation_are_computed_by_torch(kind, runs):
    gpt = lively(kind)
    gpt.generate(tiny_ids(17, 4, vocab_size=65), 5)
    assert set(runs) == {gpt.transformer.ln_f.layer}
    gpt.generate(tiny_ids(16, 4, vocab_size=65), 5)
    assert set(runs) >= {gpt.lm_head.layer, gpt.transformer.h[0].whole}


def test_a_compiled_model_uses_torch(runs):
    gpt = lively('float32')
    prompt = tiny_ids(1, 4, vocab_size=65)
    expected = gpt.generate(prompt, 5, temperature=0)
    runs.clear()
    gpt.compile(backend='eager', dynamic=True)
    assert torch.equal(gpt.generate(prompt, 5, temperature=0), expected)
    # After the prompt, which is never read by compiled code.
    assert runs == [gpt.transformer.ln_f.layer, gpt.lm_head.layer]
