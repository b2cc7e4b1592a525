"""
Trains a GPT, on one device or, started by torchrun, on many:

    python train.py config/train_shakespeare_char.py
    python train.py config/train_shakespeare_char.py --resume=auto --max_iters=8000
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""
import contextlib
import functools
import math
import os
import statistics
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import torch
from tqdm import tqdm

import plot
from configurator import configure, overrule
from plaingpt.formats.peft_adapter import save_adapter
from plaingpt.planning import plan as planning
from plaingpt.system import compiling
from plaingpt.system.devices import (default_device, hardware_name, place, precision,
                                     residual_dtype, seed_generator, set_up_math)
from plaingpt.system.messages import UserError, explained, print0, warn
from plaingpt.system.seeds import mixed_seed
from plaingpt.system.signals import RESUMABLE, StopSignal
from plaingpt.text import mixtures
from plaingpt.training import (checkpoints, freezing, learning_rate_search, lora, optimizers,
                               resuming, run_folder, starting_weights, trackers)
from plaingpt.training import metrics as metrics_file
from plaingpt.training.guard import Guard
from plaingpt.training.health import Health
from plaingpt.training.processes import Process, leave, set_up_process
from plaingpt.training.schedules import learning_rate as scheduled_rate
from plaingpt.training.state import Best, RunState

# ---- configuration ----
# Output
out_dir = 'out'                     # folder of the run, relative to the working directory
eval_interval = 2000                # {>= 1} steps between evaluations; each is followed by a save
log_interval = 1                    # {>= 1} steps between printed lines
eval_iters = 200                    # {>= 1} batches of each split in an evaluation
eval_only = False                   # True: evaluate once and stop, writing nothing
always_save_checkpoint = True       # ckpt.pt is the last evaluated state; False: the best one
checkpoint_interval = 0             # {>= 0} steps between further saves of last.pt; 0: none
early_stop = 0                      # {>= 0} end after so many evaluations without a best; 0: never
seed = 1337                         # {[0, 4294967295]} of initial weights, batches and dropout
# Start
init_from = 'scratch'               # scratch, resume, gpt2 to gpt2-xl, hub id, folder, .pt, .gguf
resume = 'never'                    # {'never' | 'auto' | 'always'} the run in out_dir; auto: if any
# Tracker, which shows the figures of metrics.jsonl
tracker = 'none'                    # {'none' | 'wandb' | 'tensorboard' | 'trackio'}
wandb_log = False                   # True: tracker='wandb'; WANDB_MODE=offline needs no account
wandb_project = 'owt'               # project of the run, in wandb and in trackio
wandb_run_name = 'gpt2'             # name of the run, in wandb and in trackio
# Data
dataset = 'openwebtext'             # folder under data/, or shares of several: 'owt:0.7,code:0.3'
prepare = False                     # True: run its prepare.py if train.bin is missing (not 54 GB)
gradient_accumulation_steps = 40    # {>= 1} micro-batches in a step, over all ranks together
batch_size = 12                     # {>= 1} sequences in a micro-batch
block_size = 1024                   # {>= 1} tokens in a sequence
# Model
n_layer = 12                        # {>= 1} blocks
n_head = 12                         # {>= 1} attention heads
n_embd = 768                        # {>= 1} channels, a multiple of n_head
dropout = 0.0                       # {[0, 1)} share of activations zeroed; small corpora need some
bias = False                        # True: biases in linear layers and norms, as GPT-2 has them
position = 'learned'                # {'learned' | 'rope' | 'alibi' | 'none'}
rope_theta = 10000.0                # {> 0} base of the periods of 'rope'
norm = 'layernorm'                  # {'layernorm' | 'rmsnorm'}
mlp = 'gelu'                        # {'gelu' | 'relu2' | 'swiglu'}
mlp_width: int | None = None        # {>= 1} its hidden channels; None: 4 n_embd, for swiglu 8/3
gelu = 'tanh'                       # {'tanh' | 'exact'} GPT-2's form, or nanoGPT's
qk_norm = False                     # True: normalise queries and keys
n_kv_head: int | None = None        # {>= 1} heads of keys and values, divides n_head; None: n_head
head_size: int | None = None        # {>= 1} channels of a head; None: n_embd / n_head
logit_softcap = 0.0                 # {>= 0} bound that logits approach by tanh; 0: no bound
tied = True                         # one matrix is both token embedding and head
zero_init = False                   # True: each block starts as the identity
# Optimizer
optimizer = 'adamw'                 # {'adamw' | 'muon'} muon: matrices of blocks; AdamW the rest
learning_rate = 6e-4                # {>= 0} peak learning rate of AdamW
muon_learning_rate = 0.02           # {>= 0} peak learning rate of Muon
muon_momentum = 0.95                # {[0, 1)} momentum of Muon
max_iters = 600000                  # {>= 0} steps in all
weight_decay = 1e-1                 # {>= 0} of matrices and embeddings
beta1 = 0.9                         # {[0, 1)} decay of AdamW's mean of gradients
beta2 = 0.95                        # {[0, 1)} decay of AdamW's mean of squared gradients
grad_clip = 1.0                     # {>= 0} clip threshold of the gradient norm; 0: no clipping
# Schedule: linear warm-up to learning_rate, decay to min_lr, then flat; Muon's rate in proportion
decay_lr = True                     # False: learning_rate throughout
schedule = 'cosine'                 # {'cosine' | 'linear' | 'wsd'} wsd: flat, then linear decay
decay_share = 0.2                   # {(0, 1]} share of lr_decay_iters in which 'wsd' decays
warmup_iters = 2000                 # {>= 0} steps of warm-up
lr_decay_iters = 600000             # {>= 0} step at which min_lr is reached; usually max_iters
min_lr = 6e-5                       # {>= 0} final learning rate; usually learning_rate / 10
find_lr = False                     # True: try rising rates, suggest one, draw find_lr.png, stop
# Fine-tuning
lora_rank = 0                       # {>= 0} rank of LoRA adapters, trained alone; 0: no LoRA
lora_alpha = 16.0                   # {> 0} adapters are scaled by lora_alpha / lora_rank
lora_dropout = 0.0                  # {[0, 1)} dropout of the adapters' input
lora_targets = 'c_attn'             # layers to adapt: c_attn,c_proj,c_fc, or attn.c_proj for one
trainable = 'all'                   # all, head, last:2 (blocks, with the head), or a regex of names
unfreeze: dict | None = None        # trainable by first step: {0: 'head', 1000: 'last:3'}
# System
backend = 'nccl'                    # {'nccl' | 'gloo' | 'mpi'} between CUDA ranks; others use gloo
device = default_device()           # cuda, cuda:1, mps or cpu; default: the best one here
dtype = 'auto'                      # {'auto' | 'float32' | 'bfloat16' | 'float16'}
compile: bool | None = None         # torch.compile; None: on CUDA only
compile_mode = 'auto'               # that of torch.compile; auto: CUDA graphs for small models
bf16_residual = False               # True: the residual stream is bfloat16 too; less memory
activation_checkpointing = False    # True: less memory for activations, about a third more time
# Plan
plan = False                        # True: print the run's memory, FLOPs and time, and stop
device_name = ''                    # plan for this hardware, such as 'H100 SXM', instead of yours
num_devices: int | None = None      # {>= 1} how many such devices; None: one for each process
expected_mfu = 0.4                  # {(0, 1]} share of its data sheet's FLOP/s it will reach


def problems():
    """Yields what is wrong between keys, beyond the rules in their comments."""
    yield from starting_weights.problems(globals())
    yield from optimizers.problems(globals())
    yield from compiling.problems(globals())
    yield from planning.problems(globals())
    yield from run_folder.problems(globals())
    yield from trackers.problems(globals())
    yield from mixtures.problems(globals())


globals().update(planning.implied_settings(sys.argv[1:]))  # --device_name implies a plan
config, given = configure(globals())

# ---- processes and device ----
# A plan needs no device.
process = Process(torch.device('meta')) if plan else set_up_process(device, backend)
torch_device = process.device
is_main = process.rank == 0
is_writer = is_main and not (eval_only or plan or find_lr)
set_up_math(seed, torch_device, keep_memory=not activation_checkpointing)
units = process.share(gradient_accumulation_steps, batch_size)  # this rank's part of each step

# ---- what to resume ----
if is_writer and checkpoints.present(out_dir):
    run_folder.enter(out_dir)  # lock it before anything is read
saved, saved_path = resuming.to_resume(out_dir, init_from, resume, process.restarted())
is_resumed = bool(saved)
if is_resumed:
    # The checkpoint decides the architecture and the data set; everything else follows the flags.
    decided = starting_weights.settings_decided_by(saved, saved_path)
    decided['dataset'] = resuming.data_set(saved, saved_path, dataset)
    decided = overrule(config, given, decided)
    globals().update(decided)
    not_worth_saying = ('init_from', 'resume', 'out_dir', *decided, *planning.KEYS)
    print0(resuming.describe_resume(saved, saved_path, config, not_worth_saying))

# ---- data ----
may_prepare = prepare and not plan
with process.together():
    if may_prepare and is_main:
        mixtures.prepare_missing(dataset)
with process.together():  # on machines that do not share the first one's disk
    if may_prepare and process.local_rank == 0:
        mixtures.prepare_missing(dataset)
if not process.agree(resuming.fingerprint(saved)):
    raise UserError(f'the processes find different states in {out_dir}, which must be on a disk '
                    'that all share')
with process.together():  # the data may be missing on one of several machines
    data = mixtures.open_run_data(dataset, block_size, may_be_missing=plan)

# ---- model ----
hardware = planning.Hardware.here(torch_device, process.world_size)  # while its memory is empty
with torch.device('meta' if plan else 'cpu'):
    run_model = starting_weights.model_for_run(config, saved, saved_path, data.meta)
gpt = run_model.gpt  # the bare model, whose names are the saved ones
overrule(config, given, asdict(gpt.config))
tokenizer = run_model.tokenizer or data.meta['tokenizer']  # of the same vocabulary
data.check_fit(gpt.config.vocab_size, run_model.tokenizer)
if plan:
    planning.print_plan(gpt, config, data.parts, saved.get('iter_num', 0))
    leave(0)
place(gpt, torch_device)
precision_name, autocast, scaler = precision(torch_device, dtype, gpt.config.n_embd)
gpt.checkpointing = activation_checkpointing
gpt.residual_dtype = residual_dtype(bf16_residual, precision_name)

# ---- optimizer ----
weight_optimizer = optimizers.make_optimizer(gpt, config, torch_device.type)
freezing.freeze(gpt, saved.get('iter_num', 0), config)
if is_resumed and not eval_only:
    resuming.restore_optimizer(weight_optimizer, scaler, saved, saved_path)
guard = Guard(process, weight_optimizer, scaler, grad_clip)
health = Health(gpt)

# ---- state, and the folder it is saved in ----
state = RunState.from_checkpoint(saved)
del saved  # and free its tensors
metrics = None  # on ranks that write nothing
if is_writer:
    run_folder.enter(out_dir)
    run_tracker = trackers.connect(config, state.run_id)  # before anything is moved or cut
    if is_resumed or resume == 'auto':
        run_folder.reopen(out_dir, state.step)
    else:
        run_folder.start_new(out_dir)
    if run_tracker:
        run_tracker.start(state.step, metrics_file.entries(out_dir))
    metrics = metrics_file.Metrics(out_dir, run_tracker)
unsaved = ''  # why the newest state could not be saved; empty if it was


def save(names):
    """Saves the state under these names, 'ckpt' or 'last'; returns why that failed, or ''."""
    checkpoint = {
        'model': lora.adapter_state(gpt) if run_model.lora else gpt.state_dict(),
        'optimizer': weight_optimizer.state_dict(),
        'moments': len(weight_optimizer.state),
        'scaler': scaler.state_dict(),
        'model_args': asdict(gpt.config),
        'lora': asdict(run_model.lora) if run_model.lora else None,
        'tokenizer': tokenizer,
        'config': config,
        'seed': seed,
        'job': resuming.JOB,
        **state.to_checkpoint(),
    }
    try:
        run_folder.claim(out_dir)  # it may have been removed, and another run started there
        # The adapter goes first: a checkpoint that names a new best must not outrun it.
        if run_model.lora and 'ckpt' in names:
            save_adapter(os.path.join(out_dir, 'adapter'), gpt, run_model.lora, tokenizer)
        checkpoints.save(out_dir, checkpoint, names)
    except checkpoints.NotFinite as error:
        give_up(f'{error} after step {state.step}, so that state is not saved', state.step)
    except OSError as error:
        return f'the state of step {state.step} could not be saved in {out_dir} ({error})'
    return ''


def give_up(reason, step):
    """Ends the run on all ranks because numbers are not finite since this step."""
    sentence = f'{reason}; resume from the last state with a lower learning_rate'
    if is_main:
        tokens = state.tokens - (state.step - step) * tokens_per_step
        metrics.write({'step': step, 'tokens': tokens, 'error': sentence})
    raise UserError(sentence)


# ---- one training step ----
tokens_per_step = gradient_accumulation_steps * batch_size * block_size


def seed_dropout(step, unit):
    """Makes dropout a function of seed, step and batch, so no generator's state has to be saved."""
    number = unit.micro_batch * unit.parts + unit.part
    if torch_device.type == 'cpu' and not compiled:
        # Row by row: ranks that share the rows of a micro-batch draw what one rank would draw.
        gpt.kernels.set_rows(unit.part, unit.parts)
        number = unit.micro_batch
    seed_generator(torch_device, mixed_seed(seed, step, number))


