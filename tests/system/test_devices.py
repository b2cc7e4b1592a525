"""plaingpt/system/devices.py: the device, its precision and memory."""
import weakref

import pytest
import torch
from torch import nn

from plaingpt.system import devices
from plaingpt.system.messages import UserError

CPU = torch.device('cpu')
CUDA = torch.device('cuda')
MPS = torch.device('mps')
TODAYS_WHEEL = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120', 'compute_120']


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=…, …): makes torch see this hardware."""
    def pretend(cuda=False, mps=False, gpus=1, capability=(9, 0), architectures=TODAYS_WHEEL,
                cpu=None, cpu_capability='AVX512'):
        replacements = {
            (torch.cuda, 'is_available'): cuda,
            (torch.cuda, 'device_count'): gpus if cuda else 0,
            (torch.cuda, 'get_device_capability'): capability,
            (torch.cuda, 'get_arch_list'): architectures,
            (torch.cuda, 'get_device_name'): 'a GPU',
            (torch.cuda, 'is_bf16_supported'): True,  # as torch says of the T4, which emulates it
            (torch.backends.mps, 'is_available'): mps,
            (torch.cpu, 'get_capabilities'): cpu or {},
            (torch.backends.cpu, 'get_cpu_capability'): cpu_capability,
        }
        for (module, name), answer in replacements.items():
            monkeypatch.setattr(module, name, lambda *_, answer=answer: answer, raising=False)
    return pretend


# ---- the device ----

@pytest.mark.parametrize('cuda, mps, device', [
    (True, False, 'cuda'),
    (True, True, 'cuda'),
    (False, True, 'mps'),
    (False, False, 'cpu'),
])
def test_the_default_is_the_best_device_of_the_machine(machine, cuda, mps, device):
    machine(cuda, mps)
    assert devices.default_device() == device
    assert devices.check_device(device).type == device


@pytest.mark.parametrize('device, hardware, parts', [
    ('gpu', {}, ["device='gpu'", "'cuda', 'cuda:1', 'mps' or 'cpu'"]),
    ('', {}, ["device=''", "'mps' or 'cpu'"]),
    ('xpu', {}, ['not supported', "'mps' or 'cpu'"]),
    ('meta', {}, ['not supported', "'mps' or 'cpu'"]),
    ('cuda', {}, ['not available', '--device=cpu']),
    ('cuda:0', {'mps': True}, ['not available', '--device=mps']),
    ('mps', {'cuda': True}, ['not available', '--device=cuda']),
    ('cuda:2', {'cuda': True, 'gpus': 2}, ["device='cuda:2'", '2 GPU(s)', '--nproc_per_node']),
])
def test_a_missing_device_is_refused_with_those_that_exist(machine, device, hardware, parts):
    machine(**hardware)
    with pytest.raises(UserError) as refusal:
        devices.check_device(device)
    sentence = str(refusal.value)
    assert '\n' not in sentence
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize('device, chosen', [
    ('cpu', 'cpu'), ('mps', 'mps'), ('cuda', 'cuda:0'), ('cuda:0', 'cuda:0'), ('cuda:1', 'cuda:1'),
])
def test_a_device_of_the_machine_is_accepted(machine, device, chosen):
    machine(cuda=True, mps=True, gpus=2)
    assert devices.check_device(device) == torch.device(chosen)


@pytest.mark.parametrize('capability, runs', [
    ((6, 1), False),
    ((7, 0), False),
    ((7, 2), False),
    ((7, 5), True),
    ((8, 0), True),
    ((8, 7), True),   # by the code for 8.6
    ((9, 0), True),
    ((10, 3), True),  # by that for 10.0
    ((11, 0), False),
    ((12, 1), True),
    ((13, 0), True),  # by the PTX for 12.0
])
def test_a_gpu_needs_code_for_its_architecture(capability, runs):
    assert devices.has_kernels(capability, TODAYS_WHEEL) == runs


@pytest.mark.parametrize('architectures, capability, runs', [
    (['sm_80', 'sm_90a'], (9, 0), True),
    (['sm_80', 'sm_100a'], (10, 3), False),
    (['sm_80', 'sm_100f'], (10, 3), True),
    (['sm_80', 'compute_90a'], (10, 0), False),
])
def test_code_for_one_version_or_one_family_runs_there_alone(architectures, capability, runs):
    assert devices.has_kernels(capability, architectures) == runs


def test_architectures_of_other_makers_are_not_judged():
    assert devices.has_kernels((9, 4), ['gfx90a', 'gfx942'])


@pytest.mark.parametrize('capability, remedy', [
    ((7, 0), 'built for CUDA 12.6'),
    ((11, 0), 'install a newer torch'),
])
def test_a_gpu_without_code_is_refused_with_what_to_install(machine, capability, remedy):
    machine(cuda=True, capability=capability)
    with pytest.raises(UserError) as refusal:
        devices.check_device('cuda')
    sentence = str(refusal.value)
    for part in ('a GPU', f'{capability[0]}.{capability[1]}', 'sm_75', remedy, '--device=cpu'):
        assert part in sentence


def test_the_device_that_was_asked_for_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    precision = torch.get_float32_matmul_precision()
    try:
        devices.set_up_math(0, torch.device('cuda:1'))
        devices.set_up_math(0, CPU)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert chosen == [torch.device('cuda:1')]


# ---- precision ----

@pytest.mark.parametrize('capability, dtype', [
    ((7, 0), 'float16'),
    ((7, 5), 'float16'),
    ((6, 1), 'float16'),
    ((8, 0), 'bfloat16'),
    ((8, 9), 'bfloat16'),
    ((10, 0), 'bfloat16'),
])
def test_a_card_that_only_emulates_bfloat16_takes_float16_with_a_scaler(machine, capability, dtype):
    machine(cuda=True, capability=capability)
    name, _, scaler = devices.precision(CUDA, 'auto', width=16)
    assert name == dtype
    assert scaler.is_enabled() == (dtype == 'float16')


@pytest.mark.parametrize('cpu_capability, has_units', [('AVX512', True), ('AVX2', False)])
def test_bfloat16_units_count_only_if_torch_may_use_them(machine, cpu_capability, has_units):
    machine(cpu={'avx512_bf16': True}, cpu_capability=cpu_capability)
    assert devices.has_bfloat16_units() == has_units


@pytest.mark.parametrize('capabilities', [{'amx_bf16': True}, {'avx512_bf16': True}])
@pytest.mark.parametrize('training, smallest_width', [(True, 128), (False, 256)])
def test_a_cpu_with_bfloat16_units_uses_them_for_wide_models(
        machine, capabilities, training, smallest_width):
    machine(cpu=capabilities)
    for width in (1, 127, 128, 255, 256, 4096):
        expected = 'bfloat16' if width >= smallest_width else 'float32'
        assert devices.default_dtype(CPU, width, training) == expected
        if training:
            name, _, _ = devices.precision(CPU, 'auto', width)
            assert name == expected


@pytest.mark.parametrize('device, capabilities', [
    (CPU, {'avx2': True, 'amx_bf16': False}),
    (CPU, {}),
    (MPS, {'amx_bf16': True}),
])
@pytest.mark.parametrize('training', [True, False])
def test_other_machines_compute_in_float32(machine, device, capabilities, training):
    machine(cpu=capabilities)
    for width in (1, 128, 256, 4096):
        assert devices.default_dtype(device, width, training) == 'float32'
    name, _, _ = devices.precision(device, 'auto', width=4096)
    assert name == 'float32'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_given_precision_is_computed_in(machine, dtype):
    machine(cpu={'amx_bf16': True})
    name, autocast, scaler = devices.precision(CPU, dtype, width=768)
    assert name == dtype
    assert scaler.is_enabled() == (dtype == 'float16')
    linear = nn.Linear(4, 4)
    for _ in range(2):  # autocast() makes a new context each time
        with autocast():
            assert linear(torch.ones(1, 4)).dtype == getattr(torch, dtype)


# ---- memory ----

def test_a_batch_may_take_half_of_a_gpus_free_memory_or_a_quarter_of_the_ram(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (1000, 4000))
    assert devices.room_for_batch(CUDA) == 500
    monkeypatch.setattr(devices, 'device_memory', lambda device: 8000)
    assert devices.room_for_batch(CPU) == 2000
    monkeypatch.setattr(devices, 'device_memory', lambda device: None)
    assert devices.room_for_batch(CPU) == 2 ** 30


def test_memory_of_objects_in_a_cycle_is_released(monkeypatch):
    class Cycle:
        def __init__(self):
            self.itself = self

    is_gone = []
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: is_gone.append(reference() is None))
    reference = weakref.ref(Cycle())
    devices.release_memory(CUDA)
    assert is_gone == [True]
