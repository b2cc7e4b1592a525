"""
The plan of a run: its parameters, memory, FLOPs and time, before it starts. train.py prints it at
each start, and stops there with --plan=True:

    python train.py config/train_gpt2.py --plan=True
    python train.py config/train_gpt2.py --device_name="H100 SXM" --num_devices=8

References:
[1] Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B: FLOPs per token and MFU
[2] Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, arXiv 2203.15556
    (Chinchilla)
"""
import math
import os
from dataclasses import fields

import torch

from model import GPTConfig
from plaingpt.planning.counts import parameters
from plaingpt.planning.data_sheets import data_sheet, is_before_ampere
from plaingpt.planning.hardware import Hardware
from plaingpt.planning.memory import resident_memory, step_memory
from plaingpt.planning.run_size import RunSize
from plaingpt.planning.speed import StepSettings, measured_peak, measured_step
from plaingpt.planning.units import short_bytes, short_number, short_time
from plaingpt.system.devices import check_device, precision, residual_dtype, set_up_math
from plaingpt.system.messages import RANK, complaints, print0
from plaingpt.training.optimizers import make_optimizer
from plaingpt.training.processes import Process

# The keys of train.py that say nothing about a run itself.
KEYS = ('plan', 'device_name', 'num_devices', 'expected_mfu')
# The fields of a GPTConfig that are always printed; the others only where they differ from GPT-2.
SHAPE = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
# Of the compute-optimal models in [2], table 3: 20.0 at 400M, 20.2 at 1B, 20.5 at 10B.
TOKENS_A_PARAMETER = 20


# ---- settings ----

def implied_settings(arguments):
    """Settings that the command line implies: --device_name asks for a plan for a CUDA device.

    train.py puts them in place of its defaults, before it reads flags and config files."""
    for argument in arguments:
        if argument.startswith('--device_name=') and argument != '--device_name=':
            return {'plan': True, 'device': 'cuda'}
    return {}


def problems(run):
    """Yields what is wrong with the architecture, the device, and the keys about plans."""
    shape = {field.name: run[field.name] for field in fields(GPTConfig) if field.name in run}
    try:
        GPTConfig(**shape)
    except ValueError as error:
        yield from str(error).split('; ')

    if run['plan'] and run['eval_only']:
        yield 'plan=True is about training: leave out eval_only=True'
    if run['find_lr'] and run['eval_only']:
        yield 'find_lr=True is about training: leave out eval_only=True'
    if run['plan'] and run['find_lr']:
        yield 'plan=True takes no steps, and find_lr=True needs some: leave out one of them'

    name = run['device_name']
    if not name:
        yield from complaints(check_device, run['device'])
        return
    if not run['plan']:
        yield f'device_name={name!r} is for a plan: leave out plan=False'
    if run['device'] != 'cuda':
        yield f"device_name={name!r} means device='cuda': leave out device={run['device']!r}"
    if data_sheet(name) is None:
        yield (f'device_name={name!r} has no data sheet in plaingpt/planning/data_sheets.py, which '
               'has H200, H100 SXM, A100, RTX 4090 and others')


# ---- the plan ----

