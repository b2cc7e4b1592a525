"""
Writes a GPT as a folder in Hugging Face's form, which transformers, vLLM and other programs load.
"""
import json
import os
from dataclasses import replace

import torch

from plaingpt.formats.families import FAMILIES
from plaingpt.formats.foreign_weights import named_tensors
from plaingpt.formats.hugging_face_config import config_entries
from plaingpt.formats.hugging_face_files import INDEX, WEIGHTS
from plaingpt.system.files import sync, write_atomically
from plaingpt.system.messages import UserError
from plaingpt.text.tokenizer_export import bos_and_eos_of, tokenizer_config_of, tokenizer_json_of
from plaingpt.text.tokenizers import load_tokenizer

LARGEST_FILE = 5 * 10 ** 9  # bytes of the tensors in a safetensors file

# What the hub reads from a model card.
HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- plaingpt
- {family}
---

"""


def export_hugging_face(folder, gpt, tokenizer_dict, dtype=torch.float32, card=''):
    """Writes a GPT and its tokenizer into an empty folder, for transformers.

    dtype: of the tensors: torch.float32, float16 or bfloat16.
    card: the model card, in Markdown, without the header that names the library.
    Rows of the vocabulary that the tokenizer has no token for are left out. Needs memory for the
    tensors of one file, and in float32 only for those that transformers stores transposed.
    families.NoTarget if transformers can't compute what the GPT does, UserError if the tokenizer is
    damaged or a number is too large for dtype, OSError if the folder can't be written."""
    tokenizer = load_tokenizer(tokenizer_dict)
    vocab_size = min(gpt.config.vocab_size, tokenizer.vocab_size)
    config = replace(gpt.config, vocab_size=vocab_size)
    bos, eos = _ids_of_special_tokens(tokenizer_dict, tokenizer)
    entries = config_entries(config, dtype, bos, eos)  # refuses before anything is written
    tokenizer_config = tokenizer_config_of(tokenizer_dict)
    tokenizer_config['model_max_length'] = config.block_size

    write_safetensors(folder, named_tensors(gpt, vocab_size, 'hugging_face'), dtype,
                      LARGEST_FILE)
    _write_json(folder, 'tokenizer_config.json', tokenizer_config)
    _write_text(folder, 'tokenizer.json', tokenizer_json_of(tokenizer_dict))
    _write_json(folder, 'generation_config.json', {'bos_token_id': bos, 'eos_token_id': eos})
    _write_text(folder, 'README.md', HEADER.format(family=entries['model_type']) + card)
    _write_json(folder, 'config.json', entries)


def _ids_of_special_tokens(meta, tokenizer):
    """(bos, eos): the ids of the tokens that begin and end a text, or None."""
    bos, _ = bos_and_eos_of(meta)
    if bos is None:
        return None, tokenizer.end_of_text
    if meta['kind'] in ('gpt2', 'tiktoken'):
        return tokenizer.end_of_text, tokenizer.end_of_text
    return tokenizer.tokenizer.token_to_id(bos), tokenizer.end_of_text


def _write_json(folder, name, content):
    _write_text(folder, name, json.dumps(content, indent=2, ensure_ascii=False) + '\n')


def _write_text(folder, name, text):
    write_atomically(os.path.join(folder, name), text.encode('utf-8'))


# ---- weights ----

def write_safetensors(folder, tensors, dtype, largest_file):
    """Writes model.safetensors, or numbered shards of it with their index.

    tensors: yields (name, tensor). largest_file: bytes of the tensors in a file, at most, unless a
    single tensor is larger. UserError if dtype can't hold a number; OSError if the disk is full."""
    files = [{}]  # of each, {name: tensor}
    room = largest_file
    total = 0
    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if size > room and files[-1]:
            files.append({})
            room = largest_file
        files[-1][name] = tensor
        room -= size
        total += size
    if len(files) == 1:
        _write_file(os.path.join(folder, WEIGHTS), files[0], dtype)
        return
    weight_map = {}
    for number, contents in enumerate(files, 1):
        file_name = f'model-{number:05}-of-{len(files):05}.safetensors'
        _write_file(os.path.join(folder, file_name), contents, dtype)
        for name in contents:
            weight_map[name] = file_name
    _write_json(folder, INDEX, {'metadata': {'total_size': total}, 'weight_map': weight_map})


def _write_file(path, tensors, dtype):
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    converted = {}
    for name, tensor in tensors.items():
        converted[name] = tensor.to(dtype).contiguous()
        if not torch.isfinite(converted[name]).all():
            raise UserError(f'{name} holds numbers that are not finite in {dtype}: choose another '
                            'type, or an earlier checkpoint')
    try:
        # It writes from the tensors' own memory, where safetensors.torch.save() would copy it.
        save_file(converted, path, metadata={'format': 'pt'})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors makes a file that only its owner can read.
    os.chmod(path, os.stat(os.path.dirname(path)).st_mode & 0o666)
    sync(path)


# ---- check ----

@torch.no_grad()
def logits_by_transformers(folder, ids, adapter=None):
    """float32 logits, (B, T, V), that transformers computes for ids, int64 (B, T).

    folder: what export_hugging_face() wrote. The class is one of transformers' own, chosen by the
    family, so no code from the folder runs. adapter: a folder for peft to adapt it with, or None.
    UserError if transformers is missing."""
    try:
        import transformers
    except ImportError:
        raise UserError('comparing the logits needs the package transformers: '
                        'pip install transformers') from None
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
        family = FAMILIES[json.load(file)['model_type']]
    transformers.utils.logging.disable_progress_bar()
    model_class = getattr(transformers, family.architecture)
    model = model_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True,
                                        local_files_only=True)
    if adapter is not None:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()(ids).logits
