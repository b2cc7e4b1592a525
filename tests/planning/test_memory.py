"""The memory of a training step, compared with every allocation of a real one on a CPU, and with
what torch's allocator has counted on CUDA.

Products in bfloat16 take buffers on some CPUs. The tests do not depend on the CPU: most multiply
without oneDNN, which needs none, and one tells oneDNN which instructions to use."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from experiments.planned_memory import LLAMA as LLAMA_ON_CUDA
from experiments.planned_memory import MODERN, Case, planned
from measuring import measured_peak
from shapes import LLAMA, OPTIONS, meta_gpt

from model import GPTConfig
from plaingpt.planning import counts
from plaingpt.planning.hardware import Hardware
from plaingpt.planning.memory import step_memory
from plaingpt.training import optimizers
from plaingpt.training.optimizers import muon_matrices, temporary_memory

# (config, sequences in a micro-batch, micro-batches, activation checkpointing)
STEPS = [
    (GPTConfig(64, 65, 4, 4, 128, 0.0, False), 12, 1, False),   # many activations: peak at the loss
    (GPTConfig(64, 65, 4, 4, 128, 0.1, True), 12, 1, False),
    (GPTConfig(64, 65, 4, 4, 128, 0.0, False), 12, 2, False),   # with earlier gradients
    (GPTConfig(1030, 65, 2, 2, 64, 0.0, False), 3, 1, False),   # long: attention is not written out
    (GPTConfig(16, 8192, 2, 2, 256, 0.0, False), 1, 1, False),  # many weights: peak at the end
    (GPTConfig(128, 8192, 2, 2, 64, 0.0, False), 8, 1, False),  # many logits
    (GPTConfig(64, 65, 6, 4, 128, 0.1, True), 24, 1, True),     # peak in a block computed again
    (OPTIONS[0], 12, 1, False),
    (OPTIONS[1], 12, 1, False),
    (OPTIONS[2], 12, 1, False),
    (OPTIONS[3], 12, 2, False),
    (GPTConfig(64, 65, 4, 4, 128, 0.1, False, **LLAMA, qk_norm=True), 12, 1, False),
    (GPTConfig(1030, 65, 2, 2, 64, 0.0, False, **LLAMA, qk_norm=True), 3, 1, False),
    (GPTConfig(1030, 65, 2, 2, 64, position='rope', mlp='relu2', logit_softcap=15.0), 3, 1, False),
    (GPTConfig(1030, 65, 2, 2, 64, position='alibi'), 3, 1, False),
    (GPTConfig(600, 65, 6, 4, 64, position='alibi'), 3, 1, True),        # one copy of the bias
    (GPTConfig(16, 8192, 2, 2, 256, 0.0, False, **LLAMA), 1, 1, False),  # an untied head
    (GPTConfig(128, 8192, 2, 2, 64, logit_softcap=15.0), 8, 1, False),
    (GPTConfig(64, 65, 6, 4, 128, 0.0, False, **LLAMA), 24, 1, True),
    (GPTConfig(64, 65, 24, 2, 32), 48, 1, True),                # peak in the last block
    (GPTConfig(64, 65, 6, 4, 128, position='alibi', mlp='relu2'), 24, 1, True),
]
GPT2 = GPTConfig(1024, 50304, 12, 12, 768, 0.0, False)


def predicted_peak(*arguments, **options):
    return sum(step_memory(*arguments, **options).values())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('config, batch_size, micro_batches, checkpointing', STEPS, ids=str)
def test_memory_is_that_of_a_real_step(config, batch_size, micro_batches, checkpointing, dtype,
                                       monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, 'enabled', False)
    parts = step_memory(config, batch_size, dtype, 'cpu', micro_batches > 1, checkpointing)
    measured = measured_peak(config, batch_size, dtype, micro_batches, checkpointing)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.1)
    assert parts['weights'] == 4 * sum(counts.parameters(config).values())


MEASURE_STEPS = """
import json, os, sys
sys.path[:0] = sys.argv[1:]
from measuring import measured_peak
from test_memory import STEPS
peaks = []
for config, batch_size, micro_batches, checkpointing in STEPS:
    peaks.append(measured_peak(config, batch_size, 'bfloat16', micro_batches, checkpointing))
