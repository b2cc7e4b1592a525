"""What training steps on this CPU really hold in memory, for the tests of the arithmetic."""
import contextlib

import torch

from model import GPT
from plaingpt.system.devices import place, precision
from plaingpt.training.optimizers import MuonAdamW, muon_matrices

CPU = torch.device('cpu')


def measured_peak(config, batch_size, dtype, micro_batches=1, checkpointing=False,
                  distribute=None, trained='', moments=2, muon=False):
    """Bytes of tensors at the peak of a training step, weights and optimizer state included.

    distribute: makes the distributed model of a GPT. trained: a part of the names of the parameters
    that are trained. moments: 2 for AdamW, 1 for SGD with momentum. muon: whether Muon trains the
    blocks, beside AdamW."""
    gpt = place(GPT(config), CPU)
    gpt.checkpointing = checkpointing
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(trained in name)
    model = distribute(gpt) if distribute else gpt
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    if moments == 1:
        optimizer = torch.optim.SGD(optimizer.param_groups, 1e-3, momentum=0.9)
    if muon:
        optimizer = MuonAdamW(gpt, optimizer, 1e-3, 0.95)
    _, autocast, _ = precision(CPU, dtype, config.n_embd)

    def step():
        for number in range(micro_batches):
            tokens = torch.randint(config.vocab_size, (batch_size, config.block_size))
            waits = distribute and number + 1 < micro_batches
            with model.no_sync() if waits else contextlib.nullcontext():
                with autocast():
                    loss = model(tokens, tokens, with_logits=False)[1]
                loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's state
    step()  # and DDP makes its buckets anew
    changes = allocations(step)

    # What exists before the step: weights, their state, and DDP's buckets.
    weights = gpt.get_num_params(non_embedding=False)
    learnt = sum(parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad)
    numbers = weights + moments * learnt
    if muon:
        numbers -= sum(matrix.numel() for matrix in muon_matrices(gpt))  # which have one moment
    if distribute:
        numbers += weights
    held = 4 * numbers
    peak = held
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


def allocations(work):
    """Bytes that work() allocates and (negative) frees, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in events]
