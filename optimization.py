"""
How the weights move: the learning rate of a step, the optimizers, the guard against numbers that are not finite, and
the figures by which one sees whether a run is healthy.

References:
[1] Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks, kellerjordan.github.io/posts/muon
[2] Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4: the warm-up, stable, decay schedule (wsd)
[3] Smith 2015, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.3: the range test
"""
import contextlib
import math
import os
import re

import torch
from tqdm import tqdm

import plot
from errors import RANK, UserError, explained, print0, warn


def learning_rate(step, run):
    """The learning rate of this step, counted from 0, of a run with this config of train.py."""
    high, low = run['learning_rate'], run['min_lr']
    warmup, end = run['warmup_iters'], run['lr_decay_iters']
    if not run['decay_lr']:
        return high
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    begin = max(warmup, end * (1 - run['decay_share'])) if run['schedule'] == 'wsd' else warmup
    over = min(1.0, max(0, step - begin) / max(1, end - begin))
    return low + (high - low) * ((1 + math.cos(math.pi * over)) / 2 if run['schedule'] == 'cosine' else 1 - over)


def find_learning_rate(train_step, guard, out_dir, lowest=1e-6, highest=10.0, steps=200):
    """Prints a suggestion for learning_rate, and draws how the loss changes where the rate rises in every step by the
    same factor [3]: find_lr.png in out_dir, the one thing that is written.

    train_step: a function of the number of steps before and the rate. It ends where the smoothed loss is four times its
    lowest, or not finite. The suggestion is a tenth of the rate at which it is lowest: from there on noise grows faster
    than what is learnt."""
    with explained(OSError, prefix='out_dir cannot be written: '):
        os.makedirs(out_dir, exist_ok=True)
    rates, losses, smoothed, mean = [], [], [], 0.0
    for step in tqdm(range(steps), 'find_lr', leave=False, disable=None if RANK == 0 else True):
        rates.append(lowest * (highest / lowest) ** (step / (steps - 1)))
        train_step(step, rates[-1])
        record, wrong = guard.look()
        if wrong:
            rates.pop()
            break
        losses.append(record['loss'])
        mean = 0.9 * mean + 0.1 * losses[-1]
        smoothed.append(mean / (1 - 0.9 ** len(losses)))
        if smoothed[-1] > 4 * min(smoothed):
            break
    if not smoothed:
        raise UserError('the loss is not finite at the lowest learning rate already: look at the data and the weights')
    lowest_at = rates[smoothed.index(min(smoothed))]
    suggestion = lowest_at / 10
    factor = guard.optimizer.param_groups[-1]['factor']  # of Muon, whose rate has risen too
    print0(f'the loss is lowest, {min(smoothed):.4f}, at a learning rate of {lowest_at:.1e}: try '
           f'--learning_rate={suggestion:.1e}' + f' --muon_learning_rate={factor * suggestion:.1e}' * (factor != 1))
    if RANK == 0:
        plot.draw_sweep(rates, losses, smoothed, suggestion, os.path.join(out_dir, 'find_lr.png'))


# ---- optimizers ----

def problems(run):
    """Yields a sentence for each of the keys about optimization that does not fit to another."""
    if run['optimizer'] == 'muon' and not run['learning_rate']:
        yield "optimizer='muon' needs a learning_rate above 0, by which muon_learning_rate rises and falls"