print(json.dumps(peaks), flush=True)
"""


def test_buffers_of_cpus_without_bfloat16_units_are_counted():
    if not torch.cpu.get_capabilities().get('avx512_f'):
        pytest.skip('oneDNN can use AVX-512 on CPUs that have it only')
    without_units = {**os.environ, 'ONEDNN_MAX_CPU_ISA': 'AVX512_CORE'}
    peaks = json.loads(run_apart(MEASURE_STEPS, env=without_units))
    for (config, batch_size, micro_batches, checkpointing), peak in zip(STEPS, peaks, strict=True):
        predicted = predicted_peak(config, batch_size, 'bfloat16', 'cpu', micro_batches > 1,
                                   checkpointing, float32_buffers=True)
        assert predicted == pytest.approx(peak, rel=0.1), config


def test_a_buffer_is_as_wide_as_the_hidden_layer():
    step = (GPTConfig(64, 65, 24, 2, 32), 48, 'bfloat16', 'cpu', False, True)
    part = 'gradients of activations'
    without = step_memory(*step)[part]
    assert step_memory(*step, float32_buffers=True)[part] == without + 48 * 64 * 4 * 128


@pytest.mark.parametrize('trained, moments, tolerance', [
    ('', 1, 0.1), ('transformer.h', 2, 0.1), ('transformer.h', 1, 0.1), ('attn', 2, 0.4)])
@pytest.mark.parametrize('config, batch_size', [
    (GPTConfig(16, 1024, 3, 2, 256), 1), (GPTConfig(64, 65, 4, 4, 128), 12)], ids=str)
def test_frozen_parameters_take_no_gradient_and_no_state(config, batch_size, trained, moments,
                                                         tolerance):
    named = meta_gpt(config).named_parameters()
    learnt = sum(parameter.numel() for name, parameter in named if trained in name)
    parts = step_memory(config, batch_size, 'float32', 'cpu', trainable=learnt, moments=moments)
    measured = measured_peak(config, batch_size, 'float32', trained=trained, moments=moments)
    # Activations are an upper bound where little is trained.
    assert 0.9 < sum(parts.values()) / measured < 1 + tolerance
    assert parts['optimizer state'] == 4 * moments * learnt


def test_what_muon_takes_in_its_step_is_counted(monkeypatch):
    monkeypatch.setattr(optimizers, 'has_bfloat16_units', lambda: True)
    config = GPTConfig(16, 65, 4, 2, 128)
    gpt = meta_gpt(config)
    by_muon = sum(matrix.numel() for matrix in muon_matrices(gpt))
    parts = step_memory(config, 1, 'float32', 'cpu', update_memory=temporary_memory(gpt),
                        moments=2 - by_muon / gpt.get_num_params(non_embedding=False))
    assert parts['update of the weights'] > 0  # the update is the peak
    measured = measured_peak(config, 1, 'float32', muon=True)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.1)


def test_logits_in_parts_are_counted_once(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, 'enabled', False)
    for module in 'model', 'plaingpt.planning.training_step':
        monkeypatch.setattr(f'{module}.LOGITS_AT_ONCE', 2 ** 18)
    config = GPTConfig(64, 8192, 2, 2, 64, 0.0, False)
    measured = measured_peak(config, 8, 'float32')
    assert predicted_peak(config, 8, 'float32', 'cpu') == pytest.approx(measured, rel=0.1)


def test_attention_on_a_gpu_keeps_no_weights():
    cuda = step_memory(GPT2, 12, 'bfloat16', 'cuda')
    cpu = step_memory(GPT2, 12, 'bfloat16', 'cpu')
    assert cuda['activations: attention'] == 12 * 1024 * 12 * (5 * 2 * 768 + 4 * 12)
    assert cuda['logits and their gradient'] == 12 * 12 * 1024 * 50304
    assert cuda['logits and their gradient'] > cpu['logits and their gradient']


def test_an_untied_embedding_has_no_copy_in_16_bits():
    tied = step_memory(GPT2, 12, 'bfloat16', 'cuda')
    untied = step_memory(replace(GPT2, tied=False), 12, 'bfloat16', 'cuda')
    assert untied['weights'] == tied['weights'] + 4 * 50304 * 768
    assert untied['weights in 16 bits'] == tied['weights in 16 bits'] > 0


MEASURE_DDP = """
import os, sys
sys.path[:0] = sys.argv[2:]
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from measuring import measured_peak
from model import GPTConfig
dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)

