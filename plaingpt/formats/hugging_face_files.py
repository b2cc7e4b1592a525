"""
The files of a model in Hugging Face's form, in a directory or on the hub.

Only JSON and safetensors are read, which hold data and never code.
"""
import contextlib
import json
import os

from plaingpt.system.messages import UserError

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
SHORT_NAMES = (*GPT2_NAMES, 'distilgpt2')  # the only hub ids without an owner; all use GPT-2's BPE

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'  # of a model whose weights are in several files, or shards
PICKLES = ('pytorch_model.bin', 'pytorch_model.bin.index.json')


class CannotLoad(ValueError):
    """A model that can't be loaded. The message is one sentence for the user."""


def refusal(source, reason):
    """The CannotLoad that says why a model can't be loaded, and which models can."""
    reason = ' '.join(str(reason).split())[:300]  # one line
    return CannotLoad(f'{source} cannot be loaded ({reason}): give {", ".join(GPT2_NAMES)}, or the '
                      'hub id or directory of a model of the architecture GPT-2, Llama, Mistral, '
                      'Qwen2, Qwen3 or Arcee, with config.json and model.safetensors; offline, '
                      'only directories and downloaded models work')


@contextlib.contextmanager
def refusing(source, *kinds, prefix=''):
    """Turns exceptions of these kinds into refusal(), whose reason is prefix and their text.

    It belongs around calls that raise them for bad files alone, so that a bug of ours keeps its
    traceback."""
    try:
        yield
    except kinds as error:
        raise refusal(source, f'{prefix}{error}') from error


# ---- single files ----

def find_file(source, name, required=False):
    """Path of a file of the model, downloaded if need be; None if the model does not have it.

    source: a directory or a hub id. CannotLoad if it is neither, if the hub can't be reached, or
    if the model lacks a required file."""
    if os.path.isdir(source):
        path = os.path.join(source, name)
        if os.path.isfile(path):
            return path
        if required:
            raise refusal(source, f'it has no {name}')
        return None
    is_hub_id = '/' in source or source in SHORT_NAMES
    if not is_hub_id:
        raise refusal(source, 'it is no directory, and hub ids have the form owner/name')
    return _download(source, name, required)


def _download(source, name, required):
    try:
        import httpx
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import logging
    except ImportError:
        raise UserError(f'{source} needs the package huggingface_hub: '
                        'pip install huggingface_hub') from None
    logging.set_verbosity_error()  # offline, it would report each retry before our sentence
    with refusing(source, OSError, ValueError, httpx.HTTPError):
        try:
            return huggingface_hub.hf_hub_download(source, name)
        except EntryNotFoundError:  # or, offline, the model was downloaded without it
            if required:
                raise
            return None


def read_json(source, name, required=False):
    """The dict in a JSON file of the model; {} if the model does not have the file.

    CannotLoad if it is damaged, and as in find_file()."""
    path = find_file(source, name, required)
    if path is None:
        return {}
    damaged = f'{name} is damaged: '
    with (refusing(source, OSError, ValueError, RecursionError, prefix=damaged),
          open(path, encoding='utf-8') as file):
        content = json.load(file)
    if not isinstance(content, dict):
        raise refusal(source, f'{name} holds no JSON object')
    return content


# ---- weights ----

def has_weights_here(source):
    """Whether a source is a directory with safetensors, which need no download."""
    if not os.path.isdir(source):
        return False
    return find_file(source, WEIGHTS) is not None or find_file(source, INDEX) is not None


def open_tensors(source, opened):
    """{name of a tensor: the open safetensors file that holds it}.

    opened: an ExitStack, which closes the files.
    CannotLoad if a file is missing or damaged."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f'{source} needs the package safetensors: '
                        'pip install safetensors') from None
    holders = {}
    for path in _weight_files(source):
        # This also compares the sizes that the file claims with the file itself.
        damaged = f'{os.path.basename(path)} is damaged: '
        with refusing(source, OSError, SafetensorError, prefix=damaged):
            # pread: the pages of a map would take as much memory as the file is long.
            file = opened.enter_context(safe_open(path, 'pt', backend='pread'))
            names = file.keys()
        for name in names:
            if name in holders:
                raise refusal(source, f'two of its files hold {name}')
            holders[name] = file
    return holders


def _weight_files(source):
    """Paths of the safetensors files of a model: one, or the shards that its index names."""
    path = find_file(source, WEIGHTS)
    if path is not None:
        return [path]
    if find_file(source, INDEX) is None:
        raise refusal(source, _without_weights(source))
    shards = read_json(source, INDEX).get('weight_map')
    if not isinstance(shards, dict) or not shards:
        raise refusal(source, f'{INDEX} has no weight_map')
    for name in shards.values():
        _check_name(source, name)
    return [_shard(source, name) for name in sorted(set(shards.values()))]


def _check_name(source, name):
    """CannotLoad unless the name of a shard, from the index, is that of a file beside it."""
    is_plain = isinstance(name, str) and name == os.path.basename(name) and '\\' not in name
    if not is_plain or not name.endswith('.safetensors'):
        raise refusal(source, f'{INDEX} names {repr(name)[:99]}, which is no file of the model')


def _shard(source, name):
    """Path of a shard. CannotLoad if it is missing, or a link that leads elsewhere."""
    path = find_file(source, name)
    if path is None:
        raise refusal(source, f'{name}, which {INDEX} names, is missing')
    if os.path.isdir(source) and not _lies_within(source, path):
        raise refusal(source, f'{name} is a link to a file elsewhere')
    return path


def _lies_within(folder, path):
    """Whether a file is in the folder, where links lead."""
    folder = os.path.realpath(folder)
    homes = [folder]
    # A downloaded model is a folder snapshots/REVISION of links to files in blobs/.
    snapshots = os.path.dirname(folder)
    if os.path.basename(snapshots) == 'snapshots':
        homes.append(os.path.join(os.path.dirname(snapshots), 'blobs'))
    return os.path.dirname(os.path.realpath(path)) in homes


def _without_weights(source):
    """Why a model without safetensors is refused."""
    if os.path.isdir(source) and any(find_file(source, name) for name in PICKLES):
        return ('its weights are a pickle, which could run any code: save them as safetensors with '
                'save_pretrained() of transformers')
    return f'it has no {WEIGHTS}'
