"""
Going on from weights that are there: whose they are, which of them are trained, and LoRA [1], which trains a few small
matrices beside them.

A LoRA run's checkpoint holds the adapter alone under 'model', and {'rank', 'alpha', 'dropout', 'targets', 'base',
'base_digest'} under 'lora'. The folder of an adapter is peft's: adapter_config.json and adapter_model.safetensors, in
whose metadata are the same settings and the tokenizer.

[1] Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685
"""
import json
import os
import re
from dataclasses import asdict
from typing import NamedTuple

import torch

import checkpoint
from errors import UserError, explained, warn
from loader import GPT2_VOCAB_SIZE
from model import GPT, GPTConfig
from run_folder import remove, sync

CONFIG, TENSORS, PREFIX = 'adapter_config.json', 'adapter_model.safetensors', 'base_model.model.'  # peft's names
READ = ('peft_type', 'r', 'lora_alpha', 'lora_dropout', 'target_modules', 'base_model_name_or_path')
MEANINGLESS = ('peft_version', 'task_type', 'auto_mapping', 'inference_mode', 'fan_in_fan_out', 'megatron_core',
               'qalora_group_size')  # options of peft's that are without effect here
PLAIN = (('bias', 'none'), ('revision', 'main'), ('init_lora_weights', True), ('init_lora_weights', 'gaussian'))
NUMBER = (int, float)
NO_BASE = 'lora_rank adapts weights that are there: give --init_from, a GPT-2 or the folder of a run'
LORA = ('rank', 'alpha', 'dropout', 'targets')  # of train.py's keys, without lora_
SETTINGS = (('rank', (int,), lambda rank: 0 < rank < 2 ** 31), ('alpha', NUMBER, lambda alpha: 0 < alpha <= 1e30),
            ('dropout', NUMBER, lambda dropout: 0 <= dropout < 1), ('targets', (str,), bool),
            ('base', (str,), lambda base: '\0' not in base), ('base_digest', (str, type(None)), lambda digest: True))


class Adapter(NamedTuple):
    """What load_adapter() has read: settings as in a checkpoint's 'lora', with base '' and base_digest None where the
    adapter does not tell; {name: tensor}; the tokenizer's dict or None; the folder."""
    lora: dict
    state: dict
    tokenizer: dict | None
    folder: str


# ---- what to go on from ----

def find(init_from):
    """(checkpoint, path) of a run's folder or of a .pt file, nanoGPT's too; ({}, init_from) of anything else, which
    must be Hugging Face's. UserError if it is broken, or a folder that is neither."""
    if checkpoint.present(init_from):
        return checkpoint.load_to_sample(init_from)
    if init_from.endswith('.pt') or os.path.isfile(init_from):
        return checkpoint.load(init_from, ('model',)), init_from
    if os.path.isdir(init_from) and not os.path.exists(os.path.join(init_from, 'config.json')):
        adapter = os.path.exists(os.path.join(init_from, CONFIG))
        raise UserError(f'init_from={init_from} ' + (
            f'is an adapter: python sample.py --adapter={init_from} --merge=FOLDER makes a model of it' if adapter else
            'has neither the ckpt.pt or last.pt of a run nor the config.json of a Hugging Face model'))
    return {}, init_from


def build(saved, path, dropout=0.0, weights=True):
    """GPT of what find(), or a loader of checkpoint.py, has returned; of a LoRA run its base with the adapter.

    weights=False: random ones, in the same shape. UserError, or ValueError for Hugging Face's, in one sentence."""
    if not saved:
        return GPT.from_pretrained(path, {'dropout': dropout}, weights)
    lora, args = saved.get('lora'), saved['model_args']
    with explained(ValueError, TypeError, prefix=f'{path}: '):
        if lora is None:
            gpt = GPT(GPTConfig(**args | {'dropout': dropout}))
            if weights:
                checkpoint.restore_model(gpt, saved, path)
            return gpt
        _check_settings(lora, path)
        if os.path.isabs(lora['base']) and not os.path.exists(lora['base']):
            raise UserError(f"{path} is an adapter of {lora['base']}, which is not there any more: put it back (a link "
                            'will do)')
        gpt, _ = open_base(lora['base'], dropout, weights)
    restore_lora(gpt, lora, saved['model'], path, args['block_size'], weights)
    if unlike := [key for key, value in args.items() if key != 'dropout' and getattr(gpt.config, key, None) != value]:
        raise UserError(f"{path} has another {' and '.join(unlike)} than {lora['base']}: it can't be its base")
    return gpt


