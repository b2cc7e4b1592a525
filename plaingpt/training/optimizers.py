"""
The optimizers: AdamW, or Muon for the matrices of the blocks with AdamW for the rest.

To add an optimizer, touch three places:
1. the key `optimizer` in train.py: add the name to its rule, and keys for new settings below it;
2. make_optimizer(): make the optimizer, and can_skip(): say whether it skips a bad step by itself.
   If not, the guard waits for the device at each step;
3. expected_state(): say which tensors it keeps for each parameter. Checkpoints are checked by it.

The memory in a plan (planning/run_size.py) assumes two values a parameter, and one for Muon's.
"""
import math
from typing import NamedTuple

import torch

from plaingpt.system.devices import has_bfloat16_units
from plaingpt.system.messages import UserError, warn


def problems(run):
    """Yields a sentence for each conflict between the keys of train.py about optimizers."""
    if run['optimizer'] == 'muon' and run['learning_rate'] == 0:
        yield ("optimizer='muon' needs a learning_rate above 0, because the schedule scales "
               'muon_learning_rate in proportion to it')


def make_optimizer(gpt, run, device_type):
    """The optimizer of a run for all parameters of gpt that require gradients.

    run: the config of train.py; device_type: that of the device that gpt is on. Each parameter
    group has a 'factor': its learning rate is the one of the schedule times that factor.
    UserError for Muon if no matrix of a block requires gradients."""
    if run['decay_lr'] and run['min_lr'] > run['learning_rate']:
        warn(f"min_lr={run['min_lr']} is above learning_rate={run['learning_rate']}, so the "
             'learning rate will rise; min_lr is usually a tenth of learning_rate')

    # Both optimizers need an AdamW for all parameters; Muon then takes over the matrices.
    betas = (run['beta1'], run['beta2'])
    optimizer = gpt.configure_optimizers(
        run['weight_decay'], run['learning_rate'], betas, device_type)
    if run['optimizer'] == 'muon':
        optimizer = MuonAdamW(gpt, optimizer, run['muon_learning_rate'], run['muon_momentum'])

    # The schedule gives one learning rate; a group's rate is that times its factor.
    for group in optimizer.param_groups:
        if run['learning_rate'] > 0:
            group['factor'] = group['lr'] / run['learning_rate']
        else:
            group['factor'] = 1.0

    # A parameter that is in no group would never be trained, and nobody would notice.
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group['params']]
    trained = [id(parameter) for parameter in gpt.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    return optimizer


def can_skip(optimizer, device_type):
    """Whether an optimizer from make_optimizer() skips a bad step without the host's help.

    If its attribute found_inf, a float32 scalar on the device, is 1 when step() is called, it then
    leaves weights and state as they are, although the host does not know and gradients are NaN."""
    if isinstance(optimizer, MuonAdamW):
        optimizer = optimizer.adamw  # Muon's part of a step can always be skipped
    is_fused = all(group.get('fused') for group in optimizer.param_groups)
    return is_fused and device_type != 'mps'  # Metal's fused kernel ignores found_inf


def expected_state(optimizer):
    """The tensors that an optimizer from make_optimizer() keeps for each parameter it has trained.

    Returns a list of {name: shape}, one for each parameter, in the order of the state dict. As long
    as a parameter is frozen, it has no state."""
    trained_by_muon = optimizer.rows if isinstance(optimizer, MuonAdamW) else {}
    expected = []
    for group in optimizer.param_groups:
        for parameter in group['params']:
            if parameter in trained_by_muon:
                tensors = {'momentum_buffer': parameter.shape}
            else:
                tensors = {
                    'step': torch.Size(),
                    'exp_avg': parameter.shape,
                    'exp_avg_sq': parameter.shape,
                }
            expected.append(tensors)
    return expected


# ---- Muon ----

# A Newton-Schulz iteration is X <- a X + (b G + c G^2) X, where G = X X^T. With these coefficients
# and five iterations, small singular values grow fastest, and all end between about 0.7 and 1.2.
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5

# Muon updates matrices of one shape together, in stacks of at most so many numbers, or of a single
# matrix if that is larger. GPT-2's 124M has three stacks.
STACK_SIZE = 2 ** 25
# At its peak, the update of a stack holds temporary tensors of so many bytes for each number, so
# 0.47 GB however many matrices there are (counted by torch's allocator for CUDA). On a CPU without
# bfloat16 units it is up to 20.
STACK_BYTES = 14


def muon_matrices(gpt):
    """The parameters that Muon trains, unless they are frozen: the matrices of the blocks."""
    return [parameter for parameter in gpt.transformer.h.parameters() if parameter.dim() == 2]


def piece_rows(gpt):
    """{parameter: rows of each matrix in it}, for parameters that join several matrices.

    The model joins queries, keys and values, and the two halves of SwiGLU, to compute them in one
    product. Muon does better on each by itself (docs/modern.md); {} would leave them joined."""
    rows = {}
    query_rows = gpt.config.n_head * gpt.config.head_size
    kv_rows = gpt.config.n_kv_head * gpt.config.head_size
    for block in gpt.transformer.h:
        rows[block.attn.c_attn.weight] = [query_rows, kv_rows, kv_rows]
        if gpt.config.mlp == 'swiglu':
            half = len(block.mlp.c_fc.weight) // 2
            rows[block.mlp.c_fc.weight] = [half, half]
    return rows


class Piece(NamedTuple):
    """A matrix that Muon trains: views (rows, columns) of a parameter, or of its part in one."""
    weight: torch.Tensor
    gradient: torch.Tensor
    momentum: torch.Tensor


def stacks_of(pieces):
    """Yields lists of pieces that have one shape, and at most STACK_SIZE numbers together."""
    of_shape = {}
    for piece in pieces:
        of_shape.setdefault(piece.weight.shape, []).append(piece)
    for shape, alike in of_shape.items():
        at_once = max(1, STACK_SIZE // shape.numel())
        for start in range(0, len(alike), at_once):
            yield alike[start:start + at_once]


def temporary_memory(gpt):
    """Bytes of the temporary tensors that Muon's part of a step needs at its peak."""
    rows = piece_rows(gpt)
    pieces = []
    for matrix in muon_matrices(gpt):
        views = matrix.detach().split(rows.get(matrix, [len(matrix)]))
        pieces += [Piece(view, view, view) for view in views]
    sizes = [sum(piece.weight.numel() for piece in stack) for stack in stacks_of(pieces)]
    return STACK_BYTES * max(sizes)


def iteration_dtype(device):
    """The precision of the Newton-Schulz iterations on a torch.device.

    bfloat16, as published, but float32 on a CPU that would have to emulate it: with AVX2, 16
    matrices of 128 x 128 take 6 ms instead of 169."""
    if device.type == 'cpu' and not has_bfloat16_units():
        return torch.float32
    return torch.bfloat16


def orthogonalized(stack):
    """Makes all singular values of each matrix about 1, by Newton-Schulz iterations.

    stack: (matrices, rows, columns); returns that shape, in the iterations' precision.
    Jordan et al. 2024, kellerjordan.github.io/posts/muon, "Newton-Schulz matrix iteration"."""
    x = stack.to(iteration_dtype(stack.device))
    is_tall = stack.shape[1] > stack.shape[2]
    if is_tall:
        x = x.mT  # X X^T is then the smaller one of the two products
    norms = x.norm(dim=(1, 2), keepdim=True)
    x = x / norms.clamp(min=1e-7)  # the iteration needs singular values of at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x.mT if is_tall else x


def average_gradients(stack, momentum, skip):
    """Averages the gradients of a stack of pieces into their momenta; returns what Muon follows.

    skip: a bool scalar on the device; if it is true, the momenta stay as they are.
    Returns Nesterov's momentum, (1 - momentum) gradients + momentum momenta, (pieces, rows,
    columns), in the precision of the iterations."""
    gradients = torch.stack([piece.gradient for piece in stack])
    momenta = torch.stack([piece.momentum for piece in stack])
    averages = momenta.lerp(gradients, 1 - momentum)
    nesterov = gradients.lerp_(averages, momentum).to(iteration_dtype(gradients.device))

    # Multiplying by 0 would not do: a gradient that is NaN would still reach the momentum.
    kept = torch.where(skip, momenta, averages, out=averages)
    torch._foreach_copy_([piece.momentum for piece in stack], kept.unbind())  # in one kernel
    return nesterov


def move_weights(stack, directions, learning_rate, weight_decay, skip):
    """Decays the weights of a stack of pieces and moves them against the directions.

    directions: (pieces, rows, columns). skip: a bool scalar on the device; if it is true, the
    weights stay as they are."""
    rows, columns = directions.shape[1:]
    adjusted_rate = learning_rate * math.sqrt(max(1, rows / columns))
    weights = torch.stack([piece.weight for piece in stack])
    moved = weights * (1 - learning_rate * weight_decay)
    moved.add_(directions, alpha=-adjusted_rate)
    kept = torch.where(skip, weights, moved, out=moved)
    torch._foreach_copy_([piece.weight for piece in stack], kept.unbind())


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, and AdamW for embeddings, head, norms and biases.

    It is one optimizer with one state dict, in which AdamW's two groups come first. Where a
    parameter joins several matrices, Muon updates each of them by itself. It computes what
    torch.optim.Muon does, but that takes one matrix at a time, with 34 kernels for each. On a CPU
    with bfloat16 units the results are the same bits, if matrices have more than 16 rows and
    columns.

    Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks,
    kellerjordan.github.io/posts/muon"""

    def __init__(self, gpt, adamw, learning_rate, momentum):
        """adamw: made for all parameters of gpt that require gradients; Muon takes over its part.

        UserError if no matrix of a block requires gradients."""
        matrices = [matrix for matrix in muon_matrices(gpt) if matrix.requires_grad]
        if not matrices:
            raise UserError("optimizer='muon' trains the matrices of the blocks, and all of them "
                            'are frozen: use optimizer=adamw')
        rows = piece_rows(gpt)
        self.rows = {matrix: rows.get(matrix, [len(matrix)]) for matrix in matrices}

        muon_group = {
            'params': matrices,
            'lr': learning_rate,
            'momentum': momentum,
            'weight_decay': adamw.param_groups[0]['weight_decay'],
        }
        for group in adamw.param_groups:
            group['params'] = [p for p in group['params'] if p not in self.rows]
        self.adamw = adamw
        super().__init__([*adamw.param_groups, muon_group], {})
        self._share_with_adamw()
        self.found_inf = None  # set it to 1 before step(), and nothing changes; see can_skip()

    def _share_with_adamw(self):
        """Makes AdamW use the groups and the state of this optimizer, which are the saved ones."""
        self.adamw.param_groups = self.param_groups[:2]
        self.adamw.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share_with_adamw()  # the groups and the state are new objects

    @torch.no_grad()
    def step(self):
        self.adamw.found_inf = self.found_inf
        self.adamw.step()

        group = self.param_groups[2]
        if self.found_inf is None:
            skip = torch.zeros((), dtype=torch.bool, device=group['params'][0].device)
        else:
            skip = self.found_inf > 0
        for stack in stacks_of(self._pieces()):
            self._update(stack, group, skip)

    def _update(self, stack, group, skip):
        """Updates a stack of pieces; its temporary tensors are gone when the next one begins."""
        nesterov = average_gradients(stack, group['momentum'], skip)
        directions = orthogonalized(nesterov)
        move_weights(stack, directions, group['lr'], group['weight_decay'], skip)

    def _pieces(self):
        """Cuts the matrices that have gradients, and so are not frozen, into a list of pieces."""
        pieces = []
        for matrix, rows in self.rows.items():
            if matrix.grad is None:
                continue
            if matrix not in self.state:
                self.state[matrix]['momentum_buffer'] = torch.zeros_like(matrix)
            weights = matrix.split(rows)
            gradients = matrix.grad.split(rows)
            momenta = self.state[matrix]['momentum_buffer'].split(rows)
            for views in zip(weights, gradients, momenta, strict=True):
                pieces.append(Piece(*views))
        return pieces
