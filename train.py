"""
Trains a GPT, on one device or, started by torchrun, on many. Run any of these:

    python train.py config/train_shakespeare_char.py
    python train.py config/train_shakespeare_char.py --init_from=resume --max_iters=8000
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""
import contextlib
import math
import os
import secrets
import time
from dataclasses import asdict, fields
from datetime import timedelta

import torch
from tqdm import tqdm

import plot
from configurator import configure, overrule
from model import GPT, GPTConfig
from plaingpt.formats import peft_adapter
from plaingpt.planning import plan as plan_module
from plaingpt.system.devices import compile_or_warn, default_device, hardware_name, precision, set_up_math
from plaingpt.system.messages import UserError, explained, print0, warn
from plaingpt.system.seeds import seed_dropout
from plaingpt.system.signals import RESUMABLE, StopSignal
from plaingpt.text import data_sets
from plaingpt.text.publishing import prepare_if_missing
from plaingpt.training import checkpoints, freezing, optimizers, rate_search, run_folder, starting_weights
from plaingpt.training import guard as guard_module
from plaingpt.training import health as health_module
from plaingpt.training import lora as lora_module
from plaingpt.training import metrics as metrics_module
from plaingpt.training.processes import Process, leave, set_up_process

# ---- configuration ----
# Output
out_dir = 'out'                     # folder of the run: checkpoints and metrics.jsonl, relative to where you are
eval_interval = 2000                # >= 1 steps from one evaluation, and save, to the next
log_interval = 1                    # >= 1 steps from one printed line to the next
eval_iters = 200                    # >= 1 batches of each split that an evaluation averages
eval_only = False                   # evaluate once and stop; writes nothing
always_save_checkpoint = True       # ckpt.pt is the newest state; False: the one with the best validation loss
checkpoint_interval = 0             # >= 0 steps between saves of last.pt besides those at evaluations; 0: none
init_from = 'scratch'               # scratch, resume, auto (resume if out_dir has a run), gpt2…gpt2-xl, hub id, folder
early_stop = 0                      # >= 0 evaluations without a better validation loss that end the run; 0: any number
seed = 1337                         # [0, 4294967295] of the initial weights, the batches and dropout
# Weights & Biases
wandb_log = False                   # log there too (WANDB_MODE=offline works without an account)
wandb_project = 'owt'               # project of the run
wandb_run_name = 'gpt2'             # name of the run
# Data
dataset = 'openwebtext'             # folder under data/ with train.bin, val.bin and meta.json
prepare = False                     # True: run the data set's prepare.py when train.bin is missing
gradient_accumulation_steps = 40    # >= 1 micro-batches in a step, over all ranks together
batch_size = 12                     # >= 1 sequences in a micro-batch
block_size = 1024                   # >= 1 tokens in a sequence
# Model
n_layer = 12                        # >= 1 blocks
n_head = 12                         # >= 1 attention heads
n_embd = 768                        # >= 1 channels, a multiple of n_head
dropout = 0.0                       # [0, 1) share of activations zeroed in training; little data needs some
bias = False                        # False drops them from linear layers and norms; GPT-2 itself has them
position = 'learned'                # 'learned' | 'rope' | 'alibi' | 'none'
rope_theta = 10000.0                # > 0, base of the periods of 'rope'
norm = 'layernorm'                  # 'layernorm' | 'rmsnorm'
mlp = 'gelu'                        # 'gelu' | 'relu2' | 'swiglu'
qk_norm = False                     # True: queries and keys are normalised
n_kv_head: int | None = None        # >= 1 heads of keys and values, a divisor of n_head; None: n_head
logit_softcap = 0.0                 # >= 0, the highest logit, approached by tanh; 0.0: any
tied = True                         # one matrix reads tokens and writes logits
zero_init = False                   # True: each block begins as the identity
# Optimizer
optimizer = 'adamw'                 # 'adamw' | 'muon' (for the matrices of the blocks, AdamW for the rest)
learning_rate = 6e-4                # >= 0, the highest of AdamW
muon_learning_rate = 0.02           # >= 0, the highest of Muon
muon_momentum = 0.95                # [0, 1) of Muon
max_iters = 600000                  # >= 0 steps in all
weight_decay = 1e-1                 # >= 0, of matrices and embeddings
beta1 = 0.9                         # [0, 1) decay of the mean of gradients
beta2 = 0.95                        # [0, 1) decay of the mean of their squares
grad_clip = 1.0                     # >= 0, the longest gradient; 0.0: any
# Schedule: linear warm-up to learning_rate, decay to min_lr, then flat; Muon's rate is in proportion
decay_lr = True                     # False: learning_rate throughout
schedule = 'cosine'                 # 'cosine' | 'linear' | 'wsd' (flat, then linear)
decay_share = 0.2                   # (0, 1] of lr_decay_iters in which 'wsd' decays
warmup_iters = 2000                 # >= 0 steps of warm-up
lr_decay_iters = 600000             # >= 0, the step at which min_lr is reached; usually max_iters
min_lr = 6e-5                       # >= 0, usually learning_rate / 10
find_lr = False                     # True: try rising learning rates, suggest one, draw out_dir/find_lr.png, and stop
# Fine-tuning
lora_rank = 0                       # >= 0 of LoRA's adapters, which alone are trained and saved; 0: no LoRA
lora_alpha = 16.0                   # > 0, the adapters are scaled by lora_alpha / lora_rank
lora_dropout = 0.0                  # [0, 1) of what enters the adapters
lora_targets = 'c_attn'             # layers with adapters: c_attn,c_proj,c_fc or attn.c_proj for one of two
trainable = 'all'                   # all, head, last:2 (head and last blocks), or a regular expression of names
unfreeze: dict | None = None        # {first step: trainable, …}, as {0: 'head', 1000: 'last:3', 2000: 'all'}
# System
backend = 'nccl'                    # 'nccl' | 'gloo' | 'mpi' between CUDA ranks; other devices take gloo
device = default_device()           # cuda, cuda:1, mps or cpu; unless told, the best one here
dtype = 'auto'                      # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile: bool | None = None         # torch.compile; None: on CUDA only
activation_checkpointing = False    # True: less memory for activations, about a third more time
# Plan
plan = False                        # True: say what the run would take (memory, FLOPs, time), and stop; writes nothing
device_name = ''                    # hardware to plan for that is not here, as 'H100 SXM', with --device=cuda
num_devices: int | None = None      # >= 1 such devices, on a network that costs nothing; None: one for each process
expected_mfu = 0.4                  # (0, 1] share of the data sheet's FLOP/s that such hardware will reach


def problems():  # between keys, on top of what their comments allow
    for room in starting_weights, optimizers, plan_module, run_folder:
        yield from room.problems(globals())


config, given = configure(globals())

# ---- device and processes ----
process = Process(torch.device('meta')) if plan else set_up_process(device, backend)
device, rank, world_size = process.device, process.rank, process.world_size
set_up_math(seed, device)
parts, units = process.share(gradient_accumulation_steps, batch_size)
writing = rank == 0 and not (eval_only or plan or find_lr)

# ---- what to continue ----
if writing and checkpoints.present(out_dir):
    run_folder.enter(out_dir)  # before it is read; no folder is made before all has been checked
init_from, resumed, resumed_path = checkpoints.to_continue(out_dir, init_from, process.restarted())
if resumed:
    decided = starting_weights.decided_by(resumed, resumed_path)
    decided['dataset'] = checkpoints.data_set(resumed, resumed_path, dataset)
    globals().update(overrule(config, given, decided))
    print0(checkpoints.in_words(resumed, resumed_path, config, ('init_from', 'out_dir', *decided, *plan_module.KEYS)))
tokens_per_step = gradient_accumulation_steps * batch_size * block_size

# ---- data ----
data_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', dataset)
for first in (rank == 0, process.local_rank == 0):  # one process, then one on each machine that does not see its disk
    if prepare and first and not plan and dataset != 'openwebtext':
        prepare_if_missing(data_dir)
    if not process.agree(checkpoints.fingerprint(resumed)):  # the others wait here
        raise UserError(f'the processes find different states in {out_dir}, which must be on a disk that all share')
meta, train_data, val_data = data_sets.open_data_set(data_dir, block_size, may_be_missing=plan)

# ---- model ----
hardware = plan_module.Hardware.here(device, world_size)  # before there is a model in its memory
with torch.device('meta' if plan else 'cpu'), explained(ValueError):
    if init_from == 'scratch' and not lora_rank:
        shape = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
        gpt, tokenizer, lora = GPT(GPTConfig(**shape, vocab_size=data_sets.rounded_vocab_size(meta))), None, None
    else:
        gpt, tokenizer, lora = starting_weights.go_on(config, init_from, resumed, resumed_path)
        overrule(config, given, {key: value for key, value in asdict(gpt.config).items() if key in config})
if train_data:
    data_sets.check_fit(data_dir, meta, (train_data, val_data), gpt.config.vocab_size, tokenizer)
if plan:
    plan_module.print_plan(gpt, config, train_data and len(train_data), resumed.get('iter_num', 0))
    leave(0)
gpt.to(device).checkpointing = activation_checkpointing

# ---- optimizer ----
precision_name, autocast, scaler = precision(device, dtype, gpt.config.n_embd)
optimizer = optimizers.make_optimizer(gpt, config, device.type)
freezing.freeze(gpt, resumed.get('iter_num', 0), config)
if resumed and not eval_only:
    checkpoints.restore_optimizer(optimizer, scaler, resumed, resumed_path)
guard, health = guard_module.Guard(process, optimizer, scaler, grad_clip, resumed), health_module.Health(gpt)

# ---- state of the run: what is saved and restored beside model, optimizer and scaler ----
iter_num = resumed.get('iter_num', 0)                       # steps done
tokens_seen = resumed.get('tokens_seen', 0)                 # tokens trained on
best_val_loss = resumed.get('best_val_loss', math.inf)
stale = resumed.get('stale', 0)                             # evaluations since then
elapsed = resumed.get('elapsed', 0.0)                       # seconds, over all sessions
record = resumed.get('record', {})                          # of this step, for metrics.jsonl; None once it is written
run_id = resumed.get('run_id') or secrets.token_hex(4)      # by which wandb knows the run
stop = unsaved = resumed = None  # no signal, no failed save; and the checkpoint's tensors are freed


def save(*names):
    """Saves the state under these names. A full disk costs a warning, and the state only if it lasts to the end."""
    global unsaved
    state = {'model': lora_module.adapter_state(gpt) if lora else gpt.state_dict(), 'optimizer': optimizer.state_dict(),
             'model_args': asdict(gpt.config), 'lora': lora, 'config': config, 'tokenizer': meta['tokenizer'],
             'iter_num': iter_num, 'tokens_seen': tokens_seen, 'best_val_loss': best_val_loss, 'stale': stale,
             'elapsed': elapsed, 'record': record, 'scaler': scaler.state_dict(), 'seed': seed, 'run_id': run_id,
             'job': checkpoints.JOB, 'moments': len(optimizer.state), **guard.unlogged()}
    try:
        run_folder.claim(out_dir)  # it may have been removed, and another run started in its place
        checkpoints.save(out_dir, state, names)
        if lora and 'ckpt' in names:
            peft_adapter.save_adapter(os.path.join(out_dir, 'adapter'), gpt, lora['base'], lora['base_digest'],
                                    meta['tokenizer'])
        unsaved = None
    except ValueError as error:
        metrics_module.give_up(metrics, iter_num, tokens_seen, f'{error} after step {iter_num}, so that state is not saved')
    except OSError as error:
        unsaved = f'the state of step {iter_num} could not be saved in {out_dir} ({error})'
        warn(f'{unsaved}; training goes on, and the next save is tried as usual')


continued = init_from == 'resume' or (config['init_from'] == 'auto' and not checkpoints.present(out_dir))
metrics = writing and run_folder.begin(out_dir, iter_num - (record is not None) if continued else None, wandb_log and {
    'project': wandb_project, 'name': wandb_run_name, 'config': config, 'id': run_id})

# ---- distributed, compiled ----
def backward(step, unit):
    """Adds the gradients of one unit of a step to those of its others; returns its part of the loss."""
    micro_batch, part = divmod(unit, parts)
    x, y = train_data.batch(seed, 'train', step, micro_batch, batch_size, block_size, device, part, parts)
    seed_dropout(seed, step, unit, device)
    with contextlib.nullcontext() if model is gpt or unit == units[-1] else model.no_sync():  # averages once
        with autocast():
            loss = model(x, y, with_logits=False)[1] / len(units)
        scaler.scale(loss).backward()
    return loss.detach()


def train_step(step, rate):
    """The step after so many, at this learning rate."""
    for group in optimizer.param_groups:
        group['lr'] = rate * group['factor']
    loss = sum(backward(step, unit) for unit in units) / world_size  # this rank's share
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), grad_clip or math.inf)
    with health.watch(rank == 0 and ((step + 1) % log_interval == 0 or step == 0)):  # as it will be logged
        guard.step(step + 1, loss, norm)
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def loss_of(split, k):
    """Loss on the kth of the batches by which a split is evaluated."""
    data = {'train': train_data, 'val': val_data}[split]
    x, y = data.batch(seed, f'eval-{split}', 0, k, batch_size, block_size, device)
    with autocast():
        return gpt(x, y, with_logits=False)[1]


model = gpt if eval_only else process.averaging(gpt)  # gpt stays the bare model, whose names are the saved ones
compile = device.type == 'cuda' if compile is None else compile
if compile:  # through DDP, for which it splits the backward pass
    model.train(not eval_only)
    compile = compile_or_warn(gpt, lambda: loss_of('val', 0) if eval_only else backward(0, units[-1]))
    gpt.zero_grad(set_to_none=True)

# ---- evaluation ----
@torch.no_grad()
def evaluate():
    """Mean loss of (train, val), each over the same eval_iters batches every time; None if asked to stop meanwhile."""
    gpt.eval()
    losses = torch.zeros(2, eval_iters + 1, device=device)  # a column for each batch, and one for "asked to stop"
    for k in tqdm(range(rank, 2 * eval_iters, world_size), 'eval', leave=False, disable=None if rank == 0 else True):
        if stop and stop.name:
            losses[:, -1] = 1
            break
        losses[k % 2, k // 2] = loss_of(('train', 'val')[k % 2], k // 2)
    gpt.train()
    process.sum(losses)
    return None if losses[0, -1] else losses[:, :-1].mean(dim=1).tolist()


if eval_only:
    losses = evaluate()
    print0(f'train loss {losses[0]:.4f}, val loss {losses[1]:.4f} (on {eval_iters * batch_size * block_size:,} tokens)')
    leave(0)

# ---- summary ----
plan_module.print_summary({
    'machine': f'{world_size} x {hardware_name(device)}, {precision_name}, {"compiled" if compile else "eager"}',
    'data': f'{meta.get("source", dataset)}: {len(train_data):,} training and {len(val_data):,} validation tokens',
    **plan_module.Plan(gpt, config, hardware, precision_name, len(train_data), iter_num).summary()})

if find_lr:
    rate_search.find_learning_rate(lambda count, rate: train_step(iter_num + count, rate), guard, out_dir)
    leave(0)

# ---- training ----
session_start, evaluation_seconds, stopping = time.perf_counter() - elapsed, 0.0, False
stop, window = StopSignal(), []  # the latter has the seconds of each step since the last line
progress = tqdm(total=max_iters, initial=iter_num, unit='step', disable=None if rank == 0 else True)
while True:
    finished = iter_num >= max_iters or 0 < early_stop <= stale
    evaluating = finished or iter_num % eval_interval == 0
    due = evaluating or (checkpoint_interval and iter_num % checkpoint_interval == 0)
    logging = window and (iter_num % log_interval == 0 or iter_num == 1)
    if window and (logging or due or stopping):  # no other step waits for the device
        look_start = time.perf_counter()
        record, wrong = guard.look(logging)
        window[-1] += time.perf_counter() - look_start  # the device may still have been at work
        if wrong:
            metrics_module.give_up(metrics, wrong[0], tokens_seen - (iter_num - wrong[0]) * tokens_per_step, wrong[1])
    if logging:
        seconds = sum(window) / len(window)
        window.clear()
        eta = (max_iters - iter_num) * (seconds + evaluation_seconds / eval_interval)
        mfu = gpt.estimate_mfu(gradient_accumulation_steps * batch_size / world_size, seconds)
        record |= {'lr': optimizers.learning_rate(iter_num - 1, config), 'ms_per_step': 1000 * seconds,
                   'tokens_per_s': tokens_per_step / seconds, 'mfu': mfu, **health.figures()}
        print0(f'step {iter_num}: {metrics_module.in_words(record)}, ETA {timedelta(seconds=round(eta))}')
    elapsed = time.perf_counter() - session_start
    if record is not None:  # None: the session before has dealt with this step
        if evaluating and not stopping:
            losses = evaluate()
            stopping = losses is None
            evaluation_seconds = time.perf_counter() - session_start - elapsed
        if stopping:  # the record stays open: the next session evaluates if that was due, and writes it
            if iter_num and rank == 0:
                save('last')
            break
        improved = evaluating and losses[1] < best_val_loss
        if evaluating:
            stale = 0 if improved else stale + 1
            finished = finished or 0 < early_stop <= stale
            record |= {'train_loss': losses[0], 'val_loss': losses[1]}
            print0(f'step {iter_num}: train loss {losses[0]:.4f}, val loss {losses[1]:.4f}{", the best" * improved}')
            if not all(map(math.isfinite, losses)):
                metrics_module.give_up(metrics, iter_num, tokens_seen,
                                   f'the losses are {losses} after step {iter_num}, so that state is not saved')
        if record and rank == 0:
            metrics.write({'step': iter_num, 'tokens': tokens_seen, **record, 'elapsed': elapsed})
        record, before, best_val_loss = None, best_val_loss, losses[1] if improved else best_val_loss
        if due and (iter_num or finished) and rank == 0:
            save(*['ckpt'] * (evaluating and (improved or always_save_checkpoint)), 'last')
    if finished:
        break

    step_start = time.perf_counter()
    if unfreeze and iter_num in unfreeze and freezing.freeze(gpt, iter_num, config):
        model = process.averaging(gpt)
    train_step(iter_num, optimizers.learning_rate(iter_num, config))
    iter_num += 1
    tokens_seen += tokens_per_step
    stopping, refused = (count > 0 for count in process.total(stop.name is not None, unsaved is not None))
    record, best_val_loss = {}, before if refused else best_val_loss  # which is of what there is on the disk
    window.append(time.perf_counter() - step_start)
    progress.update()

# ---- end ----
progress.close()
if metrics:
    metrics.close(unsaved)
if stopping:
    by = f' by {stop.name}' if stop.name else ''  # it may have reached another rank
    print0(f'stopped{by} at step {iter_num}, ' + (
        'nothing is lost: the same command with --init_from=auto goes on' if iter_num else 'before anything to save'))
    leave(RESUMABLE)
print0(f'done: best validation loss {best_val_loss:.4f}, {timedelta(seconds=round(elapsed))} in all'
       + f', ended by early_stop={early_stop} at step {iter_num}' * (iter_num < max_iters)
       + f'. Now try:\npython sample.py --out_dir={out_dir}')
if rank == 0:
    plot.draw_finished(out_dir)
leave(0)
