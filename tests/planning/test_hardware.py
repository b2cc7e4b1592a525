"""The hardware that a plan is for."""
import pytest
import torch

from plaingpt.planning import hardware
from plaingpt.planning.hardware import Hardware, has_float32_buffers


def test_float32_takes_half_the_speed_and_an_eighth_on_cards_without_tf32():
    peaks = [Hardware.named(name, 1, 'float32').flops / 1e12
             for name in ('Tesla T4', 'V100', 'A100')]
    assert peaks == [65 / 8, 125 / 8, 156]


def test_cards_before_ampere_have_no_flash_attention():
    has_flash = [Hardware.named(name, 1, 'float16').has_flash
                 for name in ('Tesla T4', 'V100', 'A100', 'H100 SXM')]
    assert has_flash == [False, False, True, True]


def test_the_ranks_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(hardware, 'device_memory', lambda device: 8e9)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert Hardware.here(torch.device('cpu'), 2).memory == 4e9


@pytest.mark.parametrize('capabilities, buffers', [
    ({'avx512_f': True, 'avx512_bf16': False, 'amx_bf16': False}, True),
    ({'avx512_f': True, 'avx512_bf16': True, 'amx_bf16': False}, False),
    ({'avx512_f': True, 'avx512_bf16': True, 'amx_bf16': True}, False),
    ({'avx512_f': False, 'avx512_bf16': False, 'amx_bf16': False}, False),
    ({}, False),  # not an x86
], ids=str)
def test_only_avx512_without_bfloat16_units_takes_float32_buffers(capabilities, buffers,
                                                                  monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    assert has_float32_buffers() == buffers
    assert Hardware.here(torch.device('cpu'), 1).float32_buffers == buffers
