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
from typing import NamedTuple

import torch

from plaingpt.system.files import remove, sync
from plaingpt.system.messages import UserError
from plaingpt.training.lora import _check_settings, adapter_state

CONFIG, TENSORS, PREFIX = 'adapter_config.json', 'adapter_model.safetensors', 'base_model.model.'  # peft's names
READ = ('peft_type', 'r', 'lora_alpha', 'lora_dropout', 'target_modules', 'base_model_name_or_path')
MEANINGLESS = ('peft_version', 'task_type', 'auto_mapping', 'inference_mode', 'fan_in_fan_out', 'megatron_core',
               'qalora_group_size')  # options of peft's that are without effect here
PLAIN = (('bias', 'none'), ('revision', 'main'), ('init_lora_weights', True), ('init_lora_weights', 'gaussian'))


class Adapter(NamedTuple):
    """What load_adapter() has read: settings as in a checkpoint's 'lora', with base '' and base_digest None where the
    adapter does not tell; {name: tensor}; the tokenizer's dict or None; the folder."""
    lora: dict
    state: dict
    tokenizer: dict | None
    folder: str


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
