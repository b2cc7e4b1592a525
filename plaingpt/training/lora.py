"""
LoRA [1]: small trainable matrices beside frozen linear layers, and merging them into those layers.

The package peft injects the matrices, so other programs that use peft can read our adapters. A
checkpoint of a LoRA run holds the adapter's matrices alone under 'model', and the fields of
LoraSettings as a dict under 'lora'.

[1] Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685
"""
from dataclasses import dataclass, fields, replace

import torch

from model import Dropout
from plaingpt.system.messages import UserError, explained, warn
from plaingpt.training import checkpoints

MOST_ALPHA = 1e30  # float32 can still compute with it


@dataclass
class LoraSettings:
    """Everything about an adapter but its tensors."""
    rank: int
    alpha: float                     # the product of the matrices is scaled by alpha / rank
    dropout: float                   # of the adapter's input, in training
    targets: str                     # adapted layers, comma-separated; see target_layers()
    base: str = ''                   # path or hub id of the model that is adapted; '': unknown
    base_digest: str | None = None   # digest_of_base() of it; None: unknown

    @classmethod
    def from_dict(cls, entries, path):
        """The settings that the file at path holds. UserError if one is missing or impossible."""
        settings = cls(**{field.name: entries.get(field.name) for field in fields(cls)})
        settings.validate(path)
        return settings

    def validate(self, path):
        """UserError, naming the file at path, if a field has a value that no adapter can have."""
        def is_number(value):
            return type(value) in (int, float)

        def check(key, condition):
            if not condition:
                value = repr(getattr(self, key))[:99]
                raise UserError(f'{path} has {key}={value}, which no LoRA adapter can have')

        check('rank', type(self.rank) is int and 0 < self.rank < 2 ** 31)
        check('alpha', is_number(self.alpha) and 0 < self.alpha <= MOST_ALPHA)
        check('dropout', is_number(self.dropout) and 0 <= self.dropout < 1)
        check('targets', type(self.targets) is str and self.targets != '')
        check('base', type(self.base) is str and '\0' not in self.base)
        check('base_digest', self.base_digest is None or type(self.base_digest) is str)


def problems(run):
    """Yields a sentence for each problem with the keys of train.py that describe an adapter."""
    if not run['lora_rank']:
        return
    if run['lora_alpha'] > MOST_ALPHA:
        yield f"lora_alpha={run['lora_alpha']} must be at most {MOST_ALPHA:.0e}"
    if run['trainable'] != 'all' or run['unfreeze'] is not None:
        yield (f"lora_rank={run['lora_rank']} trains nothing but the adapter: leave out trainable "
               'and unfreeze')
    if '' in split_targets(run['lora_targets']):
        yield (f"lora_targets={run['lora_targets']!r} must name layers, for example "
               '--lora_targets=c_attn,c_proj')


def digest_of_base(gpt):
    """sha256 of a model's weights and their names, as hex; the same on every device.

    Take it before the context is cropped or an adapter is added, since both change the weights."""
    return checkpoints.digest(dict(gpt.named_parameters()))


# ---- adding an adapter ----