class Plan:
    """What a run takes: this GPT, at this RunSize, on this Hardware.

    The GPT may be on the meta device. UserError if the devices can't share a step."""

    def __init__(self, gpt, size, hardware, precision_name):
        self.gpt = gpt
        self.size = size
        self.hardware = hardware
        self.parameters = gpt.get_num_params(non_embedding=False)
        self.trained = self.parameters if size.trained is None else size.trained

        # Work: a token costs so many FLOPs forward and backward [1], and forward a third of that.
        block_size = gpt.config.block_size
        self.steps = max(0, size.max_steps - size.steps_done)
        self.step_tokens = size.micro_batches * size.batch_size * block_size
        self.tokens = self.steps * self.step_tokens
        self.flops = gpt.flops_per_token() * self.tokens
        self.evaluations = 1 + math.ceil(self.steps / size.eval_interval)  # one before step 1
        batches = size.eval_splits * size.eval_batches * self.evaluations
        self.evaluation_flops = gpt.flops_per_token() / 3 * batches * size.batch_size * block_size

        # Memory of the first device; the others have the same share of a step.
        first = Process(torch.device('meta'), world_size=hardware.count)
        units = first.share(size.micro_batches, size.batch_size)
        self.memory = step_memory(
            gpt.config, size.batch_size // units[0].parts, precision_name, hardware.device_type,
            accumulating=len(units) > 1, checkpointing=size.checkpointing,
            distributed=hardware.count > 1, trainable=self.trained, moments=size.moments,
            update_memory=size.update_memory, float32_buffers=hardware.float32_buffers,
            compiled=size.compiled, bf16_residual=gpt.residual_dtype == torch.bfloat16,
            has_flash=hardware.has_flash)
        if hardware.program:
            self.memory |= resident_memory(self.memory, hardware.program)
        needed = sum(self.memory.values())
        self.fits = hardware.memory is None or needed < hardware.memory

    @classmethod
    def of_run(cls, gpt, run, hardware, precision_name, data, steps_done=0, compiled=None):
        """The plan of a run with this config of train.py.

        data: the Parts of its data, see mixtures.py. compiled: whether the model is; None: as the
        config says."""
        if compiled is None:
            compiled = run['compile']
        if compiled is None:
            compiled = hardware.device_type == 'cuda'
        size = RunSize.of_run(gpt, run, data, steps_done, compiled)
        return cls(gpt, size, hardware, precision_name)

    def summary(self):
        """{label: text} of all that can be said without measuring anything."""
        said = {
            'model': self._model_text(),
            'step': self._step_text(),
            'run': self._run_text(),
            'compute': self._compute_text(),
            'memory': self._memory_text(),
            'disk': self._disk_text(),
        }
        if self.tokens > 0:
            said['scale'] = self._scale_text()
        return said

    def _model_text(self):
        text = f'{self.parameters:,} parameters'
        if self.trained < self.parameters:
            text += f', {self.trained:,} of them trained'
        listed = sums_by_part(parameters(self.gpt.config), short_number)
        return f'{text}: {listed}; {describe(self.gpt.config)}'

    def _step_text(self):
        size = self.size
        text = (f'{self.step_tokens:,} tokens: micro-batches x sequences x positions '
                f'{size.micro_batches} x {size.batch_size} x {self.gpt.config.block_size}')
        if self.hardware.count > 1:
            text += f', shared by {self.hardware.count} devices'
        return text

    def _run_text(self):
        size = self.size
        text = f'{self.steps:,} steps: {self.tokens:,} tokens'
        for part in size.data:
            text += f', {self._epochs_text(part)}'
        if self.steps < size.max_steps:
            text += f'; {size.steps_done:,} of {size.max_steps:,} are done'
        return text

    def _epochs_text(self, part):
        """How often the run reads a data set, of which it has a share of its windows."""
        if part.tokens is None:
            return f'epochs unknown without {part.name}'
        epochs = self.tokens * part.share / part.tokens
        if len(self.size.data) == 1:
            return f'{epochs:.2f} epochs of {part.tokens:,}'
        return f'{epochs:.2f} epochs of {part.name} ({part.tokens:,})'

    def _compute_text(self):
        per_token = short_number(self.gpt.flops_per_token())
        text = (f'{self.flops + self.evaluation_flops:.3g} FLOPs: {per_token} for each token, '
                'forward and backward')
        if self.evaluation_flops > 0:
            text += f', {self.evaluation_flops:.3g} in evaluations'
        return text

    def _memory_text(self):
        needed = short_bytes(sum(self.memory.values()))
        text = f'{needed} a device at the peak: {sums_by_part(self.memory, short_bytes)}'
        if self.hardware.memory is not None:
            verdict = 'it fits' if self.fits else 'it does NOT fit'
            room = short_bytes(self.hardware.memory)
            text += f'; {self.hardware.name} has {room} for it: {verdict}'
        return text

    def _disk_text(self):
        saved = self.trained if self.size.adapter_only else self.parameters
        checkpoint = 4 * saved + self.memory['optimizer state']
        return f'{short_bytes(checkpoint)} a checkpoint; out_dir holds up to four'

    def _scale_text(self):
        # With F = 6 N D FLOPs and D = 20 N tokens, the best N is the square root of F / 120 [2].
        best = math.sqrt(self.flops / (6 * TOKENS_A_PARAMETER))
        best_tokens = TOKENS_A_PARAMETER * best
        return (f'{self.tokens / self.parameters:,.1f} tokens a parameter; Chinchilla would spend '
                f'as many FLOPs on {short_number(best)} parameters and {short_number(best_tokens)} '
                f'tokens, {TOKENS_A_PARAMETER} for each')

    # ---- time ----

    def expected_time(self, mfu):
        """How long the run takes at this share of the hardware's peak, which must be known."""
        name, count, peak = self.hardware.name, self.hardware.count, self.hardware.flops
        seconds = (self.flops + self.evaluation_flops) / (count * peak * mfu)
        return (f'{short_time(seconds)} on {count} x {name}, at {mfu:.0%} MFU (expected_mfu) of '
                f'{peak / 1e12:.4g} TFLOP/s each')

    def measured_time(self, run, device):
        """How long the run takes on this torch.device, from some steps that are timed now.

        run: the config of train.py. Several devices are assumed to share the work perfectly."""
        config = self.gpt.config
        size = self.size
        count = self.hardware.count
        set_up_math(run['seed'], device)
        name, _, _ = precision(device, run['dtype'], config.n_embd)

        def optimizer_of(gpt):
            return make_optimizer(gpt, run, device.type)

        peak = measured_peak(device, getattr(torch, name))
        settings = StepSettings(run['dtype'], size.compiled, run['compile_mode'],
                                run['bf16_residual'], size.checkpointing)
        micro_batch, update = measured_step(config, size.batch_size, device, settings,
                                            optimizer_of)
        step = micro_batch * size.micro_batches / count + update
        # An evaluation goes forward through batches of all splits, a third of the work.
        batches = size.eval_splits * math.ceil(size.eval_batches / count)
        evaluation = batches * micro_batch / 3
        seconds = step * self.steps + evaluation * self.evaluations
        mfu = self.gpt.flops_per_token() * self.step_tokens / step / count / peak

        text = (f'{short_time(seconds)}: {1000 * step:,.1f} ms a step and {short_time(evaluation)} '
                f'an evaluation, measured just now in {name}')
        if self.trained < self.parameters:
            text += ', training all weights'
        return f'{text}; {mfu:.0%} MFU of {peak / 1e12:.3g} TFLOP/s, measured too'


