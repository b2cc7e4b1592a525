"""
Loads models in Hugging Face's form, from the hub or from a directory that save_pretrained() wrote:
GPT-2, Llama, and those of Llama's descendants that compute nothing else than a GPT.

transformers is not needed: the files are read as they are (hugging_face_files.py), their config is
translated (hugging_face_config.py), and so are the names of their tensors (families.py).
"""
import contextlib
import functools
import os

import torch

from model import GPT
from plaingpt.formats import families, foreign_weights
from plaingpt.formats.foreign_weights import BadTensor
from plaingpt.formats.hugging_face_config import gpt_config
from plaingpt.formats.hugging_face_files import (GPT2_NAMES, SHORT_NAMES, CannotLoad, find_file,
                                                 has_weights_here, open_tensors, read_json,
                                                 refusing)
from plaingpt.system.messages import warn
from plaingpt.text.tokenizer_folder import TOKENIZER_JSON, read_tokenizer
from plaingpt.text.tokenizers import GPT2_VOCAB_SIZE

__all__ = ['CannotLoad', 'GPT2_NAMES', 'load_pretrained', 'tokenizer_of']

# Tensors that some files have besides the weights: causal masks, and the pace at which rope turns.
DERIVED = ('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq')


# ---- weights ----

def load_pretrained(source, overrides=None, weights=True):
    """GPT in float32 with the weights of a model in Hugging Face's form.

    source: one of GPT2_NAMES, another hub id, or a directory that save_pretrained() wrote.
    overrides: {'dropout': float} or None; foreign_models.py refuses others.
    weights=False: random weights in the same shape, for which config.json is enough.
    CannotLoad, a ValueError, if the model can't be loaded."""
    overrides = overrides or {}
    entries = read_json(source, 'config.json', required=True)
    with refusing(source, ValueError):
        config = gpt_config(entries, overrides.get('dropout', 0.0))
    if not weights and not has_weights_here(source):
        return GPT(config)
    with contextlib.ExitStack() as opened:
        holders = open_tensors(source, opened)
        from safetensors import SafetensorError
        with refusing(source, BadTensor, SafetensorError):
            read = _reader(config, holders)
            config = foreign_weights.without_neutral(config, read, 'hugging_face')
            if weights:
                return foreign_weights.build(config, read, 'hugging_face')
    return GPT(config)


def _reader(config, holders):
    """The function with which foreign_weights.build() reads the tensors of a model.

    holders: {name: the open safetensors file that holds this tensor}.
    BadTensor unless they are the tensors of a model with this GPTConfig, by their names."""
    # A model that was saved without its head lacks the first part of the names.
    family = families.family_for(config)
    prefix = 'transformer.' if family is families.GPT2 else 'model.'
    has_prefix = any(name.startswith(prefix) for name in holders)

    def name_in_file(name):
        return name if has_prefix else name.removeprefix(prefix)

    def read(name):
        name = name_in_file(name)
        return holders[name].get_tensor(name)

    names = {}  # {our name: the names in the file}
    for mapping in families.tensors_of(family, config):
        names[mapping.ours] = [name_in_file(part.hugging_face) for part in mapping.parts]
    expected = set().union(*names.values())
    missing = sorted(expected - holders.keys())
    if missing:
        raise BadTensor(f'its files lack {len(missing)} tensors of the model in its config, '
                        f'{missing[0]} among them')
    if config.tied and 'lm_head.weight' in holders:
        expected.add('lm_head.weight')
        embedding = read(names['transformer.wte.weight'][0])
        if not torch.equal(read('lm_head.weight'), embedding):
            raise BadTensor('its lm_head.weight is another matrix than the token embedding, though '
                            'its tie_word_embeddings is true')
    unknown = sorted(name for name in holders.keys() - expected if not name.endswith(DERIVED))
    if unknown:
        raise BadTensor(f'its files have {len(unknown)} tensors that the model in its config does '
                        f'not have, {unknown[0]} among them')
    return read


# ---- tokenizer ----

def tokenizer_of(source):
    """The tokenizer dict of a model, or None if it has no tokenizer.json and can't use GPT-2's.

    UserError if its tokenizer.json is damaged; CannotLoad if the model's files can't be read."""
    if source in SHORT_NAMES and not os.path.isdir(source):  # which may have such a name, too
        return {'kind': 'gpt2'}
    path = find_file(source, TOKENIZER_JSON)
    if path is None:
        return _assumed_tokenizer(source)
    return read_tokenizer(path, functools.partial(find_file, source))


def _assumed_tokenizer(source):
    """GPT-2's tokenizer for a GPT-2 that has its vocabulary, else None."""
    entries = read_json(source, 'config.json', required=True)
    with refusing(source, ValueError):
        vocab_size = gpt_config(entries).vocab_size
    if entries['model_type'] != 'gpt2' or vocab_size < GPT2_VOCAB_SIZE:
        return None
    warn(f"no tokenizer.json found for {source}: assuming that it uses GPT-2's tokenizer")
    return {'kind': 'gpt2'}