def distribute(gpt):
    return DistributedDataParallel(gpt, gradient_as_bucket_view=True)

config = GPTConfig(64, 65, 4, 4, 128, 0.0, False)
print(measured_peak(config, 4, 'float32', int(sys.argv[1]), distribute=distribute), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize('micro_batches', [1, 2])
def test_the_buckets_of_ddp_are_counted(micro_batches):
    measured = int(run_apart(MEASURE_DDP, str(micro_batches)))
    config = GPTConfig(64, 65, 4, 4, 128, 0.0, False)
    accumulating = micro_batches > 1
    predicted = predicted_peak(config, 4, 'float32', 'cpu', accumulating, distributed=True)
    assert predicted == pytest.approx(measured, rel=0.1)


def run_apart(program, *arguments, env=None):
    """stdout of a Python program in a process of its own, which can import the modules of tests."""
    folders = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tests' / 'planning')]
    command = [sys.executable, '-c', program, *arguments, *folders]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


# ---- on CUDA ----

# What experiments/planned_memory.py has recorded: bytes that the allocator of torch 2.11 counted.
# The device was a stub for an H100, an A100 or a T4, which allocates as the card does, and computes
# nothing. On a card, --record writes such a file anew.
RECORDS = [json.loads(line) for line in
           (ROOT / 'tests' / 'planning' / 'allocated.jsonl').read_text('utf-8').splitlines()]


def name_of(record):
    how = 'compiled' if record['compiled'] else 'eager'
    case = record['case']
    return f'{case["name"]} x {case["batch_size"]}, {how}, {record["ranks"]} x {record["card"]}'


@pytest.mark.parametrize('record', RECORDS, ids=name_of)
def test_a_plan_for_cuda_is_near_what_was_allocated(record):
    fields = record['case']
    case = Case(**{**fields, 'config': GPTConfig(**fields['config'])})
    hardware = Hardware('a card', record['ranks'], 'cuda', None, has_flash=record['has_flash'])
    # Among what is allocated are 17 to 67 MB of cuBLAS, which are not in the plan.
    assert planned(case, record['compiled'], hardware) == pytest.approx(record['allocated'],
                                                                        rel=0.07)


OPTIONS_ON_CUDA = [{}, {'dropout': 0.1}, {'position': 'alibi'}, MODERN, LLAMA_ON_CUDA]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('options', OPTIONS_ON_CUDA, ids=str)
def test_compiling_saves_memory_on_cuda(options, dtype):
    config = replace(GPT2, **options)
    for batch_size in 1, 12:
        step = (config, batch_size, dtype, 'cuda')
        assert predicted_peak(*step, compiled=True) < predicted_peak(*step)
    for device_type in 'cpu', 'mps':
        step = (config, 12, dtype, device_type)
        assert step_memory(*step, compiled=True) == step_memory(*step)


@pytest.mark.parametrize('options', OPTIONS_ON_CUDA, ids=str)
def test_each_sequence_takes_as_much_as_the_last(options):
    config = replace(GPT2, **options)
    peaks = [predicted_peak(config, batch_size, 'bfloat16', 'cuda', compiled=True)
             for batch_size in (8, 16, 24)]
    assert peaks[1] - peaks[0] == peaks[2] - peaks[1] > 0


def test_a_bfloat16_residual_stream_halves_what_compiled_norms_keep():
    def of_norms(bf16_residual):
        parts = step_memory(GPT2, 12, 'bfloat16', 'cuda', compiled=True,
                            bf16_residual=bf16_residual)
        return parts['activations: residual stream, norms']

    assert of_norms(True) == pytest.approx(of_norms(False) / 2, rel=0.01)


def test_repeated_heads_are_counted_on_cards_without_flash_attention():
    grouped = replace(GPT2, n_kv_head=4)

    def of_attention(config, has_flash):
        parts = step_memory(config, 12, 'float16', 'cuda', has_flash=has_flash)
        return parts['activations: attention']

    repeated = 12 * 1024 * 12 * 2 * 2 * 768  # k and v, in 16 bits
    assert of_attention(grouped, False) == of_attention(grouped, True) + repeated
    assert of_attention(GPT2, False) == of_attention(GPT2, True)