def open_base(init_from, dropout=0.0, weights=True):
    """(GPT, tokenizer description or None) of what is not trained from scratch: our own checkpoint (the folder of a run
    or a .pt file), a GPT-2's name, hub id, or save_pretrained directory. weights=False: random ones, in its shape.
    UserError or ValueError, in one sentence, for what can't be opened."""
    saved, path = find(init_from)
    if saved.get('lora'):
        raise UserError(f'{path} holds an adapter alone: python sample.py --init_from={init_from} --merge=FOLDER makes '
                        'a model of it, to go on from')
    gpt = build(saved, path, dropout, weights)
    as_gpt2 = {'kind': 'gpt2'} if gpt.config.vocab_size >= GPT2_VOCAB_SIZE else None
    return gpt, saved.get('tokenizer') if saved else as_gpt2


def go_on(run, init_from, resumed, path):
    """(GPT, tokenizer description or None, 'lora' or None) with which a run of this config goes on: of the checkpoint
    `resumed`, which path holds, or, where that is {}, of init_from, cropped and with a new adapter if one is asked for.
    With run['plan'] the weights do not count."""
    if init_from == 'scratch':  # which 'auto' may have come to
        raise UserError(NO_BASE)
    if resumed:
        return build(resumed, path, run['dropout'], not run['plan']), resumed.get('tokenizer'), resumed.get('lora')
    with explained(ValueError, prefix=f'init_from={init_from} is not scratch, resume or auto, and '):
        gpt, tokenizer = open_base(init_from, run['dropout'], not run['plan'])
    lora = {key: run[f'lora_{key}'] for key in LORA} if run['lora_rank'] else None
    with explained(ValueError):
        if lora:
            base = os.path.abspath(init_from) if os.path.exists(init_from) else init_from
            lora |= {'base': base, 'base_digest': None if run['plan'] else digest_of_base(gpt)}
        trained_with = gpt.config.block_size
        gpt.crop_block_size(run['block_size'])
        if run['block_size'] > trained_with:
            warn(f"block_size={run['block_size']} is more than the {trained_with} tokens of {init_from}, which has no "
                 'table of positions and so can grow')
        if lora:
            add_lora(gpt, *(lora[key] for key in LORA))
    return gpt, tokenizer, lora


def decided_by(resumed, path):
    """{key of train.py: value} of what a checkpoint, from path, decides of the run that resumes it, beside its data
    set. UserError if its shape can't be."""
    with explained(ValueError, TypeError, prefix=f'{path}: '):
        shape = asdict(GPTConfig(**resumed['model_args']))
    lora = resumed.get('lora')
    if lora:
        _check_settings(lora, path)
    adapter = {f'lora_{key}': lora[key] for key in LORA} | {'trainable': 'all', 'unfreeze': None} if lora else {}
    return {key: value for key, value in shape.items() if key not in ('vocab_size', 'gelu', 'dropout')} | (
        adapter or {'lora_rank': 0})


def digest_of_base(gpt):
    """sha256, as hex, of the weights by their names, a tied matrix once; the same on every device. To be taken before
    the context is cropped or an adapter is added."""
    return checkpoint.digest(dict(gpt.named_parameters()))


# ---- LoRA ----

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


# ---- the folder of an adapter ----

