"""The data sheets, and which of them a name leads to."""
import pytest

from plaingpt.planning.data_sheets import DATA_SHEETS, data_sheet, is_before_ampere, lacks_tf32


@pytest.mark.parametrize('name, teraflops', [
    ('NVIDIA H200', 989),
    ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA A10', 125),
    ('NVIDIA L4', 121),
    ('NVIDIA L40S', 362),
    ('NVIDIA A40', 150),
    ('Tesla T4', 65),
    ('Tesla V100-SXM2-16GB', 125),
    ('NVIDIA GeForce RTX 3090', 71),
    ('NVIDIA GeForce RTX 4090', 165.2),
    ('NVIDIA GeForce RTX 5090', 209.5),
    ('NVIDIA B200', 2250),
    ('AMD Instinct MI300X', 1307),
    ('AMD Instinct MI250X', 191.5),
])
def test_a_device_has_the_flops_of_its_data_sheet(name, teraflops):
    assert data_sheet(name).flops == teraflops * 1e12


@pytest.mark.parametrize('name', [
    'NVIDIA GeForce RTX 4090 Laptop GPU', 'NVIDIA A100-SXM4-40GB MIG 1g.5gb', 'NVIDIA H20'])
def test_devices_that_only_sound_like_another_have_no_data_sheet(name):
    assert data_sheet(name) is None


@pytest.mark.parametrize('name, gigabytes', [
    ('NVIDIA A100-SXM4-80GB', 80),
    ('NVIDIA A100-PCIE-40GB', 40),
    ('Tesla V100-SXM2-32GB', 32),
    ('Tesla V100-SXM2-16GB', 16),
    ('h100 sxm', 80),
    ('NVIDIA H200', 141),
    ('A100 40 GB', 40),
    ('NVIDIA GH200 480GB', 96),
    ('NVIDIA GH200 144G HBM3e', 144),
])
def test_a_device_has_the_memory_of_its_data_sheet(name, gigabytes):
    assert data_sheet(name).memory == gigabytes * 1e9


@pytest.mark.parametrize('pattern', DATA_SHEETS)
def test_data_sheets_are_in_the_units_that_they_state(pattern):
    sheet = DATA_SHEETS[pattern]
    assert 6e13 < sheet.flops < 3e15
    assert 1e10 < sheet.memory < 2e11
    assert 2e11 < sheet.bandwidth < 1e13
    assert 50 < sheet.flops / sheet.bandwidth < 450  # FLOPs a byte, where all these cards are


def test_old_cards_lack_formats():
    cards = 'Tesla T4', 'Tesla V100-SXM2-16GB', 'AMD Instinct MI250X', 'NVIDIA A100-SXM4-80GB'
    assert [is_before_ampere(name) for name in cards] == [True, True, False, False]
    assert [lacks_tf32(name) for name in cards] == [True, True, True, False]
