"""
Going on from weights that are there: whose they are, which of them are trained, and LoRA [1], which trains a few small
matrices beside them.

A LoRA run's checkpoint holds the adapter alone under 'model', and {'rank', 'alpha', 'dropout', 'targets', 'base',
'base_digest'} under 'lora'. The folder of an adapter is peft's: adapter_config.json and adapter_model.safetensors, in
whose metadata are the same settings and the tokenizer.

[1] Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685
"""
import os
from dataclasses import asdict

from model import GPT, GPTConfig
from plaingpt.formats.peft_adapter import CONFIG
from plaingpt.system.messages import UserError, explained, warn
from plaingpt.text.data_sets import GPT2_VOCAB_SIZE
from plaingpt.training import checkpoints
from plaingpt.training.freezing import _pattern
from plaingpt.training.lora import LORA, _check_settings, add_lora, digest_of_base, restore_lora

NO_BASE = 'lora_rank adapts weights that are there: give --init_from, a GPT-2 or the folder of a run'


def find(init_from):
    """(checkpoint, path) of a run's folder or of a .pt file, nanoGPT's too; ({}, init_from) of anything else, which
    must be Hugging Face's. UserError if it is broken, or a folder that is neither."""
    if checkpoints.present(init_from):
        return checkpoints.load_to_sample(init_from)
    if init_from.endswith('.pt') or os.path.isfile(init_from):
        return checkpoints.load(init_from, ('model',)), init_from
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
                checkpoints.restore_model(gpt, saved, path)
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
