"""The norms of weights and updates, by kinds of parameters."""
import pytest
import torch
from conftest import tiny_gpt, tiny_ids

from plaingpt.training.health import SAMPLE_SIZE, Health

PARTS = {'embedding': ('wte', 'wpe'), 'attention': ('.attn.',), 'mlp': ('.mlp.',),
         'head': ('lm_head',), 'norm': ('.ln_',)}


def take_step(gpt):
    """An AdamW step with the gradients that the parameters have."""
    gpt.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu').step()


def backward(gpt):
    x = tiny_ids(3, 16)
    _, loss = gpt(x, x)
    loss.backward()


def test_figures_are_the_norms_of_the_weights_and_of_the_step():
    gpt = tiny_gpt(tied=False)
    health = Health(gpt)
    before = {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}
    backward(gpt)
    gpt.transformer.h[0].attn.c_attn.weight.grad = None  # frozen
    with health.watch():
        take_step(gpt)
    figures = health.figures()
    assert figures['weight_norm'].keys() == figures['update_ratio'].keys() == PARTS.keys()

    after = dict(gpt.named_parameters())
    for kind, parts in PARTS.items():
        weights = []
        step = []
        for name, parameter in after.items():
            if any(part in name for part in parts) and parameter.grad is not None:
                weights.append(before[name].flatten())
                step.append((parameter - before[name]).flatten())
        weight_norm = torch.cat(weights).norm().item()
        step_norm = torch.cat(step).norm().item()
        assert figures['weight_norm'][kind] == pytest.approx(weight_norm, rel=1e-5)
        assert figures['update_ratio'][kind] == pytest.approx(step_norm / weight_norm, rel=1e-4)


def test_there_are_no_figures_of_a_step_that_is_not_watched():
    gpt = tiny_gpt()
    health = Health(gpt)
    assert health.figures() == {}
    backward(gpt)
    with health.watch():
        take_step(gpt)
    assert health.figures()
    with health.watch(False):
        take_step(gpt)
    assert health.figures() == {}


def test_kinds_that_are_not_finite_or_frozen_are_left_out():
    gpt = tiny_gpt()
    health = Health(gpt)
    backward(gpt)
    for name, parameter in gpt.named_parameters():
        if '.mlp.' in name:
            parameter.grad = None
        if '.attn.' in name:
            parameter.grad.fill_(torch.nan)
    with health.watch():
        take_step(gpt)
    figures = health.figures()
    assert figures['weight_norm'].keys() == figures['update_ratio'].keys() == {'embedding', 'norm'}


def test_a_sample_of_a_large_parameter_stands_for_its_norms():
    gpt = tiny_gpt(n_embd=128, vocab_size=1000)
    weight = gpt.lm_head.weight
    with torch.no_grad():
        weight[:, ::2] *= 5  # a sample of every second column alone would give another norm
    norm = weight.norm().item()
    health = Health(gpt)
    weight.grad = torch.randn(weight.shape)
    with health.watch():
        torch.optim.SGD([weight], lr=1e-3).step()

    for sample in health.samples.values():
        assert all(len(view) < 2 * SAMPLE_SIZE for view in sample.views)
    assert weight.numel() > 2 * SAMPLE_SIZE
    ratio = 1e-3 * weight.grad.norm().item() / norm
    assert health.figures() == {
        'weight_norm': {'embedding': pytest.approx(norm, rel=0.05)},
        'update_ratio': {'embedding': pytest.approx(ratio, rel=0.05)},
    }
