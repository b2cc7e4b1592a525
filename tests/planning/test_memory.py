"""The arithmetic of parameters, FLOPs and memory, against the model itself."""
import contextlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, tiny_gpt
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from plaingpt.planning import counts, memory, speed
from plaingpt.system.devices import precision

CPU = torch.device('cpu')
SHAPES = [
    GPTConfig(64, 65, 4, 4, 128, 0.0, False), GPTConfig(48, 300, 2, 3, 96, 0.1, True),
    GPTConfig(1024, 50257, 12, 12, 768, 0.0, True), GPTConfig(1024, 50304, 48, 25, 1600, 0.0, False)]
LLAMA = dict(position='rope', norm='rmsnorm', mlp='swiglu', n_kv_head=1, tied=False)
OPTIONS = [
    GPTConfig(64, 65, 4, 4, 128, 0.0, False, **LLAMA), GPTConfig(48, 300, 2, 6, 96, 0.0, True, **LLAMA, qk_norm=True),
    GPTConfig(48, 300, 2, 4, 96, 0.1, True, position='alibi', n_kv_head=2, mlp='relu2', norm='rmsnorm'),
    GPTConfig(48, 300, 2, 4, 96, position='none', mlp='swiglu', logit_softcap=15.0, tied=False)]


def meta(config):
    with torch.device('meta'):
        return GPT(config)


@pytest.mark.parametrize('config', SHAPES + OPTIONS, ids=str)
def test_parameters_are_the_models(config):
    gpt, parts = meta(config), counts.parameters(config)
    assert sum(parts.values()) == gpt.get_num_params(non_embedding=False)
    names = {'attention: query, key, value': 'attn.c_attn', 'attention: projection': 'attn.c_proj',
             'MLP: up': 'mlp.c_fc', 'MLP: down': 'mlp.c_proj', 'token embedding and head': 'wte|lm_head',
             'position embedding': 'wpe', 'layer norms': 'ln_'}
    for part, name in names.items():
        assert parts[part] == sum(p.numel() for key, p in gpt.named_parameters() if re.search(name, key)), part


@pytest.mark.parametrize('tokens', [None, 20])
@pytest.mark.parametrize('config', SHAPES[:2] + OPTIONS, ids=str)
def test_flops_are_those_that_torch_counts(config, tokens):
    gpt, T = meta(config), tokens or config.block_size
    idx = torch.zeros(1, T, dtype=torch.int64, device='meta')
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits, loss = gpt(idx, idx)
        forward = counter.get_total_flops()
        loss.backward()
    parts = counts.flops(config, tokens)
    assert sum(parts.values()) == forward and 3 * forward == counter.get_total_flops()


@pytest.mark.parametrize('config', SHAPES + OPTIONS, ids=str)
def test_flops_are_those_of_mfu_but_for_what_is_no_product(config):
    gpt, parts = meta(config), counts.parameters(config)
    no_product = parts['layer norms'] + sum(p.numel() for name, p in gpt.named_parameters()
                                            if name.endswith('bias') and 'ln_' not in name)
    assert 3 * sum(counts.flops(config).values()) == config.block_size * (gpt.flops_per_token() - 6 * no_product)


