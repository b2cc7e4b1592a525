"""
Where the weights of a model come from: random numbers, a checkpoint, or another program's model.

init_from names the source: 'scratch', the folder of a run or a .pt file of it, or a foreign model:
a .gguf file, or a folder or hub id in Hugging Face's form. A checkpoint of a LoRA run holds only
the adapter, so it is built from two sources: its base, which is opened first, and the adapter's
matrices.
"""
import os
from dataclasses import asdict, fields
from typing import NamedTuple

import torch

from model import GPT, GPTConfig
from plaingpt.formats import foreign_models, peft_adapter
from plaingpt.formats.hugging_face_files import CannotLoad
from plaingpt.system.messages import UserError, explained, warn
from plaingpt.text.data_sets import rounded_vocab_size
from plaingpt.training import checkpoints, freezing, lora, resuming
from plaingpt.training.lora import LoraSettings

NEEDS_BASE = ('lora_rank adapts existing weights: name them with --init_from, which takes the name '
              'of a GPT-2, the folder of a run, or a model of another program')


class RunModel(NamedTuple):
    """The model of a training run."""
    gpt: GPT
    tokenizer: dict | None      # the one that the weights were trained with, if known
    lora: LoraSettings | None   # of the adapter, in a LoRA run


# ---- opening a model ----

def find(init_from):
    """(checkpoint, path) of a run's folder or a .pt file; ({}, init_from) of any other source.

    The other source must then be a foreign model. UserError if a checkpoint is broken, or if a
    folder holds neither a run nor a model."""
    if checkpoints.present(init_from):
        return checkpoints.load_to_sample(init_from)
    if foreign_models.is_gguf(init_from):
        return {}, init_from
    if init_from.endswith('.pt') or os.path.isfile(init_from):
        return checkpoints.load(init_from, verified=('model',)), init_from
    if os.path.isdir(init_from) and not foreign_models.is_foreign_folder(init_from):
        if os.path.exists(os.path.join(init_from, peft_adapter.CONFIG)):
            raise UserError(f'init_from={init_from} is an adapter: python sample.py '
                            f'--adapter={init_from} --merge=FOLDER makes a model of it')
        raise UserError(f'init_from={init_from} has neither the ckpt.pt or last.pt of a run nor '
                        'the config.json of a Hugging Face model')
    return {}, init_from


def build(saved, path, dropout=0.0, weights=True, mapped=False):
    """The GPT of what find(), or a loader of checkpoints.py, has returned.

    For a LoRA run it is the base with the adapter. weights=False: random weights in that shape.
    mapped: as in resuming.restore_model(), for a model that is only read.
    UserError if the model can't be built; CannotLoad, a ValueError, if it is a foreign one."""
    if not saved:
        return foreign_models.load_foreign(path, {'dropout': dropout}, weights)
    if saved.get('lora') is not None:
        return _adapted_base(saved, path, dropout, weights)
    config = _config_of(saved, path, dropout=dropout)
    if not weights:
        return GPT(config)
    # Initial weights would only be overwritten, and a model on the meta device takes no memory.
    with torch.device('meta'):
        gpt = GPT(config)
    resuming.restore_model(gpt, saved, path, mapped)
    return gpt


def open_base(init_from, dropout=0.0, weights=True):
    """(GPT, tokenizer dict or None) to start a run from, wherever its weights come from.

    init_from, dropout, weights: as in find() and build(), whose errors are raised as well.
    UserError if it is an adapter."""
    saved, path = _find_whole_model(init_from)
    return build(saved, path, dropout, weights), tokenizer_of(saved, path)


def tokenizer_of(saved, path):
    """The tokenizer dict of what find() has returned, or None if nothing says which one it has."""
    if saved:
        return saved.get('tokenizer')
    return foreign_models.tokenizer_of(path)


def _find_whole_model(init_from):
    """find(), with a UserError if it has found an adapter without its base."""
    saved, path = find(init_from)
    if saved.get('lora') is not None:
        raise UserError(f'{path} holds only an adapter: python sample.py --init_from={init_from} '
                        '--merge=FOLDER makes a model of it, from which a run can start')
    return saved, path


def _config_of(saved, path, **changes):
    """The GPTConfig in a checkpoint. UserError if a field is unknown or has a bad value."""
    with explained(ValueError, TypeError, prefix=f'{path}: '):
        return GPTConfig(**saved['model_args'] | changes)


def _adapted_base(saved, path, dropout, weights):
    """The GPT of a LoRA run: its base, from where the checkpoint says, and the adapter in it."""
    settings = LoraSettings.from_dict(saved['lora'], path)
    base = settings.base
    if os.path.isabs(base) and not os.path.exists(base):
        raise UserError(f'{path} is an adapter of {base}, which no longer exists: put it back, or '
                        'a link to it')
    base_saved, base_path = _find_whole_model(base)
    with explained(CannotLoad, prefix=f'{path}: '):
        gpt = build(base_saved, base_path, dropout, weights)
    args = saved['model_args']
    lora.restore_lora(gpt, settings, saved['model'], path, args['block_size'], weights)
    # sample.py and the plan believe model_args, so they must describe the base.
    differing = [key for key, value in args.items()
                 if key != 'dropout' and getattr(gpt.config, key, None) != value]
    if differing:
        raise UserError(f'{path} has another {" and ".join(differing)} than {base}, which '
                        'therefore is not its base')
    return gpt


