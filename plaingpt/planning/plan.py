"""
What a run takes, before it is begun: parameters, memory, FLOPs, time. train.py prints it at each start, and stops at

    python train.py config/train_gpt2.py --plan=True
    python train.py config/train_gpt2.py --plan=True --device=cuda --device_name="H100 SXM" --num_devices=8

References:
[1] Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B: FLOPs per token and MFU
[2] Hoffmann et al. 2022, Training Compute-Optimal Large Language Models (Chinchilla), arXiv 2203.15556
"""
import math
import os
import re
from datetime import timedelta
from typing import NamedTuple

import torch

from model import GPTConfig
from plaingpt.planning.counts import parameters
from plaingpt.planning.data_sheets import data_sheet
from plaingpt.planning.memory import memory, usable
from plaingpt.planning.speed import measured_peak, measured_step
from plaingpt.system.devices import check_device, device_memory, hardware_name, peak_memory, precision, set_up_math
from plaingpt.system.messages import RANK, complaints, print0
from plaingpt.training import freezing
from plaingpt.training.optimizers import make_optimizer
from plaingpt.training.processes import Process

KEYS = ('plan', 'device_name', 'num_devices', 'expected_mfu')  # of train.py, that say nothing about a run
SHAPE = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')  # of a GPTConfig
TOKENS_A_PARAMETER = 20  # of the compute-optimal models in [2], table 3: 20.0 at 400M, 20.2 at 1B, 20.5 at 10B


def problems(run):
    """Yields what is wrong with the keys of train.py that say what is planned, on what hardware."""
    if run['n_head'] and run['n_embd'] % run['n_head']:
        yield f"n_embd={run['n_embd']} is not a multiple of n_head={run['n_head']}"
    if run['n_kv_head'] and run['n_head'] % run['n_kv_head']:
        yield f"n_head={run['n_head']} is not a multiple of n_kv_head={run['n_kv_head']}"
    if (run['plan'] or run['find_lr']) and run['eval_only']:
        yield 'plan=True and find_lr=True are about training: leave out eval_only=True'
    if run['plan'] and run['find_lr']:
        yield 'plan=True computes no steps that find_lr=True could learn from: leave out one of them'
    name = run['device_name']
    if not name:
        yield from complaints(check_device, run['device'])
    elif not (run['plan'] and run['device'] == 'cuda'):
        yield f'device_name={name!r} goes with --plan=True and --device=cuda'
    elif not data_sheet(name):
        yield (f'device_name={name!r} has no data sheet in model.py (DEVICES), which has H200, H100 SXM, A100, '
               'RTX 4090 and others')


class Hardware(NamedTuple):
    """What a run is planned for: so many devices, of each its memory and, where it is known, its speed."""
    name: str
    count: int
    kind: str              # the type of its torch.device
    memory: float | None        # bytes for a run
    flops: float | None = None  # peak FLOP/s, of the data sheet
    program: float = 0          # bytes of that memory that this process has taken before the run's tensors

    @classmethod
    def here(cls, device, count):
        """This machine's torch.device, before any tensor of a run is on it. Ranks on a CPU share its memory."""
        name, there = hardware_name(device), device_memory(device)
        if device.type != 'cpu':
            return cls(name, count, device.type, there and usable(there))
        ranks = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        return cls(name, count, 'cpu', there and there / ranks, None, peak_memory(device)[0] or 0)

    @classmethod
    def named(cls, name, count, dtype):
        """Cards of a name that is in model.DEVICES. In float32 they compute in TF32, at half the speed, or, where they
        have no TF32, at an eighth."""
        flops, memory, _ = data_sheet(name)
        if dtype == 'float32':
            flops /= 8 if re.search('V100|T4|MI250X', name, re.I) else 2
        return cls(name, count, 'cuda', usable(memory), flops)


