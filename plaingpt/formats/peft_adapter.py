"""
The folder of a LoRA adapter, as peft writes and reads it.

adapter_config.json holds peft's settings, adapter_model.safetensors the matrices. In the metadata
of the second file we add our own settings, with the digest of the base, and the tokenizer.
"""
import json
import os
from dataclasses import asdict
from typing import NamedTuple

import torch

from plaingpt.system.files import remove_unfinished, write_atomically
from plaingpt.system.messages import UserError
from plaingpt.training.checkpoints import NotFinite
from plaingpt.training.lora import LoraSettings, adapter_state, split_targets

CONFIG = 'adapter_config.json'
TENSORS = 'adapter_model.safetensors'
PREFIX = 'base_model.model.'  # peft puts it before the name of each tensor

# The options of peft that we read, those that change nothing here, and the values at which others
# ask for nothing beyond plain LoRA. An empty or false value never does.
READ = ('peft_type', 'r', 'lora_alpha', 'lora_dropout', 'target_modules',
        'base_model_name_or_path')
MEANINGLESS = ('peft_version', 'task_type', 'auto_mapping', 'inference_mode', 'fan_in_fan_out',
               'megatron_core', 'qalora_group_size')
PLAIN = {'bias': ('none',), 'revision': ('main',), 'init_lora_weights': (True, 'gaussian')}


class Adapter(NamedTuple):
    """An adapter as load_adapter() returns it."""
    lora: LoraSettings
    state: dict              # {name: float32 tensor}, as lora.adapter_state() names them
    tokenizer: dict | None   # None if the folder does not hold one
    folder: str


# ---- writing ----

def save_adapter(folder, gpt, lora, tokenizer=None):
    """Writes the adapter of gpt, so that peft loads it onto Hugging Face's form of the base too.

    lora: its LoraSettings. A kill leaves the adapter that was in the folder, or the new one.
    OSError if the disk is full or can't be written, NotFinite if a number is not."""
    state = adapter_state(gpt)
    if not _all_finite(state):
        raise NotFinite('the adapter holds numbers that are not finite')
    targets = sorted(set(split_targets(lora.targets)))
    settings = asdict(lora) | {'targets': ','.join(targets)}
    metadata = {'lora': json.dumps(settings), 'tokenizer': json.dumps(tokenizer)}
    # The layers of Hugging Face's GPT-2 store their weights as (in, out).
    write_adapter(folder, lora, targets, state, fan_in_fan_out=True, metadata=metadata)


def write_adapter(folder, lora, targets, state, fan_in_fan_out, metadata):
    """Writes the two files of an adapter.

    targets: names, or ends of names, of the layers that peft adapts.
    state: {name: tensor} of its matrices, without PREFIX.
    fan_in_fan_out: whether those layers store their weights as (in, out).
    metadata: {str: str} to keep beside the matrices. OSError as in save_adapter()."""
    from safetensors.torch import save
    options = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': lora.base,
        'r': lora.rank,
        'lora_alpha': lora.alpha,
        'lora_dropout': lora.dropout,
        'bias': 'none',
        'target_modules': targets,
        'inference_mode': True,
        'fan_in_fan_out': fan_in_fan_out,
    }
    tensors = {PREFIX + name: tensor.cpu().contiguous() for name, tensor in state.items()}

    os.makedirs(folder, exist_ok=True)
    remove_unfinished(folder, (TENSORS, CONFIG))
    # After a kill between the two, new tensors have an old config. If it is the same, as between
    # two saves of a run, nothing is lost; if not, load_adapter() refuses the pair.
    content = save(tensors, {'format': 'pt', **metadata})
    write_atomically(os.path.join(folder, TENSORS), content)
    write_atomically(os.path.join(folder, CONFIG), json.dumps(options, indent=2).encode())


# ---- reading ----

def load_adapter(folder):
    """The Adapter in a folder that save_adapter() or peft wrote.

    UserError, in one sentence, if a file is missing or damaged, or if it asks for more than plain
    LoRA."""
    from safetensors import SafetensorError
    try:
        return _read_adapter(folder)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'{folder} is not the folder of a LoRA adapter that can be used here '
                        f'({reason})') from error


def _read_adapter(folder):
    config_path = os.path.join(folder, CONFIG)
    tensors_path = os.path.join(folder, TENSORS)
    for path in (config_path, tensors_path):
        if not os.path.isfile(path):
            raise ValueError(f'{path} not found')
    options = _read_options(config_path)
    state, ours, tokenizer = _read_tensors(tensors_path)
    lora = LoraSettings.from_dict({
        'rank': options.get('r'),
        'alpha': options.get('lora_alpha'),
        'dropout': options.get('lora_dropout', 0.0),
        'targets': ','.join(sorted(options['target_modules'])),
        'base': options.get('base_model_name_or_path') or '',
        'base_digest': ours.get('base_digest'),
    }, config_path)
    written_together = all(ours.get(key) == getattr(lora, key)
                           for key in ('rank', 'alpha', 'targets'))
    if ours and not written_together:  # peft leaves no settings of ours to compare
        raise ValueError('its two files come from different saves')
    return Adapter(lora, state, tokenizer, folder)


def _read_options(path):
    """The dict in adapter_config.json. ValueError if it describes anything but plain LoRA."""
    with open(path, encoding='utf-8') as file:
        options = json.load(file)
    if not isinstance(options, dict):
        raise ValueError(f'{CONFIG} holds no JSON object')
    if options.get('peft_type') != 'LORA':
        raise ValueError(f"its peft_type is {options.get('peft_type')!r}, not 'LORA'")
    unknown = sorted(key for key, value in options.items() if _asks_for_more(key, value))
    if unknown:
        raise ValueError(f'it has {", ".join(unknown)}, but only plain LoRA is supported')
    targets = options.get('target_modules')
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError('its target_modules is no list of names')
    return options


def _asks_for_more(key, value):
    """Whether an option of peft changes what an adapter computes, beyond the settings we read."""
    if not value or key in READ or key in MEANINGLESS:
        return False
    return value not in PLAIN.get(key, ())


def _read_tensors(path):
    """(tensors, our settings or {}, tokenizer or None) from adapter_model.safetensors."""
    from safetensors import safe_open
    state = {}
    with safe_open(path, 'pt') as file:
        metadata = file.metadata() or {}
        names = file.keys()
        for name in names:
            tensor = file.get_tensor(name)
            if tensor.is_complex():
                raise ValueError(f'{name} holds complex numbers')
            state[name.removeprefix(PREFIX)] = tensor.float()
    if not _all_finite(state):
        raise ValueError('it holds numbers that are not finite')
    ours = json.loads(metadata.get('lora', '{}'))
    tokenizer = json.loads(metadata.get('tokenizer', 'null'))
    if not isinstance(ours, dict) or not isinstance(tokenizer, dict | None):
        raise ValueError(f'the metadata of {TENSORS} has an unknown form')
    return state, ours, tokenizer


def _all_finite(state):
    return all(torch.isfinite(tensor).all() for tensor in state.values())