# ---- the model of a training run ----

def model_for_run(run, saved, path, meta):
    """The RunModel with which a run starts or continues.

    run: the keys of train.py. saved, path: the checkpoint to resume and its file; {} for a new run.
    meta: that of the data set, which sizes the vocabulary of a new model. With run['plan'] only
    shapes count. UserError if there is no such model."""
    if saved:
        return _resumed_model(run, saved, path)
    if run['init_from'] == 'scratch':
        return _new_model(run, meta)
    return _fine_tuned_model(run)


def _resumed_model(run, saved, path):
    gpt = build(saved, path, run['dropout'], weights=not run['plan'])
    settings = None
    if saved.get('lora') is not None:
        settings = LoraSettings.from_dict(saved['lora'], path)
    return RunModel(gpt, saved.get('tokenizer'), settings)


def _new_model(run, meta):
    if run['lora_rank']:
        raise UserError(NEEDS_BASE)
    shape = {field.name: run[field.name] for field in fields(GPTConfig) if field.name in run}
    with explained(ValueError):
        config = GPTConfig(**shape, vocab_size=rounded_vocab_size(meta))
    return RunModel(GPT(config), None, None)


def _fine_tuned_model(run):
    init_from = run['init_from']
    has_weights = not run['plan']
    with explained(CannotLoad, prefix=f'init_from={init_from} is not scratch or resume, and '):
        gpt, tokenizer = open_base(init_from, run['dropout'], has_weights)

    settings = None
    if run['lora_rank']:
        # A resumed run looks for its base there, from whatever folder it is started.
        base = os.path.abspath(init_from) if os.path.exists(init_from) else init_from
        base_digest = lora.digest_of_base(gpt) if has_weights else None
        settings = LoraSettings(run['lora_rank'], run['lora_alpha'], run['lora_dropout'],
                                run['lora_targets'], base, base_digest)

    trained_with = gpt.config.block_size
    with explained(ValueError):
        gpt.crop_block_size(run['block_size'])
    if run['block_size'] > trained_with:
        warn(f"block_size={run['block_size']} is more than the {trained_with} tokens that "
             f'{init_from} was trained with; without learned positions that is possible')

    if settings is not None:
        with explained(ValueError):
            lora.add_lora(gpt, settings.rank, settings.alpha, settings.dropout, settings.targets)
    return RunModel(gpt, tokenizer, settings)


def settings_decided_by(saved, path):
    """{key of train.py: value} of the settings that a run takes from the checkpoint it resumes.

    The data set is not among them. UserError if the checkpoint at path holds impossible ones."""
    decided = asdict(_config_of(saved, path))
    del decided['vocab_size']  # no key of train.py
    del decided['dropout']  # which a resumed run may change
    if saved.get('lora') is None:
        decided['lora_rank'] = 0
        return decided
    settings = LoraSettings.from_dict(saved['lora'], path)
    decided['lora_rank'] = settings.rank
    decided['lora_alpha'] = settings.alpha
    decided['lora_dropout'] = settings.dropout
    decided['lora_targets'] = settings.targets
    decided['trainable'] = 'all'
    decided['unfreeze'] = None
    return decided


# ---- the keys of train.py ----

def problems(run):
    """Yields a sentence for each problem with the keys about starting weights and fine-tuning."""
    init_from = run['init_from']
    if '\0' in init_from:
        yield 'init_from contains a NUL character, which no file name can have'
    elif init_from == 'auto':
        yield ("init_from='auto' is now --resume=auto, which resumes the run in out_dir if there "
               'is one and else starts as init_from says')
    elif _starts_from_out_dir(run):
        yield (f'init_from={init_from} is out_dir, whose run a new one would move aside: name '
               'another --out_dir, or continue that run with --resume=always')
    if run['lora_rank'] and init_from == 'scratch' and run['resume'] == 'never':
        yield NEEDS_BASE
    yield from lora.problems(run)
    yield from freezing.problems(run)


def _starts_from_out_dir(run):
    """Whether a run would write into the folder that it starts from."""
    resumes = run['init_from'] == 'resume' or run['resume'] == 'always'
    writes = not (run['eval_only'] or run['plan'] or run['find_lr'])
    if run['init_from'] == 'scratch' or resumes or not writes:
        return False
    source = os.path.realpath(run['init_from'])
    folder = os.path.dirname(source) if source.endswith('.pt') else source
    if '\0' in run['out_dir']:  # run_folder.problems() says so
        return False
    return os.path.isdir(folder) and folder == os.path.realpath(run['out_dir'])