def add_lora(gpt, rank, alpha, dropout, targets):
    """Adds an adapter to linear layers, in place: W x becomes W x + alpha / rank B A x.

    A, (rank, in), is random, and depends only on torch's seed and on its shape. B, (out, rank),
    starts at 0, so the model computes what it did before. Afterwards only A and B are trainable.
    targets: as in target_layers(), whose ValueError is raised as well."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import
    except ImportError:
        raise UserError('LoRA needs the package peft: pip install peft') from None
    target_layers(gpt, targets)  # refuses a name that matches no layer
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout,
                        target_modules=split_targets(targets))
    # Start from the seed again: how many random numbers have been drawn by now depends on the rank
    # and on how the base was made.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed())
        inject_adapter_in_model(config, gpt)
    _use_own_dropout(gpt, dropout)
    gpt.train(gpt.training)  # the new modules too


def _use_own_dropout(gpt, dropout):
    """Replaces peft's dropout by the model's own, which draws the same on any number of ranks.

    It draws by row of a batch. An adapted lm_head is the exception: its input may have no rows."""
    for module in list(gpt.modules()):
        if hasattr(module, 'lora_dropout'):
            module.lora_dropout['default'] = Dropout(dropout)
    gpt.use_kernels(gpt.kernels)


def split_targets(targets):
    """The names in a comma-separated list of layers."""
    return [name.strip() for name in targets.split(',')]


def target_layers(gpt, targets):
    """{full name: nn.Linear} of the layers that targets means.

    targets: names or ends of names, comma-separated: 'c_attn,mlp.c_proj'.
    ValueError, in one sentence, if one of them matches no layer that can be adapted."""
    adaptable = {name: module for name, module in gpt.named_modules()
                 if isinstance(module, torch.nn.Linear)}
    if gpt.config.tied:
        del adaptable['lm_head']  # merging would change the token embedding too
    chosen = {}
    for target in split_targets(targets):
        matching = {name: layer for name, layer in adaptable.items()
                    if f'.{name}'.endswith(f'.{target}')}
        if not matching:
            last_parts = {name.rpartition('.')[2] for name in adaptable}
            raise ValueError(f'lora_targets={targets!r}: {target!r} is no layer that can be '
                             f'adapted; choose from {", ".join(sorted(last_parts))}')
        chosen |= matching
    return chosen


# ---- the adapter's tensors ----

def adapter_state(gpt):
    """{name: tensor} of the adapter's matrices.

    The names are peft's: transformer.h.0.attn.c_attn.lora_A.weight."""
    return {name.replace('.default.', '.'): tensor for name, tensor in gpt.state_dict().items()
            if '.lora_' in name}


def restore_adapter(gpt, state):
    """Copies what adapter_state() has returned into the adapter of gpt.

    ValueError, in one sentence, if it belongs to another adapter."""
    own = adapter_state(gpt)
    check_shapes(state, {name: tuple(tensor.shape) for name, tensor in own.items()})
    for name, tensor in own.items():
        tensor.copy_(state[name])


def check_shapes(state, expected):
    """ValueError, naming a tensor, if a state has other names or shapes than {name: shape}."""
    found = {name: tuple(getattr(tensor, 'shape', ())) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError('the tensors do not belong to this adapter and model: '
                             f'{name} is {found.get(name, "missing")}, '
                             f'expected {expected.get(name, "none of this name")}')


def restore_lora(gpt, lora, state, path, block_size=None, weights=True):
    """Adds the adapter that path holds, with these settings and tensors, to its base, in place.

    block_size: positions to keep; None: all.
    weights=False: only shapes count, because the weights of gpt are random.
    UserError, in one sentence, if gpt does not have the weights that the adapter was trained on."""
    if lora.base_digest is None:
        warn(f'{path} does not hold the digest of its base: assuming that it was trained on the '
             f'weights in {lora.base}')
    elif weights and digest_of_base(gpt) != lora.base_digest:
        raise UserError(f'{path} belongs to other weights than {lora.base} has now: use the '
                        'weights that it was trained on')
    with explained(ValueError, prefix=f'{path}: '):
        # Before peft takes the memory for matrices of the rank that a file claims.
        check_shapes(state, _expected_shapes(gpt, lora))
        gpt.crop_block_size(block_size or gpt.config.block_size)
    add_lora(gpt, lora.rank, lora.alpha, lora.dropout, lora.targets)
    if weights:
        restore_adapter(gpt, state)


def _expected_shapes(gpt, lora):
    """{name: shape} of adapter_state(), before the adapter is added."""
    shapes = {}
    for name, layer in target_layers(gpt, lora.targets).items():
        shapes[f'{name}.lora_A.weight'] = (lora.rank, layer.in_features)
        shapes[f'{name}.lora_B.weight'] = (layer.out_features, lora.rank)
    return shapes


# ---- using an adapter ----

def apply_adapter(gpt, adapter, base):
    """Adds a peft_adapter.Adapter to gpt, in place. base: where the weights of gpt come from.

    UserError if the adapter was trained on other weights."""
    restore_lora(gpt, replace(adapter.lora, base=base), adapter.state, adapter.folder)


@torch.no_grad()
def merge_adapter(gpt):
    """Adds the adapter's product to the weights, in place, which leaves a plain GPT.

    A GPT without an adapter stays as it is."""
    for module in list(gpt.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, 'lora_A'):
                child.merge()
                setattr(module, name, child.get_base_layer())
    vars(gpt).pop('peft_config', None)  # peft's note that there is an adapter
    gpt.requires_grad_()