class Plan:
    """What a run of this GPT (which may be on the meta device) with this config of train.py takes on some Hardware.

    data_tokens: length of train.bin, None if it is not there; done: steps of it that are over. UserError if the devices
    can't share a step."""

    def __init__(self, gpt, run, hardware, precision_name, data_tokens, done=0):
        self.gpt, self.run, self.hardware, self.data_tokens = gpt, run, hardware, data_tokens
        self.steps = max(0, run['max_iters'] - done)
        micro_batches, rows = run['gradient_accumulation_steps'], run['batch_size']
        parts, units = Process(torch.device('meta'), world_size=hardware.count).share(micro_batches, rows)
        names = freezing.most_trained(gpt, run)
        trained = {name: parameter for name, parameter in gpt.named_parameters() if name in names}
        self.trained = sum(parameter.numel() for parameter in trained.values())
        one_moment = sum(parameter.numel() for name, parameter in trained.items() if run['optimizer'] == 'muon'
                         and 'transformer.h.' in name and parameter.dim() == 2)
        self.memory = memory(gpt.config, rows // parts, precision_name, hardware.kind, len(units) > 1,
                             run['activation_checkpointing'], hardware.count > 1, self.trained,
                             2 - one_moment / max(1, self.trained))
        if hardware.program:
            self.memory |= resident(self.memory, hardware.program)
        self.fits = hardware.memory is None or sum(self.memory.values()) < hardware.memory
        self.parameters = gpt.get_num_params(non_embedding=False)
        self.step_tokens = micro_batches * rows * gpt.config.block_size
        self.tokens = self.step_tokens * self.steps
        self.evaluations = 1 + math.ceil(self.steps / run['eval_interval'])  # one before the first step
        self.flops = gpt.flops_per_token() * self.tokens  # [1]; a forward pass alone takes a third
        evaluated = 2 * run['eval_iters'] * rows * gpt.config.block_size * self.evaluations
        self.evaluation_flops = gpt.flops_per_token() * evaluated / 3

    def summary(self):
        """{label: text} of what can be said without computing."""
        run, config, count, there = self.run, self.gpt.config, self.hardware.count, self.hardware.memory
        saved = self.trained if run['lora_rank'] else self.parameters
        some = f', {self.trained:,} of them trained' if self.trained < self.parameters else ''
        said = {
            'model': f'{self.parameters:,} parameters{some}: {_listed(parameters(config), _short)}; '
                     f'{_described(config)}',
            'step': f'{self.step_tokens:,} tokens: micro-batches x sequences x positions '
                    f'{run["gradient_accumulation_steps"]} x {run["batch_size"]} x {config.block_size}',
            'run': f'{self.steps:,} steps: {self.tokens:,} tokens, ',
            'compute': f'{self.flops + self.evaluation_flops:.3g} FLOPs: {_short(self.gpt.flops_per_token())} for each '
                       'token, forward and backward',
            'memory': f'{_bytes(sum(self.memory.values()))} a device at the peak: {_listed(self.memory, _bytes)}',
            'disk': f'{_bytes(4 * saved + self.memory["optimizer state"])} a checkpoint, of which out_dir holds up to '
                    'four',
        }
        if count > 1:
            said['step'] += f', shared by {count} devices'
        said['run'] += (f'{self.tokens / self.data_tokens:.2f} epochs of {self.data_tokens:,}' if self.data_tokens else
                        f'epochs unknown without {run["dataset"]}')
        if self.steps < run['max_iters']:
            said['run'] += f'; the others of {run["max_iters"]:,} are over'
        if self.evaluation_flops:
            said['compute'] += f', {self.evaluation_flops:.3g} in evaluations'
        if there:
            said['memory'] += (f'; {self.hardware.name} has {_bytes(there)} for it: '
                               + ('it fits' if self.fits else 'it does NOT fit'))
        if self.tokens:
            best = math.sqrt(self.flops / (6 * TOKENS_A_PARAMETER))  # FLOPs = 6 N D, D = 20 N
            said['scale'] = (f'{self.tokens / self.parameters:,.1f} tokens a parameter; Chinchilla would spend as many '
                             f'FLOPs on {_short(best)} parameters and {_short(TOKENS_A_PARAMETER * best)} tokens, '
                             f'{TOKENS_A_PARAMETER} for each')
        return said

    def expected_time(self, mfu):
        """How long it takes if the hardware's peak is known and this share of it is reached."""
        name, count, peak = self.hardware.name, self.hardware.count, self.hardware.flops
        seconds = (self.flops + self.evaluation_flops) / (count * peak * mfu)
        return (f'{_duration(seconds)} on {count} x {name}, at {mfu:.0%} MFU (expected_mfu) of '
                f'{peak / 1e12:.4g} TFLOP/s each')

    def measured_time(self, device, dtype, compiled):
        """How long it takes on this machine, as some steps say that are computed now."""
        run, count = self.run, self.hardware.count
        set_up_math(run['seed'], device)
        name = precision(device, dtype, self.gpt.config.n_embd)[0]
        peak = measured_peak(device, getattr(torch, name))
        micro_batch, update = measured_step(self.gpt.config, run['batch_size'], device, dtype, compiled,
                                            run['activation_checkpointing'],
                                            lambda gpt: make_optimizer(gpt, run, device.type))
        step = micro_batch * run['gradient_accumulation_steps'] / count + update
        evaluation = 2 * math.ceil(run['eval_iters'] / count) * micro_batch / 3
        seconds = step * self.steps + evaluation * self.evaluations
        mfu = self.gpt.flops_per_token() * self.step_tokens / step / count / peak
        everything = ', training all weights' * (self.trained < self.parameters)
        return (f'{_duration(seconds)}: {1000 * step:,.1f} ms a step and {_duration(evaluation)} an evaluation, '
                f'measured just now in {name}{everything}; {mfu:.0%} MFU of {peak / 1e12:.3g} TFLOP/s, measured too')