def backward(step, unit):
    """Adds the gradients of one unit of a step; returns its part of this rank's loss."""
    x, y = data.train.batch(seed, 'train', step, unit.micro_batch, batch_size, block_size,
                            torch_device, unit.part, unit.parts)
    seed_dropout(step, unit)
    # DDP averages the gradients of the ranks once a step, in the backward pass of the last unit.
    averages_now = model is gpt or unit == units[-1]
    with contextlib.nullcontext() if averages_now else model.no_sync():
        if has_graphs:
            # From here on the graphs may overwrite what they have returned before.
            torch.compiler.cudagraph_mark_step_begin()
        with autocast():
            _, loss = model(x, y, with_logits=False)
            loss = loss / len(units)
        scaler.scale(loss).backward()
    return loss.detach()


def train_step(step, rate):
    """Runs training step `step`, counted from 0, at learning rate `rate`."""
    for group in weight_optimizer.param_groups:
        group['lr'] = rate * group['factor']
    loss = sum(backward(step, unit) for unit in units)
    loss = loss / process.world_size  # this rank's share of the mean over ranks
    scaler.unscale_(weight_optimizer)
    clip_at = grad_clip if grad_clip > 0 else math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), clip_at)
    will_be_logged = (step + 1) % log_interval == 0 or step == 0
    with health.watch(is_main and will_be_logged):
        guard.step(step + 1, loss, grad_norm)
    weight_optimizer.zero_grad(set_to_none=not has_graphs)