def save_adapter(folder, gpt, base, base_digest, tokenizer=None):
    """Writes gpt's adapter so that peft loads it onto Hugging Face's form of the base too. A kill leaves the files that
    were there, or two that load_adapter() refuses. OSError if the disk does, ValueError if a number is not finite."""
    from safetensors.torch import save
    settings, state = gpt.peft_config['default'], adapter_state(gpt)
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        raise ValueError('the adapter holds numbers that are not finite')
    lora = {'rank': settings.r, 'alpha': settings.lora_alpha, 'dropout': settings.lora_dropout, 'base': base,
            'targets': ','.join(sorted(settings.target_modules)), 'base_digest': base_digest}
    options = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, 'r': settings.r,
               'lora_alpha': settings.lora_alpha, 'lora_dropout': settings.lora_dropout, 'bias': 'none',
               'target_modules': sorted(settings.target_modules), 'inference_mode': True,
               'fan_in_fan_out': True}  # as the layers of Hugging Face's GPT-2 keep their weights
    contents = {TENSORS: save({PREFIX + name: tensor.cpu().contiguous() for name, tensor in state.items()},
                              {'format': 'pt', 'lora': json.dumps(lora), 'tokenizer': json.dumps(tokenizer)}),
                CONFIG: json.dumps(options, indent=2).encode()}
    os.makedirs(folder, exist_ok=True)
    temporaries = {name: os.path.join(folder, f'.{name}.tmp') for name in contents}
    try:
        for name, temporary in temporaries.items():
            with open(temporary, 'wb') as file:
                file.write(contents[name])
            sync(temporary)
        for name, temporary in temporaries.items():
            os.replace(temporary, os.path.join(folder, name))
        sync(folder)
    finally:
        remove(temporaries.values())


def load_adapter(folder):
    """The Adapter in a folder, ours or peft's. UserError in one sentence if a file is missing or damaged, or asks for
    more than plain LoRA."""
    try:
        return _read_adapter(folder)
    except Exception as error:  # a broken file can raise anything
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'{folder} is not the folder of a LoRA adapter that can be used here ({reason})') from error


def _read_adapter(folder):
    from safetensors import safe_open
    config_path, tensors_path = (os.path.join(folder, name) for name in (CONFIG, TENSORS))
    for path in config_path, tensors_path:
        if not os.path.isfile(path):
            raise ValueError(f'{path} not found')
    with open(config_path, encoding='utf-8') as file:
        options = json.load(file)
    with safe_open(tensors_path, 'pt') as file:
        metadata = file.metadata() or {}
        state = {name.removeprefix(PREFIX): file.get_tensor(name).float() for name in file.keys()}
    known, tokenizer = json.loads(metadata.get('lora', '{}')), json.loads(metadata.get('tokenizer', 'null'))
    if not (isinstance(options, dict) and isinstance(known, dict) and isinstance(tokenizer, (dict, type(None)))):
        raise ValueError('what describes it is of no known form')
    if options.get('peft_type') != 'LORA':
        raise ValueError(f"its peft_type is {options.get('peft_type')!r}")
    if unknown := [key for key, value in options.items() if value and key not in READ + MEANINGLESS
                   and (key, value) not in PLAIN]:
        raise ValueError(f'it has {", ".join(sorted(unknown))}, and only plain LoRA is known here')
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        raise ValueError('it holds numbers that are not finite')
    targets = options.get('target_modules')
    if not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        raise ValueError('its target_modules are no list of names')
    lora = {'rank': options.get('r'), 'alpha': options.get('lora_alpha'), 'dropout': options.get('lora_dropout', 0.0),
            'targets': ','.join(sorted(targets)), 'base': options.get('base_model_name_or_path') or '',
            'base_digest': known.get('base_digest')}
    _check_settings(lora, config_path)
    if known and any(known.get(key) != lora[key] for key in ('rank', 'alpha', 'targets')):
        raise ValueError('its two files are not of one save')
    return Adapter(lora, state, tokenizer, folder)


# ---- which parameters are trained ----

def _pattern(trainable, n_layer=None):
    """Regular expression for the names of the parameters that are meant; n_layer: None where there is no model yet."""
    if trainable.startswith('last:'):
        count = int(trainable[5:]) if re.fullmatch(r'[0-9]{1,9}', trainable[5:]) else 0
        if not 1 <= count <= (n_layer or count):
            raise ValueError(f'trainable={trainable!r}: the number must be from 1 to that of the layers'
                             + f', {n_layer}' * bool(n_layer))
        blocks = '|'.join(map(str, range(n_layer - count, n_layer))) if n_layer else ''
        return re.compile(rf'^(lm_head|transformer\.ln_f|transformer\.h\.({blocks}))\.')
    try:
        return re.compile({'all': '', 'head': r'^(lm_head|transformer\.ln_f)\.'}.get(trainable, trainable))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f'trainable={trainable!r} is not all, head, last:N or a regular expression: {error}') from None