def resident(held, program):
    """{part: bytes} that a process on a CPU has resident beside the tensors of memory.memory(), as found on Linux: with
    them the resident memory of seven different steps came out to 14% (docs/benchmarks.md)."""
    activations = sum(size for part, size in held.items() if part.startswith('activations'))
    return {'Python and torch': program + 100e6,        # kernels and threads come with the first step
            'gaps left by malloc': 0.5 * activations}


def print_plan(gpt, run, data_tokens, done):
    """Prints the Plan of a run on the hardware that its config names, else on this machine, where some steps are then
    measured."""
    count, name = run['num_devices'] or int(os.environ.get('WORLD_SIZE', 1)), run['device_name']
    if name:
        dtype = run['dtype']
        if dtype == 'auto':
            dtype = 'float16' if re.search('V100|T4', name, re.I) else 'bfloat16'
        plan = Plan(gpt, run, Hardware.named(name, count, dtype), dtype, data_tokens, done)
        print_summary(plan.summary() | {'time': plan.expected_time(run['expected_mfu'])})
        return
    device = check_device(run['device'])
    dtype = precision(device, run['dtype'], gpt.config.n_embd)[0]
    plan = Plan(gpt, run, Hardware.here(device, count), dtype, data_tokens, done)
    print_summary(plan.summary())
    if not plan.fits:
        print_summary({'time': 'not measured, since it does not fit'})
    elif RANK == 0:
        compiled = device.type == 'cuda' if run['compile'] is None else run['compile']
        print_summary({'time': plan.measured_time(device, run['dtype'], compiled)})


def print_summary(said):
    """Prints {label: text}, one line each."""
    for label, text in said.items():
        print0(f'{label:<8} {text}')


def _described(config):
    """A GPTConfig by the fields that GPT-2s differ in, and those of the others that are not as in GPT-2."""
    plain = GPTConfig(**{name: getattr(config, name) for name in SHAPE})
    fields = {name: value for name, value in vars(config).items() if name in SHAPE or value != getattr(plain, name)}
    return f'GPTConfig({", ".join(f"{name}={value!r}" for name, value in fields.items())})'


def _listed(parts, shown):
    """{'MLP: up': 3, 'MLP: down': 4, 'norms': 0} as 'MLP 7'."""
    sums = {}
    for part, number in parts.items():
        name = part.split(':')[0]
        sums[name] = sums.get(name, 0) + number
    return ', '.join(f'{name} {shown(number)}' for name, number in sums.items() if number)


def _short(number):
    """'124M' for 124439808."""
    power = 0
    while number >= 999.5 and power < 4:
        number, power = number / 1000, power + 1
    return f'{number:.3g}{["", "k", "M", "B", "T"][power]}'


def _bytes(number):
    return f'{number / 1e9:.3g} GB' if number >= 1e8 else f'{number / 1e6:.3g} MB'


def _duration(seconds):
    if seconds < 60:
        return f'{seconds:.2g} s'
    return str(timedelta(seconds=round(seconds))) if seconds < 86400 else f'{seconds / 86400:.1f} days'