# ---- evaluation ----
@torch.no_grad()
def loss_of(stream, tokens, number):
    """Loss on batch `number` of this stream, drawn from a TokenFile or a Mixture."""
    x, y = tokens.batch(seed, stream, 0, number, batch_size, block_size, torch_device)
    if has_graphs:
        torch.compiler.cudagraph_mark_step_begin()
    with autocast():
        _, loss = gpt(x, y, with_logits=False)
    return loss


def evaluate():
    """Mean losses over the same eval_iters batches every time, as metrics.jsonl names them.

    The validation loss of a mixture is the mean over its data sets, weighted by their shares. None
    if a signal asks the run to stop meanwhile."""
    gpt.eval()
    evaluated = [('eval-train', data.train)]
    evaluated += [('eval-val', val_file) for val_file in data.val_files]
    # Each rank fills in the losses of its own batches; the sum over ranks completes the tensors.
    losses = [torch.zeros(eval_iters, device=torch_device) for _ in evaluated]
    own_batches = range(process.rank, eval_iters, process.world_size)
    bar = tqdm(total=len(evaluated) * len(own_batches), desc='eval', leave=False,
               disable=None if is_main else True)
    for (stream, tokens), values in zip(evaluated, losses, strict=True):
        for number in own_batches:
            if stop_signal.name is not None:
                break
            values[number] = loss_of(stream, tokens, number)
            bar.update()
    bar.close()
    gpt.train()
    if process.any(stop_signal.name is not None):
        return None
    train_loss, *val_losses = [process.sum(values).mean().item() for values in losses]
    return data.losses(train_loss, val_losses)


