"""The measurements of this machine's speed, and how a step is put together from them."""
import pytest
import torch
from conftest import tiny_gpt

from model import GPTConfig
from plaingpt.planning import counts, speed

CPU = torch.device('cpu')


def test_measured_speeds_and_times_are_positive():
    assert speed.measured_peak(CPU, torch.float32) > 1e8
    assert speed.measured_bandwidth(CPU) > 1e7
    config = GPTConfig(16, 65, 2, 2, 32, 0.0, False)
    in_bfloat16 = speed.StepSettings('bfloat16', bf16_residual=True)
    for settings in speed.StepSettings('float32'), in_bfloat16:
        times = speed.measured_step(config, 2, CPU, settings)
        assert times.micro_batch > 0 and times.update > 0


def test_a_large_model_is_measured_at_two_depths(monkeypatch):
    configs = []
    times = iter([
        [4.0],            # one sequence, 6 blocks
        [5.0, 1.0, 2.0],  # one sequence again: the median counts
        [0.5],            # the update
        [1.5],            # one sequence, 1 block
    ])

    def make_gpt(config):
        configs.append(config)
        return tiny_gpt()

    monkeypatch.setattr(speed, 'GPT', make_gpt)
    monkeypatch.setattr(speed, '_timed', lambda work, device, **limits: next(times))
    config = GPTConfig(1024, 50304, 48, 25, 1600, 0.0, False)  # 30.7M parameters a block
    measured = speed.measured_step(config, 4, CPU, speed.StepSettings('float32'))

    assert [config.n_layer for config in configs] == [6, 1]
    a_block = (2.0 - 1.5) / 5
    assert measured.micro_batch == pytest.approx(4 * (2.0 + 42 * a_block))
    six_blocks = counts.parameters(GPTConfig(1024, 50304, 6, 25, 1600, 0.0, False))
    share = sum(six_blocks.values()) / sum(counts.parameters(config).values())
    assert measured.update == pytest.approx(0.5 / share)
