"""
Going on from weights that are there: whose they are, which of them are trained, and LoRA [1], which trains a few small
matrices beside them.

A LoRA run's checkpoint holds the adapter alone under 'model', and {'rank', 'alpha', 'dropout', 'targets', 'base',
'base_digest'} under 'lora'. The folder of an adapter is peft's: adapter_config.json and adapter_model.safetensors, in
whose metadata are the same settings and the tokenizer.

[1] Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685
"""
import re

from plaingpt.system.messages import explained


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