# ---- distributed, compiled ----
model = gpt if eval_only else process.averaging(gpt)
compiled = torch_device.type == 'cuda' if compile is None else compile
chosen_mode = compiling.choose_mode(gpt, torch_device, compile_mode, process.world_size)
has_graphs = compiled and compiling.uses_cuda_graphs(chosen_mode, torch_device)
if compiled:
    # The trial runs through DDP, because torch.compile splits the backward pass for it.
    model.train(not eval_only)
    trial = functools.partial(backward, 0, units[-1])
    if eval_only:
        trial = functools.partial(loss_of, 'eval-val', data.val_files[0], 0)
    elif has_graphs:
        compiling.keep_gradients(gpt)
    compiled = compiling.compile_or_warn(gpt, trial, mode=chosen_mode)
    has_graphs = has_graphs and compiled
    gpt.zero_grad(set_to_none=not has_graphs)

# ---- summary ----
if not eval_only:
    run_plan = planning.Plan.of_run(gpt, config, hardware, precision_name, data.parts,
                                    state.step, compiled)
    machine = f'{process.world_size} x {hardware_name(torch_device)}'
    mode = 'compiled' if compiled else 'eager'
    planning.print_summary({
        'machine': f'{machine}, {precision_name}, {mode}',
        'data': data.describe(),
        **run_plan.summary(),
    })

