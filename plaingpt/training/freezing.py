"""
Which parameters a run trains at which step: the keys trainable and unfreeze of train.py.

trainable names a part of the model: 'all', 'head' (the last norm and the output matrix), 'last:N'
(the head and the last N blocks), or a regular expression that is searched in the parameters' names.
unfreeze is a schedule, {first step: part}, as in {0: 'head', 1000: 'last:3', 2000: 'all'}.
"""
import re

from plaingpt.system.messages import explained

HEAD = r'lm_head|transformer\.ln_f'


def problems(run):
    """Yields a sentence for each problem with trainable and unfreeze, as far as no model tells."""
    parts = [run['trainable']]
    unfreeze = run['unfreeze']
    if _is_schedule(unfreeze):
        parts += unfreeze.values()
    elif unfreeze is not None:
        yield (f"unfreeze={unfreeze!r} must map first steps to parts of the model, like "
               "{0: 'head', 1000: 'all'}")
    for part in dict.fromkeys(parts):  # each once
        try:
            _pattern(part)
        except ValueError as error:
            yield str(error)


def _is_schedule(unfreeze):
    if not isinstance(unfreeze, dict):
        return False
    for step, part in unfreeze.items():
        is_step = type(step) is int and step >= 0
        if not is_step or not isinstance(part, str):
            return False
    return True


# ---- parts of a model ----

def trainable_names(gpt, trainable):
    """The names, from named_parameters(), of the parameters that belong to a part of the model.

    Where one matrix is both token embedding and head, it belongs to the head.
    ValueError, in one sentence, if the part is malformed or matches no parameter."""
    pattern = _pattern(trainable, gpt.config.n_layer)
    # Search in all names of a tied matrix, then return the one that named_parameters() knows.
    matching = {parameter for name, parameter in gpt.named_parameters(remove_duplicate=False)
                if pattern.search(name)}
    if not matching:
        raise ValueError(f'trainable={trainable!r} matches no parameter; names look like '
                         'transformer.h.0.attn.c_attn.weight')
    return {name for name, parameter in gpt.named_parameters() if parameter in matching}


def _pattern(trainable, n_layer=None):
    """A regular expression for the names in a part of the model.

    n_layer: number of blocks, or None as long as there is no model: then it only checks the part.
    ValueError, in one sentence, if the part is malformed."""
    if trainable == 'all':
        return re.compile('')
    if trainable == 'head':
        return re.compile(rf'^({HEAD})\.')
    if trainable.startswith('last:'):
        return _last_blocks(trainable, n_layer)
    try:
        return re.compile(trainable)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f'trainable={trainable!r} is not all, head, last:N or a regular '
                         f'expression: {error}') from None


def _last_blocks(trainable, n_layer):
    """The regular expression for 'last:N'."""
    digits = trainable.removeprefix('last:')
    count = int(digits) if re.fullmatch('[0-9]{1,9}', digits) else 0
    too_many = n_layer is not None and count > n_layer
    if count < 1 or too_many:
        most = 'the number of blocks' if n_layer is None else f'the number of blocks, {n_layer}'
        raise ValueError(f'trainable={trainable!r}: the number must be from 1 to {most}')
    if n_layer is None:
        return re.compile(rf'^({HEAD})\.')
    numbers = '|'.join(str(number) for number in range(n_layer - count, n_layer))
    return re.compile(rf'^({HEAD}|transformer\.h\.({numbers}))\.')


# ---- stages of a run ----

def trainable_at(step, trainable, unfreeze):
    """The part that is trained at a step: the latest entry of unfreeze, or else trainable."""
    begun = [first for first in unfreeze or {} if first <= step]
    if not begun:
        return trainable
    return unfreeze[max(begun)]


def most_trained(gpt, run):
    """The names of the parameters that a run trains in the stage that trains the most of them.

    UserError, as from trainable_names(), for any of its stages."""
    if run['lora_rank']:  # which has one stage, the adapter
        return {name for name, parameter in gpt.named_parameters() if parameter.requires_grad}
    unfreeze = run['unfreeze'] or {}
    with explained(ValueError):
        first = trainable_names(gpt, run['trainable'])
        later = [trainable_names(gpt, part) for part in unfreeze.values()]
    stages = [first, *later]
    if 0 in unfreeze:
        stages = later  # unfreeze replaces trainable from the start

    sizes = {name: parameter.numel() for name, parameter in gpt.named_parameters()}

    def size(names):
        return sum(sizes[name] for name in names)

    return max(stages, key=size)


def freeze(gpt, step, run):
    """Makes exactly the parameters trained at this step trainable; returns whether any changed.

    A LoRA run never changes: its adapter is trained throughout.
    UserError, as from trainable_names(), for any stage of the run, so that it comes early."""
    if run['lora_rank']:
        return False
    most_trained(gpt, run)  # for its error
    part = trainable_at(step, run['trainable'], run['unfreeze'])
    names = trainable_names(gpt, part)
    changed = False
    for name, parameter in gpt.named_parameters():
        is_trained = name in names
        if parameter.requires_grad != is_trained:
            parameter.requires_grad_(is_trained)
            changed = True
    return changed