def measured_peak_of_a_step(config, batch_size, dtype, micro_batches, checkpointing, distribute=None, trained='',
                            moments=2):
    """Bytes of tensors, weights and moments included, at the peak of a step on this CPU: by every allocation in it.
    trained: in the names of the parameters that are."""
    gpt = GPT(config)
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(trained in name)
    model = distribute(gpt) if distribute else gpt
    gpt.checkpointing = checkpointing
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    if moments == 1:
        optimizer = torch.optim.SGD(optimizer.param_groups, 1e-3, momentum=0.9)
    _, autocast, scaler = precision(CPU, dtype, config.n_embd)

    def step():
        for n in range(micro_batches):
            tokens = torch.randint(config.vocab_size, (batch_size, config.block_size))
            with model.no_sync() if distribute and n + 1 < micro_batches else contextlib.nullcontext():
                with autocast():
                    loss = model(tokens, tokens, with_logits=False)[1]
                loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    step()  # of which DDP makes its buckets anew
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    learnt = sum(parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad)
    there_before = 1 + bool(distribute)  # DDP's buckets
    now = peak = 4 * (there_before * gpt.get_num_params(non_embedding=False) + moments * learnt)
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('config, batch_size, micro_batches, checkpointing', [
    (GPTConfig(64, 65, 4, 4, 128, 0.0, False), 12, 1, False),     # many activations: the peak is at the loss
    (GPTConfig(64, 65, 4, 4, 128, 0.1, True), 12, 1, False),
    (GPTConfig(64, 65, 4, 4, 128, 0.0, False), 12, 2, False),     # with the gradients of another micro-batch
    (GPTConfig(600, 65, 2, 2, 64, 0.0, False), 3, 1, False),      # no written-out attention without dropout
    (GPTConfig(16, 8192, 2, 2, 256, 0.0, False), 1, 1, False),    # many weights: the peak is at the end
    (GPTConfig(128, 8192, 2, 2, 64, 0.0, False), 8, 1, False),    # many logits
    (GPTConfig(64, 65, 6, 4, 128, 0.1, True), 24, 1, True),       # the peak is in a block that is computed again
    (OPTIONS[0], 12, 1, False), (OPTIONS[1], 12, 1, False), (OPTIONS[2], 12, 1, False), (OPTIONS[3], 12, 2, False),
    (GPTConfig(64, 65, 4, 4, 128, 0.1, False, **LLAMA, qk_norm=True), 12, 1, False),
    (GPTConfig(600, 65, 2, 2, 64, 0.0, False, **LLAMA, qk_norm=True), 3, 1, False),
    (GPTConfig(600, 65, 2, 2, 64, position='rope', mlp='relu2', logit_softcap=15.0), 3, 1, False),
    (GPTConfig(600, 65, 2, 2, 64, position='alibi'), 3, 1, False),       # no written-out attention
    (GPTConfig(16, 8192, 2, 2, 256, 0.0, False, **LLAMA), 1, 1, False),  # no second gradient of an untied matrix
    (GPTConfig(128, 8192, 2, 2, 64, logit_softcap=15.0), 8, 1, False),
    (GPTConfig(64, 65, 6, 4, 128, 0.0, False, **LLAMA), 24, 1, True),
    (GPTConfig(64, 65, 24, 2, 32), 48, 1, True),                         # it is the last, when all inputs are there
    (GPTConfig(64, 65, 6, 4, 128, position='alibi', mlp='relu2'), 24, 1, True),
], ids=str)
def test_memory_is_that_of_a_real_step(config, batch_size, micro_batches, checkpointing, dtype):
    parts = memory.memory(config, batch_size, dtype, 'cpu', micro_batches > 1, checkpointing)
    measured = measured_peak_of_a_step(config, batch_size, dtype, micro_batches, checkpointing)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.1)
    assert parts['weights'] == 4 * sum(counts.parameters(config).values())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('options', [
    {}, LLAMA, LLAMA | dict(qk_norm=True), dict(qk_norm=True), dict(position='rope'), dict(n_kv_head=1, mlp='relu2'),
    dict(position='alibi', n_kv_head=1)], ids=str)
