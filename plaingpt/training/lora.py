"""
Going on from weights that are there: whose they are, which of them are trained, and LoRA [1], which trains a few small
matrices beside them.

A LoRA run's checkpoint holds the adapter alone under 'model', and {'rank', 'alpha', 'dropout', 'targets', 'base',
'base_digest'} under 'lora'. The folder of an adapter is peft's: adapter_config.json and adapter_model.safetensors, in
whose metadata are the same settings and the tokenizer.

[1] Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685
"""
import torch

from plaingpt.system.messages import UserError, explained, warn
from plaingpt.training import checkpoints

NUMBER = (int, float)
LORA = ('rank', 'alpha', 'dropout', 'targets')  # of train.py's keys, without lora_
SETTINGS = (('rank', (int,), lambda rank: 0 < rank < 2 ** 31), ('alpha', NUMBER, lambda alpha: 0 < alpha <= 1e30),
            ('dropout', NUMBER, lambda dropout: 0 <= dropout < 1), ('targets', (str,), bool),
            ('base', (str,), lambda base: '\0' not in base), ('base_digest', (str, type(None)), lambda digest: True))


def digest_of_base(gpt):
    """sha256, as hex, of the weights by their names, a tied matrix once; the same on every device. To be taken before
    the context is cropped or an adapter is added."""
    return checkpoints.digest(dict(gpt.named_parameters()))


def add_lora(gpt, rank, alpha, dropout, targets):
    """Adds to linear layers W the product alpha / rank B A of two trainable matrices, of which B (out, rank) is 0 at
    first, in place; nothing else is trainable afterwards.

    targets: names of layers, or ends of names, comma-separated: 'c_attn,mlp.c_proj'. A depends on torch's seed and the
    shape alone. ValueError in one sentence if a name is of no layer that can be adapted."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # takes seconds
    except ImportError:
        raise UserError('LoRA needs the package peft: pip install peft') from None
    names, _ = _layers(gpt, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    with torch.random.fork_rng(devices=[]):  # whatever this rank has drawn before, or the making of the base has
        torch.default_generator.manual_seed(torch.initial_seed())
        inject_adapter_in_model(config, gpt)
    gpt.train(gpt.training)


def _layers(gpt, targets):
    """(names in targets, {name: layer} of those they mean)."""
    names = [name.strip() for name in targets.split(',')]
    linear = {name: module for name, module in gpt.named_modules() if isinstance(module, torch.nn.Linear)
              and not (name == 'lm_head' and gpt.config.tied)}  # merging would change the embedding too
    if unknown := [name for name in names if not any(f'.{layer}'.endswith(f'.{name}') for layer in linear)]:
        raise ValueError(f'lora_targets={targets!r}: {unknown[0]!r} is no layer that can be adapted; there are '
                         f'{", ".join(sorted({layer.rpartition(".")[2] for layer in linear}))}')
    ends = tuple(f'.{name}' for name in names)
    return names, {name: layer for name, layer in linear.items() if f'.{name}'.endswith(ends)}


def adapter_state(gpt):
    """{name: tensor} of the adapter's matrices, as peft names them: transformer.h.0.attn.c_attn.lora_A.weight."""
    return {name.replace('.default.', '.'): tensor for name, tensor in gpt.state_dict().items() if '.lora_' in name}


def restore_adapter(gpt, state):
    """Copies what adapter_state() has returned into gpt. ValueError, in one sentence, if it is of another adapter."""
    own = adapter_state(gpt)
    _check_shapes({name: tuple(tensor.shape) for name, tensor in own.items()}, state)
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _check_shapes(shapes, state):
    found = {name: tuple(getattr(tensor, 'shape', ())) for name, tensor in state.items()}
    if wrong := [f'{name} is {found.get(name, "missing")}, not {shapes.get(name, "known")}'
                 for name in shapes.keys() | found.keys() if found.get(name) != shapes.get(name)]:
        raise ValueError(f'the tensors are not those of this adapter and model: {min(wrong)}')


def restore_lora(gpt, lora, state, path, block_size=None, weights=True):
    """Adds the adapter of these settings and tensors, which path holds, to the very weights that it was trained on, in
    place; UserError in one sentence if gpt has others. block_size: positions to keep, None: all; weights=False: neither
    gpt nor the adapter has any that count."""
    _check_settings(lora, path)
    if lora['base_digest'] is None:
        warn(f"{path} does not tell the digest of its base: the weights of {lora['base']} are taken for it")
    elif weights and digest_of_base(gpt) != lora['base_digest']:
        raise UserError(f"{path} belongs to other weights than {lora['base']} has now: give it those it was trained on")
    with explained(ValueError, prefix=f'{path}: '):
        layers = _layers(gpt, lora['targets'])[1].items()  # checked first: memory is not taken by what a file claims
        _check_shapes({f'{name}.lora_A.weight': (lora['rank'], layer.in_features) for name, layer in layers}
                      | {f'{name}.lora_B.weight': (layer.out_features, lora['rank']) for name, layer in layers}, state)
        gpt.crop_block_size(block_size or gpt.config.block_size)
        add_lora(gpt, lora['rank'], lora['alpha'], lora['dropout'], lora['targets'])
        if weights:
            restore_adapter(gpt, state)


def apply_adapter(gpt, adapter, name):
    """Adds an Adapter to gpt, whose weights are those of `name`, in place; UserError if it belongs to others."""
    restore_lora(gpt, adapter.lora | {'base': name}, adapter.state, adapter.folder)


@torch.no_grad()
def merge_adapter(gpt):
    """Folds an adapter, if there is one, into the weights it was added to, in place: a plain GPT again."""
    for module in list(gpt.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, 'lora_A'):
                child.merge()
                setattr(module, name, child.get_base_layer())
    vars(gpt).pop('peft_config', None)
    gpt.requires_grad_()


def _check_settings(lora, path):
    for key, kinds, fits in SETTINGS:
        if type(lora.get(key)) not in kinds or not fits(lora[key]):
            raise UserError(f'{path} has {key}={repr(lora.get(key))[:99]}, which no LoRA adapter can have')