def trainable_names(gpt, trainable):
    """Which parameters, as a set of keys of named_parameters(), these words mean: 'all', 'head' (the last norm, and the
    head, which is the token embedding too where both are one matrix), 'last:N' (the head and the last N blocks), or a
    regular expression found in their names. ValueError in one sentence if it is none or meets none."""
    pattern = _pattern(trainable, gpt.config.n_layer)
    meant = {parameter for name, parameter in gpt.named_parameters(remove_duplicate=False) if pattern.search(name)}
    if not meant:
        raise ValueError(f'trainable={trainable!r} is found in no name of a parameter; they are like '
                         'transformer.h.0.attn.c_attn.weight')
    return {name for name, parameter in gpt.named_parameters() if parameter in meant}


def trainable_at(step, trainable, unfreeze):
    """What is trained at this step: trainable, or the latest entry of unfreeze, {first step: what} or None, by then."""
    begun = [first for first in unfreeze or () if first <= step]
    return unfreeze[max(begun)] if begun else trainable


def most_trained(gpt, run):
    """The names of the parameters that this run's config trains in the stage that trains the most of them; of a model
    with an adapter, of that. UserError for what trainable_names() refuses, in any stage."""
    if run['lora_rank']:
        return {name for name, parameter in gpt.named_parameters() if parameter.requires_grad}
    sizes = {name: parameter.numel() for name, parameter in gpt.named_parameters()}
    with explained(ValueError):
        stages = [trainable_names(gpt, stage) for stage in (run['trainable'], *(run['unfreeze'] or {}).values())]
    stages = stages[1:] if 0 in (run['unfreeze'] or {}) else stages
    return max(stages, key=lambda names: sum(map(sizes.get, names)))


def freeze(gpt, step, run):
    """Lets the parameters alone that this run's config trains at this step require gradients, or, of a model with an
    adapter, that; returns whether that changes anything. UserError as from most_trained(), of later stages too."""
    if run['lora_rank']:
        return False
    most_trained(gpt, run)
    names, changed = trainable_names(gpt, trainable_at(step, run['trainable'], run['unfreeze'])), False
    for name, parameter in gpt.named_parameters():
        changed |= parameter.requires_grad != (name in names)
        parameter.requires_grad_(name in names)
    return changed


def problems(run):
    """Yields a sentence for each of the keys about fine-tuning that does not fit, by itself or to another."""
    if '\0' in run['init_from']:
        yield 'init_from has a character that no name of a file can have'
        return
    base = os.path.realpath(run['init_from'])
    folder = os.path.dirname(base) if base.endswith('.pt') else base
    same = '\0' not in run['out_dir'] and os.path.isdir(folder) and folder == os.path.realpath(run['out_dir'])
    if same and run['init_from'] not in ('scratch', 'resume', 'auto') and not (
            run['eval_only'] or run['plan'] or run['find_lr']):
        yield (f"init_from={run['init_from']} is out_dir, whose run a new one would move aside: name another "
               '--out_dir, or go on with --init_from=resume')
    lora_rank, lora_targets, trainable, unfreeze, init_from = (
        run[key] for key in ('lora_rank', 'lora_targets', 'trainable', 'unfreeze', 'init_from'))
    if lora_rank and run['lora_alpha'] > 1e30:
        yield f"lora_alpha={run['lora_alpha']} must be at most 1e30"
    if lora_rank and init_from == 'scratch':
        yield NO_BASE
    if lora_rank and (trainable != 'all' or unfreeze is not None):
        yield f'lora_rank={lora_rank} trains nothing but the adapter: leave out trainable and unfreeze'
    if lora_rank and not all(name.strip() for name in lora_targets.split(',')):
        yield f'lora_targets={lora_targets!r} must name layers, as c_attn,c_proj does'
    specs = [trainable]
    if isinstance(unfreeze, dict) and all(type(step) is int and step >= 0 and isinstance(spec, str)
                                          for step, spec in unfreeze.items()):
        specs += unfreeze.values()
    elif unfreeze is not None:
        yield f"unfreeze={unfreeze!r} must be like {{0: 'head', 1000: 'all'}}: first steps, and what is trained"
    for spec in dict.fromkeys(specs):
        try:
            _pattern(spec)
        except ValueError as error:
            yield str(error)
