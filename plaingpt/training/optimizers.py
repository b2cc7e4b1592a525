"""
The optimizers: AdamW, or Muon for the matrices of the blocks with AdamW for the rest.

To add an optimizer, touch three places:
1. the key `optimizer` in train.py: add the name to its rule, and keys for new settings below it;
2. make_optimizer(): make the optimizer. Unless it is fused, the guard waits for the device at each
   step, because only fused optimizers can skip a bad step by themselves;
3. expected_state(): say which tensors it keeps for each parameter. Checkpoints are checked by it.

The memory in a plan (planning/run_size.py) assumes two values a parameter, and one for Muon's.
"""
import torch

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


def expected_state(optimizer):
    """The tensors that an optimizer from make_optimizer() keeps for each parameter it has trained.

    Returns a list of {name: shape}, one for each parameter, in the order of the state dict. As long
    as a parameter is frozen, it has no state."""
    trained_by_muon = optimizer.pieces if isinstance(optimizer, MuonAdamW) else {}
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

def muon_matrices(gpt):
    """The parameters that Muon trains, unless they are frozen: the matrices of the blocks."""
    return [parameter for parameter in gpt.transformer.h.parameters() if parameter.dim() == 2]


def stacked_rows(gpt):
    """{parameter: rows of each matrix in it}, for parameters that hold several matrices.

    The model stacks queries, keys and values, and the two halves of SwiGLU, to compute them in one
    product. Muon does better on each by itself (docs/modern.md); {} would give it the stacks."""
    rows = {}
    for block in gpt.transformer.h:
        attention = block.attn
        query_rows = attention.n_head * attention.head_size
        kv_rows = attention.n_kv_head * attention.head_size
        rows[attention.c_attn.weight] = [query_rows, kv_rows, kv_rows]
        if block.mlp.kind == 'swiglu':
            half = len(block.mlp.c_fc.weight) // 2
            rows[block.mlp.c_fc.weight] = [half, half]
    return rows


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, and AdamW for embeddings, head, norms and biases.

    It is one optimizer with one state dict, in which AdamW's two groups come first. Where a
    parameter stacks several matrices, Muon updates each of them separately, through views of the
    weights. So the model must be on its device before the optimizer is made, and stay there.

    Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks,
    kellerjordan.github.io/posts/muon"""

    def __init__(self, gpt, adamw, learning_rate, momentum):
        """adamw: made for all parameters of gpt that require gradients; Muon takes over its part.

        UserError if no matrix of a block requires gradients."""
        matrices = [matrix for matrix in muon_matrices(gpt) if matrix.requires_grad]
        if not matrices:
            raise UserError("optimizer='muon' trains the matrices of the blocks, and all of them "
                            'are frozen: use optimizer=adamw')

        # Cut each parameter into its matrices, as views: {parameter: [piece, …]}.
        rows = stacked_rows(gpt)
        self.pieces = {}
        for matrix in matrices:
            views = matrix.detach().split(rows.get(matrix, [len(matrix)]))
            self.pieces[matrix] = [torch.nn.Parameter(view) for view in views]
        all_pieces = [piece for pieces in self.pieces.values() for piece in pieces]

        # Muon's own optimizer knows the pieces; the state dict has the whole matrices.
        weight_decay = adamw.param_groups[0]['weight_decay']
        self.muon = torch.optim.Muon(all_pieces, learning_rate, weight_decay, momentum)
        muon_group = {**self.muon.param_groups[0], 'params': matrices}
        for group in adamw.param_groups:
            group['params'] = [p for p in group['params'] if p not in self.pieces]
        self.adamw = adamw
        super().__init__([*adamw.param_groups, muon_group], {})
        self._share_with_adamw()

    def _share_with_adamw(self):
        """Makes AdamW use the groups and the state of this optimizer, which are the saved ones."""
        self.adamw.param_groups = self.param_groups[:2]
        self.adamw.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share_with_adamw()  # the groups and the state are new objects

    def step(self):
        self.adamw.step()
        # train.py sets the rates of this optimizer's groups, and Muon has a group of its own.
        self.muon.param_groups[0]['lr'] = self.param_groups[2]['lr']
        for matrix in self.pieces:
            if matrix.grad is not None:  # it is not frozen
                self._prepare_pieces(matrix)
        self.muon.step()
        for piece in self.muon.param_groups[0]['params']:
            piece.grad = None  # or the gradient's memory would outlast zero_grad()

    def _prepare_pieces(self, matrix):
        """Gives the pieces of a matrix views of its gradient and of its momentum."""
        if matrix not in self.state:
            self.state[matrix]['momentum_buffer'] = torch.zeros_like(matrix)
        pieces = self.pieces[matrix]
        rows = [len(piece) for piece in pieces]
        gradients = matrix.grad.split(rows)
        momenta = self.state[matrix]['momentum_buffer'].split(rows)
        for piece, gradient, momentum in zip(pieces, gradients, momenta, strict=True):
            piece.grad = gradient
            self.muon.state[piece]['momentum_buffer'] = momentum
