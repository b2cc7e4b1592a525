"""
How the weights move: the learning rate of a step, the optimizers, the guard against numbers that are not finite, and
the figures by which one sees whether a run is healthy.

References:
[1] Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks, kellerjordan.github.io/posts/muon
[2] Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4: the warm-up, stable, decay schedule (wsd)
[3] Smith 2015, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.3: the range test
"""
import math

import torch

from plaingpt.system.messages import UserError, warn


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
