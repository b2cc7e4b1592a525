"""plaingpt/system/cpu_kernels.py: it computes what torch does, and drops out row by row."""
import math

import pytest
import torch
from conftest import tiny_gpt, tiny_ids
from torch.nn import functional as F

from plaingpt.system import cpu_kernels
from plaingpt.system.cpu_kernels import CpuKernels
from plaingpt.system.devices import place

CPU = torch.device('cpu')


def test_a_gpt_on_a_cpu_computes_with_them():
    model = place(tiny_gpt(dropout=0.5), CPU)
    kernels = model.kernels
    assert isinstance(kernels, CpuKernels)
    assert model.embedding_dropout.kernels is kernels
    assert model.lm_head.kernels is kernels
    for block in model.transformer.h:
        assert block.attn.kernels is kernels
        assert block.attn.c_attn.kernels is kernels
        assert block.attn.resid_dropout.kernels is kernels
        assert block.mlp.dropout.kernels is kernels


# ---- linear layers ----

@pytest.fixture
def onednn_kernels():
    if not cpu_kernels.has_onednn():
        pytest.skip('without oneDNN')
    kernels = CpuKernels()
    kernels.uses_onednn = True
    return kernels


@pytest.mark.parametrize('shape, width', [((2, 40, 8), 24), ((70, 24), 8), ((64, 8), 8)])
@pytest.mark.parametrize('has_bias', [False, True])
def test_a_linear_layer_by_onednn_is_torchs(onednn_kernels, shape, width, has_bias):
    torch.manual_seed(0)
    inputs = [torch.randn(shape).requires_grad_(),
              torch.randn(width, shape[-1]).requires_grad_()]
    bias = None
    if has_bias:
        bias = torch.randn(width).requires_grad_()
        inputs.append(bias)
    x, weight = inputs[:2]
    gradient = torch.randn(*shape[:-1], width)

    expected = F.linear(x, weight, bias)
    found = onednn_kernels.linear(x, weight, bias)
    assert type(found.grad_fn) is not type(expected.grad_fn)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, gradient),
                               torch.autograd.grad(expected, inputs, gradient),
                               rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_by_onednn_passes_the_gradient_on(onednn_kernels):
    x = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(24, 8)
    onednn_kernels.linear(x, weight, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(40, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype, autocasts', [(torch.bfloat16, False), (torch.float32, True)])
def test_bfloat16_is_left_to_torch(onednn_kernels, monkeypatch, dtype, autocasts):
    monkeypatch.setattr(cpu_kernels, 'OneDnnLinear', None)
    x = torch.randn(40, 8, dtype=dtype)
    weight = torch.randn(24, 8, dtype=dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocasts):
        assert torch.equal(onednn_kernels.linear(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize('cpu, capability, enabled, expected', [
    ('AMD EPYC', 'AVX512', True, True),
    ('AMD EPYC', 'AVX512', False, False),
    ('AMD EPYC', 'AVX2', True, False),
    ('Intel(R) Xeon(R) Gold', 'AVX512', True, False),
    (None, 'AVX512', True, False),
    ('AMD EPYC', 'NO AVX', True, False),
    ('Neoverse-V2', 'DEFAULT', True, False),
])
def test_onednn_is_used_on_cpus_on_which_mkl_lacks_avx512(monkeypatch, cpu, capability, enabled,
                                                          expected):
    capabilities = {} if cpu is None else {'cpu_name': cpu}
    monkeypatch.setattr(cpu_kernels, 'cpu_capabilities', lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, 'enabled', enabled)
    assert CpuKernels().uses_onednn == expected


def test_packed_weights_are_those_of_the_linear_layers_and_multiply_alike(monkeypatch):
    if not cpu_kernels.has_onednn():
        pytest.skip('without oneDNN')
    model = place(tiny_gpt(bias=True), CPU)
    kernels = model.kernels
    packed = kernels.pack(model, 3)
    assert model.lm_head.weight in packed
    assert len(packed) == 1 + 4 * model.config.n_layer

    layer = model.transformer.h[0].mlp.c_fc
    x = torch.randn(3, 1, model.config.n_embd)
    expected = F.linear(x, layer.weight, layer.bias)
    monkeypatch.setattr(F, 'linear', None)
    monkeypatch.setattr(cpu_kernels, 'OneDnnLinear', None)
    with torch.no_grad(), kernels.use_packed(packed):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert kernels.packed == {}


def test_autocast_decides_the_precision_of_packed_weights_too():
    if not cpu_kernels.has_onednn():
        pytest.skip('without oneDNN')
    model = place(tiny_gpt(), CPU)
    packed = model.kernels.pack(model, 3)
    x = torch.randn(3, 1, model.config.n_embd)
    with torch.autocast('cpu', dtype=torch.bfloat16), model.kernels.use_packed(packed):
        assert model.lm_head(x).dtype == torch.bfloat16


@pytest.mark.parametrize('rows, dtype, instructions', [
    (1, torch.float32, 'AVX512'), (3, torch.bfloat16, 'AVX512'), (3, torch.float32, 'NO AVX')])
def test_one_row_and_bfloat16_need_no_packed_weights(monkeypatch, rows, dtype, instructions):
    monkeypatch.setattr(cpu_kernels, 'instruction_set', lambda: instructions)
    model = place(tiny_gpt(), CPU, dtype)
    assert model.kernels.pack(model, rows) == {}


# ---- attention ----

@pytest.mark.parametrize('nkv', [4, 2, 1])
@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('dtype, p, tolerance', [
    (torch.float32, 1e-9, 1e-5),
    (torch.float32, 0.3, 1e-5),
    (torch.bfloat16, 0.0, 4e-2),
    (torch.bfloat16, 0.3, 4e-2),
])
def test_attention_written_out_is_torchs_own_and_its_dropout_that_of_the_formula(
        monkeypatch, dtype, p, tolerance, biased, nkv):
    B, nh, T, hs = 42, 4, 128, 8  # 32 sequences at a time, and 10
    torch.manual_seed(0)
    inputs = []
    for heads in nh, nkv, nkv:
        inputs.append(torch.randn(B, heads, T, hs, dtype=dtype).requires_grad_())
    gradient = torch.randn(B, nh, T, hs, dtype=dtype)
    kept = torch.rand(nh, T, T) >= p
    ahead = torch.full((T, T), -math.inf).triu(1)
    bias = None
    exact_bias = ahead
    if biased:
        bias = torch.randn(nh, T, T).to(dtype) + ahead.to(dtype)
        exact_bias = bias.float()

    kernels = CpuKernels()
    q, k, v = (x.float() for x in inputs)
    k = k.repeat_interleave(nh // nkv, dim=1)
    v = v.repeat_interleave(nh // nkv, dim=1)
    if p < 0.1:
        expected = F.scaled_dot_product_attention(q, k, v, exact_bias)
    else:
        scores = q @ k.transpose(2, 3) / math.sqrt(hs) + exact_bias
        expected = scores.softmax(-1) * kept / (1 - p) @ v

        def keep_mask(seed, shape, asked_p, dtype, begin=0):
            assert asked_p == p
            return kept.to(dtype).expand(shape)
        monkeypatch.setattr(kernels, 'keep_mask', keep_mask)
    expected_gradients = torch.autograd.grad(expected, inputs, gradient.float())

    monkeypatch.setattr(F, 'scaled_dot_product_attention', None)
    found = kernels.causal_attention(*inputs, p, bias, nkv < nh)
    found_gradients = torch.autograd.grad(found, inputs, gradient)
    for ours, theirs in zip([found, *found_gradients], [expected, *expected_gradients],
                            strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize('dtype, T, p, training, written_out', [
    (torch.float32, 64, 0.2, True, True),
    (torch.float32, 64, 0.0, True, False),
    (torch.bfloat16, 64, 0.0, True, True),
    (torch.bfloat16, 64, 0.0, False, False),
    (torch.bfloat16, 1024, 0.0, True, True),
    (torch.bfloat16, 1100, 0.0, True, False),
    (torch.bfloat16, 1100, 0.2, True, True),
])
def test_attention_is_written_out_where_that_is_faster(monkeypatch, dtype, T, p, training,
                                                       written_out):
    calls = []
    torchs_own = F.scaled_dot_product_attention

    def noted(*arguments, **keys):
        calls.append(1)
        return torchs_own(*arguments, **keys)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', noted)
    q = torch.randn(1, 1, T, 8, dtype=dtype)
    with torch.set_grad_enabled(training):
        CpuKernels().causal_attention(q, q, q, p)
    assert bool(calls) != written_out


# ---- dropout ----

def normalised(mask, p):
    """A mask of zeros and other values, scaled to mean 0 and variance 1."""
    return (mask.ne(0).double() - (1 - p)) / math.sqrt(p * (1 - p))


@pytest.mark.parametrize('p', [0.05, 0.2, 0.5])
def test_dropout_zeroes_each_element_by_itself_with_its_probability(p):
    torch.manual_seed(0)
    kernels = CpuKernels()
    x = torch.full((4, 250_003), 3.0)
    first_mask = kernels.dropout(x, p)
    second_mask = kernels.dropout(x, p)
    assert sorted(first_mask.unique().tolist()) == pytest.approx([0, 3 / (1 - p)])
    a = normalised(first_mask, p)
    b = normalised(second_mask, p)
    # The mean of each of these is 0 if elements are independent of each other.
    independent = [a, a * b, a[:-1] * a[1:], a[:2] * a[2:]]
    for lane in range(4):  # four elements share a draw
        independent.append(a[:, lane::4])
    for lag in range(1, 9):
        independent.append(a[:, lag:] * a[:, :-lag])
    for values in independent:
        assert abs(values.mean().item()) < 4 / math.sqrt(values.numel())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(1,), (3, 5, 67), (2, 501)])
def test_dropout_follows_torchs_seed_and_its_gradient_is_its_mask(shape, dtype):
    kernels = CpuKernels()

    def dropped(seed, x):
        torch.manual_seed(seed)
        return kernels.dropout(x, 0.25)

    x = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
    y = dropped(0, x)
    y.sum().backward()
    assert y.shape == shape
    assert y.dtype == dtype
    assert torch.equal(y, 2 * x.grad)
    assert torch.equal(dropped(0, x), y)
    if len(shape) > 1:
        assert not torch.equal(dropped(1, x), y)


@pytest.mark.parametrize('ranks', [2, 3])
def test_ranks_that_share_rows_drop_what_one_rank_drops(ranks):
    x = torch.ones(6, 5, 7)
    torch.manual_seed(0)
    whole = CpuKernels().dropout(x, 0.3)
    assert len({row.numpy().tobytes() for row in whole}) == 6  # each row has a mask of its own
    for rank in range(ranks):
        torch.manual_seed(0)
        kernels = CpuKernels()
        kernels.set_rows(rank, ranks)
        assert torch.equal(kernels.dropout(x[rank::ranks], 0.3), whole[rank::ranks])


@pytest.mark.parametrize('rows_at_once', [1, 4, 6])
@pytest.mark.parametrize('rank, ranks', [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_dropout_of_attention_depends_on_the_row_alone(monkeypatch, rank, ranks, rows_at_once):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 6, 2, 9, 8)
    torch.manual_seed(0)
    whole = CpuKernels().causal_attention(q, k, v, 0.3)
    kernels = CpuKernels()
    kernels.set_rows(rank, ranks)
    monkeypatch.setattr(cpu_kernels, 'WEIGHTS_AT_ONCE', rows_at_once * 2 * 9 * 9)
    torch.manual_seed(0)
    part = kernels.causal_attention(q[rank::ranks], k[rank::ranks], v[rank::ranks], 0.3)
    torch.testing.assert_close(part, whole[rank::ranks], rtol=1e-6, atol=1e-6)


def test_ranks_that_share_rows_compute_the_loss_and_gradients_of_one():
    x = tiny_ids(4, 16)
    y = tiny_ids(4, 16, seed=2)
    model = place(tiny_gpt(dropout=0.3), CPU).train()

    def loss_and_gradients(rank, ranks):
        torch.manual_seed(5)
        model.kernels.set_rows(rank, ranks)
        _, loss = model(x[rank::ranks], y[rank::ranks], with_logits=False)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    whole = loss_and_gradients(0, 1)
    halves = zip(loss_and_gradients(0, 2), loss_and_gradients(1, 2), strict=True)
    means = [(first + second) / 2 for first, second in halves]
    torch.testing.assert_close(means, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_dropout_and_checkpointing_give_the_same_loss_and_gradients(seed):
    model = place(tiny_gpt(dropout=0.3), CPU).train()
    x = tiny_ids(4, 16)

    def loss_and_gradients(checkpointing):
        model.checkpointing = checkpointing
        torch.manual_seed(seed)
        _, loss = model(x, x, with_logits=False)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    torch.testing.assert_close(loss_and_gradients(True), loss_and_gradients(False))


# ---- while torch.compile traces ----

def test_while_torch_compiles_they_are_torchs_own(monkeypatch):
    kernels = CpuKernels()
    assert kernels.prefers_loss_in_parts
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    monkeypatch.setattr(kernels, 'keep_mask', None)
    monkeypatch.setattr(cpu_kernels, 'OneDnnLinear', None)
    kernels.uses_onednn = True
    assert torch.equal(kernels.linear(torch.ones(40, 8), torch.ones(2, 8), None),
                       torch.full((40, 2), 8.0))
    assert not kernels.prefers_loss_in_parts
    x = torch.randn(2, 2, 9, 8)
    torch.manual_seed(0)
    expected = F.dropout(x, 0.3)
    torch.manual_seed(0)
    assert torch.equal(kernels.dropout(x, 0.3), expected)
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(x, x, x, dropout_p=0.3, is_causal=True)
    torch.manual_seed(0)
    assert torch.equal(kernels.causal_attention(x, x, x, 0.3), expected)