@pytest.mark.parametrize('T', [96, 520])
def test_activations_are_what_autograd_keeps_to_the_byte(options, T, dropout, dtype):
    config = GPTConfig(T, 65, 2, 2, 64, dropout, False, **options)  # all rows at a time where attention is written out
    gpt, working, kept = GPT(config), [''], {}
    others = {shape for p in gpt.parameters() for shape in (p.shape, p.shape[::-1])}
    others |= {(1, T, 1, config.head_size // 2), (1, 2, T, T)}

    def save(tensor):
        if tensor.shape not in others:  # weights in 16 bits, and what all blocks share: rope's turns, ALiBi's bias
            storage = tensor.untyped_storage()
            kept.setdefault(storage.data_ptr(), (working[-1], storage.nbytes(), tensor))
        return tensor

    for name, module in gpt.named_modules():
        module.register_forward_pre_hook(lambda module, arguments, name=name: working.append(name))
        module.register_forward_hook(lambda module, arguments, output: working.pop() and None)
    tokens = torch.randint(65, (3, T))
    with precision(CPU, dtype, 64)[1](), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        gpt.residuals(tokens, torch.arange(T))
    parts = memory.memory(config, 3, dtype, 'cpu')
    for part, names in ('residual stream, norms', ('.ln_1', '.ln_2')), ('attention', ('.attn',)), ('MLP', ('.mlp',)):
        found = sum(size for name, size, _ in kept.values() if any(word in name for word in names))
        assert parts[f'activations: {part}'] == found, part


@pytest.mark.parametrize('trained, moments, above', [
    ('', 1, 0.1), ('transformer.h', 2, 0.1), ('transformer.h', 1, 0.1), ('attn', 2, 0.4)])
@pytest.mark.parametrize('config, batch_size', [
    (GPTConfig(16, 1024, 3, 2, 256), 1), (GPTConfig(64, 65, 4, 4, 128), 12)], ids=str)
def test_what_is_not_trained_has_no_gradient_and_an_optimizer_its_moments(config, batch_size, trained, moments,
                                                                          above):
    learnt = sum(p.numel() for name, p in meta(config).named_parameters() if trained in name)
    parts = memory.memory(config, batch_size, 'float32', 'cpu', trainable=learnt, moments=moments)
    measured = measured_peak_of_a_step(config, batch_size, 'float32', 1, False, None, trained, moments)
    assert 0.9 < sum(parts.values()) / measured < 1 + above
    assert parts['optimizer state'] == 4 * moments * learnt


def test_logits_in_parts_are_counted_once(monkeypatch):
    for module in 'model.LOGITS_AT_ONCE', 'plaingpt.planning.memory.LOGITS_AT_ONCE':
        monkeypatch.setattr(module, 2 ** 18)
    config = GPTConfig(64, 8192, 2, 2, 64, 0.0, False)
    predicted = sum(memory.memory(config, 8, 'float32', 'cpu').values())
    assert predicted == pytest.approx(measured_peak_of_a_step(config, 8, 'float32', 1, False), rel=0.1)


def test_a_gpu_needs_no_more_room_for_attention_than_for_its_rows():
    config = GPTConfig(1024, 50304, 12, 12, 768, 0.0, False)
    cuda, cpu = (memory.memory(config, 12, 'bfloat16', device) for device in ('cuda', 'cpu'))
    assert cuda['activations: attention'] == 12 * 1024 * 12 * (5 * 2 * 768 + 4 * 12)
    assert cuda['logits and their gradient'] == 12 * 12 * 1024 * 50304 > cpu['logits and their gradient']
    untied = memory.memory(replace(config, tied=False), 12, 'bfloat16', 'cuda')
    assert untied['weights'] == cuda['weights'] + 4 * 50304 * 768  # of which what is looked up stays in 32 bits
    assert untied['weights in 16 bits'] == cuda['weights in 16 bits'] > 0


def test_what_is_measured_here_is_positive_and_grows_with_the_work():
    assert speed.measured_peak(CPU, torch.float32) > 1e8 and speed.measured_bandwidth(CPU) > 1e7
    config = GPTConfig(16, 65, 2, 2, 32, 0.0, False)
    micro_batch, update = speed.measured_step(config, 2, CPU, 'float32', False, False)
    assert micro_batch > 0 and update > 0


def test_of_a_model_too_large_to_measure_two_depths_are(monkeypatch):
    made, times = [], iter([[4.0], [5.0, 1.0, 2.0], [0.5], [1.5]])  # one sequence; 6 blocks; the update; 1 block
    monkeypatch.setattr(speed, 'GPT', lambda config: made.append(config) or tiny_gpt())
    monkeypatch.setattr(speed, '_seconds', lambda work, device, **limits: next(times))
    config = GPTConfig(1024, 50304, 48, 25, 1600, 0.0, False)  # 30.7M parameters a block
    micro_batch, update = speed.measured_step(config, 4, CPU, 'float32', False, False)
    assert [some.n_layer for some in made] == [6, 1]
    assert micro_batch == pytest.approx(4 * (2.0 + 42 * 0.1))
    assert update == pytest.approx(0.5 * sum(counts.parameters(config).values()) / tiny_gpt().get_num_params(False))


DDP_STEP = """
import os, sys
sys.path[:0] = sys.argv[1].split(':')
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import test_memory
dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
shape, accumulating = test_memory.GPTConfig(64, 65, 4, 4, 128, 0.0, False), sys.argv[2] == 'True'
print(test_memory.measured_peak_of_a_step(shape, 4, 'float32', 1 + accumulating, False, lambda gpt:
      DistributedDataParallel(gpt, gradient_as_bucket_view=True)), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize('accumulating', [False, True])
def test_the_buckets_of_ddp_are_counted(accumulating):
    ended = subprocess.run([sys.executable, '-c', DDP_STEP, f'{ROOT}:{ROOT}/tests:{ROOT}/tests/planning', str(accumulating)],
                           capture_output=True, text=True, check=True)
    config = GPTConfig(64, 65, 4, 4, 128, 0.0, False)
    predicted = sum(memory.memory(config, 4, 'float32', 'cpu', accumulating, False, True).values())
    assert predicted == pytest.approx(int(ended.stdout), rel=0.1)
