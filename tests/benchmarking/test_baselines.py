"""The baselines compute what nanoGPT and transformers compute."""
import copy

import pytest
import torch
from conftest import tiny_ids
from torch.nn import functional as F

from model import GPT, GPTConfig, Kernels
from plaingpt.benchmarking import baselines

CPU = torch.device('cpu')
CONFIG = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16, bias=False)


def batch(number):
    tokens = tiny_ids(4, 17, seed=number)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def test_a_step_of_nanogpt_is_the_loss_of_all_logits_and_adamw_in_two_groups(monkeypatch):
    nets = []
    monkeypatch.setattr(baselines, 'GPT', lambda config: nets.append(GPT(config)) or nets[-1])
    torch.manual_seed(0)
    step = baselines.nanogpt_step(CONFIG, batch, CPU, 'float32', compiled=False)
    net = nets[0]
    assert net.config.gelu == 'exact' and type(net.kernels) is Kernels
    expected = copy.deepcopy(net)
    optimizer = torch.optim.AdamW([
        {'params': [p for p in expected.parameters() if p.dim() == 2], 'weight_decay': 0.1},
        {'params': [p for p in expected.parameters() if p.dim() == 1], 'weight_decay': 0.0},
    ], lr=1e-4, betas=(0.9, 0.95))

    for number in range(3):
        step(number)
        x, y = batch(number)
        logits, _ = expected(x, y)
        F.cross_entropy(logits.view(-1, 31), y.view(-1)).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        assert ours.grad is None


@pytest.mark.parametrize('make', [baselines.nanogpt_step, baselines.transformers_step])
def test_where_ours_is_compiled_the_whole_net_is_compiled_in_the_default_mode(make, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile',
                        lambda net, **options: compiled.append((net, options)))
    make(CONFIG, batch, CPU, 'float32', compiled=False)
    assert compiled == []
    make(CONFIG, batch, CPU, 'float32', compiled=True)
    (net, options), = compiled
    assert options == {}
    assert sum(p.numel() for p in net.parameters()) > 5000


def test_a_step_of_transformers_changes_its_weights(monkeypatch):
    nets = []
    original = baselines.transformers_gpt2
    monkeypatch.setattr(baselines, 'transformers_gpt2',
                        lambda *arguments: nets.append(original(*arguments)) or nets[-1])
    step = baselines.transformers_step(CONFIG, batch, CPU, 'float32', compiled=False)
    before = copy.deepcopy(nets[0].state_dict())
    step(0)
    changed = [name for name, value in nets[0].state_dict().items()
               if not torch.equal(value, before[name])]
    assert 'transformer.wte.weight' in changed
