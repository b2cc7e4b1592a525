"""runtime.py: device, precision, compilation, processes."""
import pytest
import torch
from torch import nn

from plaingpt.system import devices, seeds
from plaingpt.system.messages import UserError
from plaingpt.training import processes
from plaingpt.training.processes import Process

CPU, CUDA, MPS = (torch.device(name) for name in ('cpu', 'cuda', 'mps'))


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=…, …): makes torch see this hardware."""
    def pretend(cuda=False, mps=False, gpus=1, capability=(9, 0), cpu=None):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus if cuda else 0)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_: True)  # as torch says of T4, which emulates it
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: cpu or {}, raising=False)
    return pretend


# ---- device and precision ----

@pytest.mark.parametrize('cuda, mps, device', [(True, False, 'cuda'), (True, True, 'cuda'), (False, True, 'mps'),
                                               (False, False, 'cpu')])
def test_the_best_device_here_is_the_default(machine, cuda, mps, device):
    machine(cuda, mps)
    assert devices.default_device() == device
    assert devices.check_device(device).type == device


@pytest.mark.parametrize('capability, dtype', [
    ((7, 0), 'float16'), ((7, 5), 'float16'), ((6, 1), 'float16'), ((8, 0), 'bfloat16'), ((8, 9), 'bfloat16'),
    ((10, 0), 'bfloat16')])
def test_a_card_that_only_emulates_bfloat16_takes_float16_with_a_scaler(machine, capability, dtype):
    machine(cuda=True, capability=capability)
    name, _, scaler = devices.precision(CUDA, 'auto', 16)
    assert (name, scaler.is_enabled()) == (dtype, dtype == 'float16')


@pytest.mark.parametrize('device, capabilities, widths', [
    (CPU, {'amx_bf16': True}, (128, 256)), (CPU, {'avx512_bf16': True}, (128, 256)),
    (CPU, {'avx2': True, 'amx_bf16': False}, None), (CPU, {}, None), (MPS, {'amx_bf16': True}, None)])
def test_a_cpu_takes_bfloat16_where_it_multiplies_wide_models_in_it(machine, device, capabilities, widths):
    machine(cpu=capabilities)
    for training, first in zip((True, False), widths or (0, 0), strict=True):
        for width in (1, 127, 128, 255, 256, 4096):
            expected = 'bfloat16' if widths and width >= first else 'float32'
            assert devices.default_dtype(device, width, training) == expected
            assert not training or devices.precision(device, 'auto', width)[0] == expected


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_given_precision_is_the_one_computed_in(machine, dtype):
    machine(cpu={'amx_bf16': True})
    name, autocast, scaler = devices.precision(CPU, dtype, 768)
    linear = nn.Linear(4, 4)
    for _ in range(2):  # a context of its own each time
        with autocast():
            assert str(linear(torch.ones(1, 4)).dtype) == f'torch.{dtype}'
    assert (name, scaler.is_enabled()) == (dtype, dtype == 'float16')


@pytest.mark.parametrize('device, hardware, parts', [
    ('gpu', {}, ("device='gpu'", "'cuda', 'cuda:1', 'mps' or 'cpu'")), ('', {}, ("device=''", "'mps' or 'cpu'")),
    ('xpu', {}, ('not supported', "'mps' or 'cpu'")), ('meta', {}, ('not supported', "'mps' or 'cpu'")),
    ('cuda', {}, ('not available', '--device=cpu')), ('cuda:0', {'mps': True}, ('not available', '--device=mps')),
    ('mps', {'cuda': True}, ('not available', '--device=cuda')),
    ('cuda:2', {'cuda': True, 'gpus': 2}, ("device='cuda:2'", '2 GPU(s)', '--nproc_per_node'))])
def test_a_device_that_is_not_here_is_refused_with_what_is(machine, device, hardware, parts):
    machine(**hardware)
    with pytest.raises(UserError) as error:
        devices.check_device(device)
    assert all(part in str(error.value) for part in parts) and '\n' not in str(error.value)


@pytest.mark.parametrize('device', ['cpu', 'cuda', 'cuda:0', 'cuda:1', 'mps'])
def test_a_device_that_is_here_is_taken(machine, device):
    machine(cuda=True, mps=True, gpus=2)
    assert devices.check_device(device) == torch.device(device)


def test_dropout_is_a_function_of_seed_step_and_unit():
    def drawn(*arguments):
        seeds.seed_dropout(*arguments, torch.device('cpu'))
        return tuple(torch.rand(4).tolist())

    arguments = [(1337, 5, 2), (1338, 5, 2), (1337, 6, 2), (1337, 5, 3), (5, 1337, 2), (1337, 2, 5), (2**70, 5, 2)]
    first = [drawn(*each) for each in arguments]
    assert len(set(first)) == len(arguments)
    assert first == [drawn(*each) for each in arguments]
    torch.manual_seed((1337 * 1_000_003 + 5) * 1_000_003 + 2)  # past which a CPU's seed goes, to the same numbers
    assert first[0] == tuple(torch.rand(4).tolist())


# ---- compilation ----

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).relu()


@pytest.mark.parametrize('works', [True, False])
def test_a_model_that_cannot_be_compiled_stays_eager_with_one_warning(capsys, works):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        if works:
            return graph.forward
        raise RuntimeError('no C++ compiler\nhere')

    model, x = Net(), torch.randn(2, 4)
    names, expected = list(model.state_dict()), model(x)
    assert devices.compile_or_warn(model, lambda: model(x).sum().backward(), backend=compiler) is works
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (not works)
    assert all('torch.compile failed' in line and 'no C++ compiler' in line for line in warnings)
    assert torch.allclose(model(x), expected)
    assert list(model.state_dict()) == names and model.linear.weight.grad is not None and len(graphs) == 1


def test_a_mistake_of_the_model_is_no_failure_to_compile():
    model = Net()
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        devices.compile_or_warn(model, lambda: model(torch.ones(2, 5)), backend='eager')


# ---- processes ----

@pytest.mark.parametrize('world_size', [1, 2, 4])
@pytest.mark.parametrize('micro_batches, batch_size', [(1, 4), (2, 6), (4, 1), (6, 2), (40, 12), (3, 8)])
def test_processes_share_out_every_row_of_a_step_once(world_size, micro_batches, batch_size):
    rows = []
    for rank in range(world_size):
        parts, units = Process(CPU, rank, rank, world_size).share(micro_batches, batch_size)
        mine = [(unit // parts, row) for unit in units for row in range(batch_size)[unit % parts::parts]]
        assert len(mine) * world_size == micro_batches * batch_size
        rows += mine
    assert sorted(rows) == [(micro, row) for micro in range(micro_batches) for row in range(batch_size)]


def test_whole_micro_batches_go_round_the_ranks():
    shares = [Process(CPU, rank, rank, 2).share(6, 5) for rank in range(2)]
    assert [(parts, list(units)) for parts, units in shares] == [(1, [0, 2, 4]), (1, [1, 3, 5])]


@pytest.mark.parametrize('world_size, micro_batches, batch_size, fine', [
    (4, 1, 6, '1, 2, 3'), (4, 3, 5, '1, 3'), (2, 1, 1, '1'), (8, 5, 2, '1, 2, 5')])
def test_what_cannot_be_shared_is_refused_with_what_can(world_size, micro_batches, batch_size, fine):
    with pytest.raises(UserError) as error:
        Process(CPU, 0, 0, world_size).share(micro_batches, batch_size)
    sentence = str(error.value)
    assert f'gradient_accumulation_steps={micro_batches}' in sentence and f'batch_size={batch_size}' in sentence
    assert sentence.startswith(f'{world_size} processes ') and f': {fine} processes can' in sentence
    for n in map(int, fine.split(', ')):
        Process(CPU, 0, 0, n).share(micro_batches, batch_size)


def test_a_process_alone_is_the_first_of_one(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    process = processes.set_up_process('cpu', 'nccl')
    tensor = torch.ones(2)
    assert (process.rank, process.world_size, process.device) == (0, 1, CPU)
    assert process.sum(tensor) is tensor and tensor.tolist() == [1, 1]
    assert [(type(number), number) for number in process.total(True, 300)] == [(int, 1), (int, 300)]  # no bytes
    with pytest.raises(SystemExit) as end:
        processes.leave(3)
    assert end.value.code == 3