def make_optimizer(gpt, run, device_type):
    """The optimizer of a run with this config of train.py, for all parameters of gpt that require gradients.

    Each group has a 'factor': its learning rate is so many times the one of the schedule."""
    if run['decay_lr'] and run['min_lr'] > run['learning_rate']:
        warn(f"min_lr={run['min_lr']} is above learning_rate={run['learning_rate']}, so the rate will rise: a tenth of "
             'it is usual')
    optimizer = gpt.configure_optimizers(run['weight_decay'], run['learning_rate'], (run['beta1'], run['beta2']),
                                         device_type)
    if run['optimizer'] == 'muon':
        optimizer = MuonAdamW(gpt, optimizer, run['muon_learning_rate'], run['muon_momentum'])
    for group in optimizer.param_groups:
        group['factor'] = group['lr'] / run['learning_rate'] if run['learning_rate'] else 1.0
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group['params']]
    assert sorted(grouped) == sorted(id(parameter) for parameter in gpt.parameters() if parameter.requires_grad)
    return optimizer


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon [1] for the matrices of the blocks, and the AdamW that is given for all else (embeddings, head,
    norms, biases), as one optimizer with one state dict, in which AdamW's two groups come first.

    What the model keeps in one matrix for the sake of one product, queries, keys and values or the halves of SwiGLU, is
    orthogonalised one by one: docs/modern.md has what that is worth. The pieces are views of the weights as they are
    now: the model must be on its device before, and stay there."""

    def __init__(self, gpt, adamw, learning_rate, momentum):
        pieces = {parameter: sizes for block in gpt.transformer.h for parameter, sizes in self._matrices(block)}
        for group in adamw.param_groups:
            group['params'] = [parameter for parameter in group['params'] if parameter not in pieces]
        if not pieces:
            raise UserError("optimizer='muon' is for matrices of the blocks, of which none is trained: use adamw")
        self.pieces = {whole: [torch.nn.Parameter(rows) for rows in whole.detach().split(sizes)]  # of the same memory
                       for whole, sizes in pieces.items()}
        self.muon = torch.optim.Muon([piece for some in self.pieces.values() for piece in some], learning_rate,
                                     adamw.param_groups[0]['weight_decay'], momentum)
        self.adamw = adamw
        super().__init__([*adamw.param_groups, {**self.muon.param_groups[0], 'params': list(self.pieces)}], {})
        self._share()

    @staticmethod
    def _matrices(block):
        """(parameter, [rows of each matrix in it]) of each matrix of a block that is trained."""
        heads, kv_heads, size = block.attn.n_head, block.attn.n_kv_head, block.attn.head_size
        up = [len(block.mlp.c_fc.weight) // 2] * 2 if block.mlp.kind == 'swiglu' else [len(block.mlp.c_fc.weight)]
        sizes = {'attn.c_attn.weight': [heads * size, kv_heads * size, kv_heads * size], 'mlp.c_fc.weight': up}
        return [(parameter, sizes.get(name, [len(parameter)])) for name, parameter in block.named_parameters()
                if parameter.dim() == 2 and parameter.requires_grad]

    def _share(self):
        self.adamw.param_groups, self.adamw.state = self.param_groups[:2], self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)  # which makes new groups and a new state
        self._share()

    def step(self):
        self.adamw.step()
        self.muon.param_groups[0]['lr'] = self.param_groups[2]['lr']
        for whole, pieces in self.pieces.items():
            if whole.grad is None:  # it is frozen
                continue
            if whole not in self.state:
                self.state[whole]['momentum_buffer'] = torch.zeros_like(whole)
            parts = (tensor.split([len(piece) for piece in pieces])
                     for tensor in (whole.grad, self.state[whole]['momentum_buffer']))
            for piece, gradient, momentum in zip(pieces, *parts, strict=True):
                piece.grad, self.muon.state[piece]['momentum_buffer'] = gradient, momentum
        self.muon.step()
        for piece in self.muon.param_groups[0]['params']:
            piece.grad = None  # or its memory would outlast the model's


# ---- what is seen of a step ----

class Guard:
    """Keeps what is not finite from the weights, on all ranks alike, and without a wait for the device in each step.

    After a step whose loss or gradient is not finite no step changes the weights, until look() tells; but where float16
    has overflowed only that step is left out, and the scaler lowers its scale, as long as that is above 1."""

    def __init__(self, process, optimizer, scaler, grad_clip=0.0, resumed=None):
        """resumed: a dict with what unlogged() has returned, or None."""
        self.process, self.optimizer, self.scaler, self.grad_clip = process, optimizer, scaler, grad_clip
        # Metal's fused kernel takes no notice of found_inf, nor does Muon: there each step waits for the device.
        self.waits = process.device.type == 'mps' or not all(group.get('fused') for group in optimizer.param_groups)
        # Loss and norm of the last step, steps left out, steps clipped, steps, whether halted, and number, loss and
        # norm of what did that.
        self.seen = torch.zeros(9, device=process.device)
        for i, key in (3, 'clipped'), (4, 'unlogged'):
            self.seen[i] = (resumed or {}).get(key, 0)

    def step(self, number, loss, grad_norm):
        """The optimizer's step of this number, for this rank's share of the loss and its norm of the gradient before it
        was clipped."""
        one = torch.ones((), device=self.process.device)
        scale = self.scaler.scale(one)
        loss, overflows = self.process.sum(torch.stack([loss, ~grad_norm.isfinite()]))  # over all ranks
        skipped = (overflows == self.process.world_size) & (scale > 1)
        bad = ~loss.isfinite() | ((overflows > 0) & ~skipped)
        halted = self.seen[5] > 0
        first = torch.where(halted, self.seen[6:], torch.stack([one * number, loss, grad_norm]))
        clipped = grad_norm > (self.grad_clip or math.inf)
        counts = self.seen[2:5] + torch.stack([skipped, clipped, one])
        self.seen = torch.cat([torch.stack([loss, grad_norm]), counts, (halted | bad)[None], first])
        self.optimizer.found_inf = self.seen[5].maximum(skipped)  # a fused optimizer does nothing where this is 1
        if not (self.waits and self.optimizer.found_inf):
            self.optimizer.step()
        self.scaler.update()
        if self.scaler.is_enabled():  # which has not seen what was finite before the norm, or on this rank
            self.scaler.update(torch.where(skipped, scale / 2, self.scaler.scale(one)))

    def look(self, closing=True):
        """(record, None or (number, sentence) of the first step that was not finite), for which this rank waits for its
        device. record: the steps left out since the last look, if any; and, closing a line of the log, loss and norm of
        the last step, the latter None if it is not finite, and the share of steps clipped since the last line."""
        loss, norm, skipped, clipped, steps, halted, *first = self.seen.tolist()
        self.seen[2] = 0
        record = {'skipped': int(skipped)} if skipped else {}
        if closing:
            self.seen[3:5] = 0
            record |= {'loss': loss, 'grad_norm': norm if math.isfinite(norm) else None,
                       'clipped': clipped / max(1, steps)}
        wrong = (f'after step {first[0] - 1:.0f} the loss is {first[1]} and the gradient norm {first[2]}: stopped '
                 'before they reached the weights')
        return record, (int(first[0]), wrong) if halted else None

    def unlogged(self):
        """{'clipped': steps clipped since the last line of the log, 'unlogged': steps since then}."""
        return dict(zip(('clipped', 'unlogged'), map(int, self.seen[3:5].tolist()), strict=True))


class Health:
    """The norm of the weights that a step moves, and of the step, by kinds of weights. A step of a thousandth of the
    weights is usual; one of much less learns slowly, of much more often leads to divergence.

    Of a tensor of more than SAMPLE elements so many count, spread evenly: both norms are estimates, to 1% or 2%, and
    cost a fortieth of a step of the smallest net, of others some thousandths (docs/modern.md)."""

    KINDS = {'embedding': r'wte|wpe', 'attention': r'\.attn\.', 'mlp': r'\.mlp\.', 'head': 'lm_head', 'norm': ''}
    SAMPLE = 2048

    def __init__(self, gpt):
        of_kind = {kind: [] for kind in self.KINDS}
        for name, parameter in gpt.named_parameters():
            of_kind[next(kind for kind, part in self.KINDS.items() if re.search(part, name))].append(parameter)
        self.parameters = [parameter for some in of_kind.values() for parameter in some]
        # Odd strides, which are seldom a multiple of a row's length. The elements are of the parameters' own memory.
        self.samples = [p.detach().view(-1)[::p.numel() // self.SAMPLE | 1] for p in self.parameters]
        sizes = {parameter: len(sample) for parameter, sample in zip(self.parameters, self.samples, strict=True)}
        self.lengths = [sum(map(sizes.get, some)) for some in of_kind.values()]  # of the kinds' samples
        self.moved = self.weights = self.norms = None

    @contextlib.contextmanager
    def watch(self, wanted=True):
        """Around the step that figures() is to tell of."""
        before, self.norms = torch.cat(self.samples) if wanted else None, None
        yield
        if not wanted:
            return
        moved = [parameter.grad is not None for parameter in self.parameters]
        if moved != self.moved:  # for how many elements each stands, none where they are frozen
            factors = [counts * p.numel() / len(some)
                       for p, some, counts in zip(self.parameters, self.samples, moved, strict=True)]
            self.weights = torch.cat([torch.full_like(*both) for both in zip(self.samples, factors, strict=True)])
            self.moved = moved
        squares = torch.stack([before, torch.cat(self.samples) - before]).square() * self.weights
        self.norms = torch.stack([part.sum(dim=1) for part in squares.split(self.lengths, dim=1)]).sqrt()  # (kinds, 2)

    def figures(self):
        """{'weight_norm': {kind: norm}, 'update_ratio': {kind: norm of the step / norm of the weights}} of the last
        step, {} if it was not watched."""
        found = {} if self.norms is None else dict(zip(self.KINDS, self.norms.tolist(), strict=True))
        found = {kind: norms for kind, norms in found.items() if norms[0] and all(map(math.isfinite, norms))}
        return found and {'weight_norm': {kind: norm for kind, (norm, _) in found.items()},
                          'update_ratio': {kind: step / norm for kind, (norm, step) in found.items()}}