# ---- learning-rate search ----
if find_lr:
    with explained(OSError, prefix='out_dir cannot be written: '):
        os.makedirs(out_dir, exist_ok=True)
    sweep = learning_rate_search.find(train_step, guard, state.step)
    if is_main:
        plot.draw_sweep(sweep.rates, sweep.losses, sweep.smoothed, sweep.suggestion,
                        os.path.join(out_dir, 'find_lr.png'))
    leave(0)

# ---- evaluation alone ----
stop_signal = StopSignal()  # from here on a signal is noted, and the loop below ends by itself
if eval_only:
    losses = evaluate()
    if losses is None:
        leave(RESUMABLE)
    tokens = eval_iters * batch_size * block_size
    print0(f'{metrics_file.describe_losses(losses)} (on {tokens:,} tokens)')
    leave(0)

# ---- training ----
trained = False         # whether this session has taken a step
stopping = False        # whether a signal asks for the end, on any rank
step_times = []         # seconds of each step since the last line of the log
evaluation_time = 0.0   # seconds of the last evaluation
session_start = time.perf_counter() - state.elapsed
progress = tqdm(total=max_iters, initial=state.step, unit='step', disable=None if is_main else True)

while True:
    # What is due at this step? Nothing before the update changes the training, so a run that is
    # resumed here can safely repeat it: it writes the same line and saves the same state.
    finished = state.step >= max_iters
    evaluation_due = finished or state.step % eval_interval == 0
    extra_save_due = checkpoint_interval > 0 and state.step % checkpoint_interval == 0
    save_due = evaluation_due or extra_save_due
    log_due = trained and (state.step % log_interval == 0 or state.step == 1)

    # Read from the device how the last steps went. Other steps need not wait for it.
    if trained and (log_due or save_due or stopping):
        wait_start = time.perf_counter()
        report = guard.read()
        step_times[-1] += time.perf_counter() - wait_start
        if report.halted:
            halt = report.halted
            give_up(f'after step {halt.step - 1} the loss is {halt.loss} and the gradient norm '
                    f'{halt.grad_norm}: stopped before they reached the weights', halt.step)
        state.count(report)
    if trained:
        state.elapsed = time.perf_counter() - session_start

    # Log.
    if log_due:
        seconds = statistics.mean(step_times)
        step_times.clear()
        sequences = gradient_accumulation_steps * batch_size / process.world_size
        state.figures = {
            **state.close_line(report),
            'lr': scheduled_rate(state.step - 1, config),
            'ms_per_step': 1000 * seconds,
            'tokens_per_s': tokens_per_step / seconds,
            'mfu': gpt.estimate_mfu(sequences, seconds),
            **health.figures(),
        }
        steps_left = max_iters - state.step
        eta = steps_left * (seconds + evaluation_time / eval_interval)
        print0(f'step {state.step}: {metrics_file.describe(state.figures)}, '
               f'ETA {timedelta(seconds=round(eta))}')
    if state.skipped > 0 and (log_due or evaluation_due):
        state.figures['skipped'] = state.skipped
        state.skipped = 0

    # Evaluate, unless a signal has come or comes meanwhile.
    losses = None
    if evaluation_due and not stopping:
        evaluation_start = time.perf_counter()
        losses = evaluate()
        evaluation_time = time.perf_counter() - evaluation_start
        stopping = losses is None
    if stopping:
        if is_main and state.step > 0:
            unsaved = save(['last'])
        break
    previous_best = state.best
    improved = False
    if evaluation_due:
        train_loss = losses['train_loss']
        val_loss = losses['val_loss']
        improved = val_loss < state.best.loss
        marker = ', the best' if improved else ''
        print0(f'step {state.step}: {metrics_file.describe_losses(losses)}{marker}')
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            give_up(f'the losses are {[train_loss, val_loss]} after step {state.step}, so that '
                    'state is not saved', state.step)
        if improved:
            state.best = Best(val_loss, state.step)
        if early_stop > 0 and state.evaluations_since_best(eval_interval) >= early_stop:
            finished = True

    # Record.
    line = dict(state.figures)
    if evaluation_due:
        line.update(losses)
    if line and is_main:
        metrics.write({'step': state.step, 'tokens': state.tokens, **line,
                       'elapsed': state.elapsed})

    # Save. If the disk is full, training continues, and the next save is tried as usual.
    if save_due:
        names = ['last']
        if evaluation_due and (improved or always_save_checkpoint):
            names.insert(0, 'ckpt')  # first, so that last.pt never names a best that is not saved
        if is_main:
            unsaved = save(names)
            if unsaved and not finished:
                warn(f'{unsaved}; training continues, and the next save will try again')
        if process.any(unsaved != ''):
            state.best = previous_best  # the weights of the new best are not on the disk
    if finished:
        break

    # Update the weights.
    step_start = time.perf_counter()
    if unfreeze and state.step in unfreeze and freezing.freeze(gpt, state.step, config):
        model = process.averaging(gpt)
        if compiled:
            # torch 2.11 would keep the code that trains only what was trained before.
            torch.compiler.reset()
        if has_graphs:
            compiling.keep_gradients(gpt)
    train_step(state.step, scheduled_rate(state.step, config))
    state.step += 1
    state.tokens += tokens_per_step
    state.figures = {}
    trained = True
    stopping = process.any(stop_signal.name is not None)
    step_times.append(time.perf_counter() - step_start)
    progress.update()

# ---- end ----
progress.close()
if is_main:
    if unsaved:
        raise UserError(unsaved)
    metrics.close()
if stopping:
    by = f' by {stop_signal.name}' if stop_signal.name else ''  # it may have reached another rank
    print0(f'stopped{by} at step {state.step}; to continue, add --resume=auto to the same command')
    leave(RESUMABLE)
summary = (f'done: best validation loss {state.best.loss:.4f}, '
           f'{timedelta(seconds=round(state.elapsed))} in all')
if state.step < max_iters:
    summary += f', ended by early_stop={early_stop} at step {state.step}'
print0(f'{summary}. Now try:\npython sample.py --out_dir={out_dir}')
if is_main:
    plot.draw_finished(out_dir)
leave(0)