def print_plan(gpt, run, data, steps_done):
    """Prints the plan of a run with this config of train.py, as Plan.of_run() makes it.

    With device_name, it is for that hardware; without, for this machine, where it times a step."""
    count = run['num_devices'] or int(os.environ.get('WORLD_SIZE', 1))
    name = run['device_name']
    if name:
        precision_name = run['dtype']
        if precision_name == 'auto':
            precision_name = 'float16' if is_before_ampere(name) else 'bfloat16'
        hardware = Hardware.named(name, count, precision_name)
        gpt.residual_dtype = residual_dtype(run['bf16_residual'], precision_name)
        plan = Plan.of_run(gpt, run, hardware, precision_name, data, steps_done)
        print_summary(plan.summary())
        print_summary({'time': plan.expected_time(run['expected_mfu'])})
        return

    device = check_device(run['device'])
    precision_name, _, _ = precision(device, run['dtype'], gpt.config.n_embd)
    hardware = Hardware.here(device, count)
    gpt.residual_dtype = residual_dtype(run['bf16_residual'], precision_name)
    plan = Plan.of_run(gpt, run, hardware, precision_name, data, steps_done)
    print_summary(plan.summary())
    if not plan.fits:
        print_summary({'time': 'not measured, since it does not fit'})
    elif RANK == 0:
        print_summary({'time': plan.measured_time(run, device)})


def print_summary(said):
    """Prints {label: text}, one line each."""
    for label, text in said.items():
        print0(f'{label:<8} {text}')


def describe(config):
    """A GPTConfig as code: the shape, and all in which it differs from GPT-2."""
    shape = {name: getattr(config, name) for name in SHAPE}
    gpt2 = GPTConfig(**shape)
    words = []
    for name, value in vars(config).items():
        if name in SHAPE or value != getattr(gpt2, name):
            words.append(f'{name}={value!r}')
    return f'GPTConfig({", ".join(words)})'


def sums_by_part(parts, written):
    """{'MLP: up': 3, 'MLP: down': 4, 'norms': 0} as 'MLP 7', each number as `written` writes it."""
    sums = {}
    for part, number in parts.items():
        name, _, _ = part.partition(':')
        sums[name] = sums.get(name, 0) + number
    return ', '.join(f'{name} {written(number)}' for name, number in sums.items() if number > 0)
