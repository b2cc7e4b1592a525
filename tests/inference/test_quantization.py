import pytest
import torch
from conftest import tiny_gpt, tiny_ids

from plaingpt.inference import decoding_kernels, quantization
from plaingpt.inference.quantization import (QuantizedLinear, place_to_generate, quantize_for_cpu,
                                             weight_bytes)
from plaingpt.inference.quantized_weights import TorchMatrix
from plaingpt.system.messages import UserError

CPU = torch.device('cpu')
WIDE = dict(n_embd=64, vocab_size=65)  # layers of a multiple of 32 channels
ARCHITECTURES = {
    'tied': dict(),
    'untied': dict(tied=False),
    'biases, swiglu': dict(bias=True, mlp='swiglu', mlp_width=96),
    'rope, grouped heads': dict(position='rope', n_head=4, n_kv_head=2),
}


@pytest.fixture(params=['C++', 'torch'])
def products(request, monkeypatch):
    """Each of the two ways to multiply."""
    if request.param == 'torch':
        monkeypatch.setattr(decoding_kernels, 'library', lambda: None)
    elif decoding_kernels.library() is None:
        pytest.skip('the C++ cannot be compiled here')
    return request.param


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('kind, most', [('int8', 0.03), ('int4', 0.25)])
def test_logits_stay_close(products, architecture, kind, most):
    changes = {**WIDE, **ARCHITECTURES[architecture]}
    idx = tiny_ids(2, 9, vocab_size=65)
    expected, _ = tiny_gpt(**changes)(idx, idx)
    gpt = tiny_gpt(**changes)
    assert place_to_generate(gpt, CPU, 'auto', kind) == 'float32'
    logits, _ = gpt(idx, idx)
    assert ((logits - expected).norm() / expected.norm()).item() < most


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_logits_are_those_of_rounded_weights_and_inputs(kind):
    if decoding_kernels.library() is None:
        pytest.skip('the C++ cannot be compiled here')
    quantised = tiny_gpt(**WIDE)
    quantize_for_cpu(quantised, kind)
    plain = tiny_gpt(**WIDE)
    with torch.no_grad():
        for name, layer in quantised.named_modules():
            if isinstance(layer, QuantizedLinear):
                plain_name = name.replace('.block', '').replace('.linear', '')
                plain_layer = plain.get_submodule(plain_name)
                plain_layer.weight.copy_(layer.matrix.floats())
                plain_layer.register_forward_pre_hook(round_inputs)
    idx = tiny_ids(2, 9, vocab_size=65)
    logits, _ = quantised(idx, idx)
    expected, _ = plain(idx, idx)
    # A number between two whole ones may be rounded to the other one.
    assert torch.allclose(logits, expected, atol=0.01)
    assert ((logits - expected).abs() > 1e-4).float().mean() < 0.05


def round_inputs(layer, inputs):
    """A hook that rounds each group of 32 inputs to 255 whole numbers."""
    x, = inputs
    grouped = x.unflatten(-1, (-1, 32))
    scales = grouped.abs().amax(dim=-1, keepdim=True) / 127
    return (grouped / scales).round().mul(scales).flatten(-2)


def test_all_layers_are_quantised_and_the_tied_embedding():
    gpt = tiny_gpt(**WIDE)
    before = weight_bytes(gpt)
    quantize_for_cpu(gpt, 'int8')
    left = {name for name, parameter in gpt.named_parameters() if parameter.dim() == 2}
    assert left == {'transformer.wpe.weight'}
    if decoding_kernels.library() is not None:
        assert weight_bytes(gpt) < before / 3


def test_an_untied_embedding_stays():
    gpt = tiny_gpt(**WIDE, tied=False)
    quantize_for_cpu(gpt, 'int4')
    assert gpt.transformer.wte.weight.dtype == torch.float32


def test_layers_of_another_width_stay_and_a_warning_says_so(capsys):
    gpt = tiny_gpt(n_embd=32, mlp_width=40)
    quantize_for_cpu(gpt, 'int8')
    assert not isinstance(gpt.transformer.h[0].mlp.c_proj, QuantizedLinear)
    assert isinstance(gpt.transformer.h[0].mlp.c_fc, QuantizedLinear)
    assert '2 layers of 9 keep their precision' in capsys.readouterr().err
    gpt.generate(tiny_ids(1, 3), 3)


def test_a_model_without_a_fitting_layer_is_refused():
    with pytest.raises(UserError, match='a multiple of 32 channels'):
        quantize_for_cpu(tiny_gpt(mlp_width=40), 'int8')


def test_a_missing_library_is_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(decoding_kernels, 'library', lambda: None)
    monkeypatch.setattr(decoding_kernels, 'why_missing', lambda: 'there is no C++ compiler')
    gpt = tiny_gpt(**WIDE)
    quantize_for_cpu(gpt, 'int4')
    assert isinstance(gpt.lm_head.matrix, TorchMatrix)
    assert "there is no C++ compiler, so torch's own kernel" in capsys.readouterr().err


@pytest.mark.parametrize('device, dtype, sentence', [
    ('cpu', 'bfloat16', 'a CPU computes in float32'),
    ('cuda', 'float16', 'a GPU computes in bfloat16'),
    ('mps', 'auto', 'not on mps'),
])
def test_what_does_not_go_together(device, dtype, sentence):
    with pytest.raises(UserError, match=sentence):
        place_to_generate(tiny_gpt(**WIDE), torch.device(device), dtype, 'int8')


def test_a_gpu_without_torchao(monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install torchao'):
        quantization.check(torch.device('cuda'), 'auto', 'int4')


def test_torchao_quantises_the_layers_and_leaves_the_embedding():
    # int4 needs a GPU; int8 works on a CPU too.
    gpt = tiny_gpt(**WIDE).bfloat16()
    idx = tiny_ids(2, 9, vocab_size=65)
    expected, _ = gpt(idx, idx)
    embedding = gpt.transformer.wte.weight.clone()
    quantization._quantize_for_cuda(gpt, 'int8')
    logits, _ = gpt(idx, idx)
    assert 0 < ((logits - expected).norm() / expected.norm()).item() < 0.03
    assert torch.equal(gpt.transformer.wte.weight, embedding)
    assert type(gpt.lm_head.weight).__name__ == 'Int8Tensor'
    assert gpt.generate(idx, 3).shape == (2, 12)


def test_without_quantisation_the_precision_is_that_of_the_key():
    gpt = tiny_gpt(**WIDE)
    assert place_to_generate(gpt, CPU, 'bfloat16') == 'bfloat16'
    assert gpt.lm_head.weight.dtype == torch.bfloat16
