"""
How a GGUF file describes an architecture: the GPTConfig for its metadata, and the reverse.

A file may say much that changes what its model computes. So an entry of its architecture is either
read here, or known to change nothing, or refused by name.
"""
import numpy as np
import torch

from model import ROPE_SCALING, GPTConfig, rope_stretch
from plaingpt.formats.families import (ARCEE, FAMILIES, GPT2, LLAMA, QWEN2, QWEN3, NoTarget,
                                       family_for)
from plaingpt.formats.gguf_file import BadGguf

ROPE_FACTORS = 'rope_freqs.weight'  # the tensor by which llama.cpp divides the turns of each pair

# A GGUF file holds only the factors that follow from Llama 3's rule. We write the rule's own
# numbers beside them, under this prefix, which other programs ignore. For files without them we
# try the numbers of all Llamas from 3.1 on.
OUR_ROPE_SCALING = 'plaingpt.rope_scaling.'
LLAMA3_SCALING = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_context': 8192}

BLOCK_LIMIT = 1000  # more blocks than any model has

READ = ('context_length', 'embedding_length', 'block_count', 'feed_forward_length', 'vocab_size',
        'attention.head_count', 'attention.head_count_kv', 'attention.key_length',
        'attention.value_length', 'attention.layer_norm_epsilon',
        'attention.layer_norm_rms_epsilon', 'rope.freq_base', 'rope.dimension_count')

# Entries that change nothing if they have one of these values; None: whatever they are.
NEUTRAL = {
    'attention.causal': (True,),
    'attention.clamp_kqv': (0,),
    'attention.max_alibi_bias': (0,),
    'attention.scale': (0,),
    'attention.sliding_window': (0,),
    'expert_count': (0,),
    'expert_used_count': (0,),
    'logit_scale': (0, 1),
    'pooling_type': None,
    'rope.scale_linear': (1,),
    'rope.scaling.attn_factor': (1,),
    'rope.scaling.factor': (0, 1),
    'rope.scaling.finetuned': None,
    'rope.scaling.original_context_length': None,
    'rope.scaling.type': ('none', 'linear'),
    'tensor_data_layout': None,
    'use_parallel_residual': (False,),
}


# ---- in ----

def family_of(metadata):
    """The Family of a file with this metadata. BadGguf if its architecture is none of ours."""
    name = metadata.get('general.architecture')
    if not isinstance(name, str) or name not in FAMILIES:
        raise BadGguf(f"its general.architecture is {name!r}, not {', '.join(FAMILIES)}")
    return FAMILIES[name]


def config_from(gguf):
    """The GPTConfig of a GgufFile. BadGguf, naming the entry, if no GPT computes what it does.

    The sizes are only claims of the file until its tensors are read."""
    family = family_of(gguf.metadata)
    entries = _Entries(gguf.metadata, family)
    entries.refuse_others()
    if 'token_embd.weight' not in gguf.tensors:
        raise BadGguf('it has no tensor token_embd.weight')
    vocab_size = gguf.tensors['token_embd.weight'].shape[0]
    _check_vocabulary(gguf.metadata, entries, vocab_size)
    options = {
        'block_size': entries.size('context_length'),
        'vocab_size': vocab_size,
        'n_layer': entries.size('block_count'),
        'n_head': entries.size('attention.head_count'),
        'n_embd': entries.size('embedding_length'),
        'mlp_width': entries.size('feed_forward_length'),
        'tied': 'output.weight' not in gguf.tensors,
    }
    if options['n_layer'] > BLOCK_LIMIT:
        raise BadGguf(f"its {entries.prefix}block_count is {options['n_layer']}")
    if family is GPT2:
        options |= {'norm_eps': entries.number('attention.layer_norm_epsilon'), 'bias': True}
    else:
        options |= _llama_options(gguf, family, entries, options)
    try:
        config = GPTConfig(**options)
        nearest = family_for(config)
    except ValueError as error:
        raise BadGguf(f'its parts do not fit together: {error}') from error
    if nearest is not family:
        raise BadGguf(f'its tensors are those of a {nearest.name}, not of a {family.name}')
    return config


def _llama_options(gguf, family, entries, sizes):
    """The options of a GPTConfig in Llama and those that descend from it."""
    n_head = sizes['n_head']
    head_size = entries.size('attention.key_length', sizes['n_embd'] // n_head)
    for name in ('attention.value_length', 'rope.dimension_count'):
        if entries.size(name, head_size) != head_size:
            raise BadGguf(f'its {entries.prefix}{name} is not the {head_size} channels of a head')
    theta = entries.number('rope.freq_base', 10000.0)
    has_bias = 'blk.0.attn_output.bias' in gguf.tensors
    has_qkv_bias = 'blk.0.attn_q.bias' in gguf.tensors and not has_bias
    return {
        'n_kv_head': entries.size('attention.head_count_kv', n_head),
        'head_size': head_size,
        'position': 'rope',
        'rope_theta': theta,
        'rope_scaling': _rope_scaling(gguf, theta, head_size),
        'norm': 'rmsnorm',
        'norm_eps': entries.number('attention.layer_norm_rms_epsilon'),
        'mlp': 'relu2' if family is ARCEE else 'swiglu',
        'bias': has_bias,
        'qkv_bias': has_qkv_bias,
        'qk_norm': family is QWEN3,
        'qk_norm_weight': family is QWEN3,
    }


class _Entries:
    """The entries of a file's architecture, without its name before each.

    size() and number() raise BadGguf if an entry is missing and has no default."""

    def __init__(self, metadata, family):
        self.prefix = family.name + '.'
        self.values = {key.removeprefix(self.prefix): value for key, value in metadata.items()
                       if key.startswith(self.prefix)}

    def size(self, name, default=None):
        value = self.values.get(name, default)
        is_size = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2 ** 31
        if not is_size:
            raise self.bad(name, value)
        return value

    def number(self, name, default=None):
        """A float, at least 0."""
        value = self.values.get(name, default)
        if not isinstance(value, float) or not 0 <= value <= 1e30:
            raise self.bad(name, value)
        return _decimal(value)

    def refuse_others(self):
        """BadGguf if one of the entries is neither read nor neutral."""
        for name, value in self.values.items():
            allowed = NEUTRAL.get(name, ())
            if name not in READ and allowed is not None and value not in allowed:
                raise self.bad(name, value)

    def bad(self, name, value):
        if value is None:
            return BadGguf(f'it has no {self.prefix}{name}')
        return BadGguf(f'its {self.prefix}{name} is {repr(value)[:50]}')


def _check_vocabulary(metadata, entries, vocab_size):
    """BadGguf if the file disagrees with itself about the size of its vocabulary."""
    tokens = metadata.get('tokenizer.ggml.tokens')
    if isinstance(tokens, list) and len(tokens) != vocab_size:
        raise BadGguf(f'it has {len(tokens)} tokens but {vocab_size} embeddings')
    if entries.size('vocab_size', vocab_size) != vocab_size:
        raise BadGguf(f'its {entries.prefix}vocab_size is not the {vocab_size} of its embeddings')


def _rope_scaling(gguf, theta, head_size):
    """The rope_scaling from which the file's factors follow; None if it has none."""
    if ROPE_FACTORS not in gguf.tensors:
        return None
    shape = gguf.tensors[ROPE_FACTORS].shape
    if shape != (head_size // 2,):
        raise BadGguf(f'its {ROPE_FACTORS} has the shape {shape}, but heads have {head_size} '
                      'channels')
    found = gguf.tensor(ROPE_FACTORS)
    if (found == 1).all():
        return None
    ours = {}
    for name in ROPE_SCALING:
        value = gguf.metadata.get(OUR_ROPE_SCALING + name)
        ours[name] = _decimal(value) if isinstance(value, float) else value
    llama3s = {'factor': found.max().item(), **LLAMA3_SCALING}
    for scaling in (ours, llama3s):
        if all(_is_positive(value) for value in scaling.values()):
            expected = rope_factors(theta, head_size, scaling)
            if torch.allclose(found, expected, rtol=1e-5, atol=0):
                return scaling
    raise BadGguf(f"its {ROPE_FACTORS} do not follow Llama 3's rule for scaling rope")


def _is_positive(value):
    return isinstance(value, int | float) and 0 < value < 2 ** 31


def _decimal(value):
    """The shortest decimal number that is this one in float32, in which files have it."""
    return float(str(np.float32(value)))


def rope_factors(theta, head_size, scaling):
    """By how much a rope_scaling slows each pair of channels down, float32 (head_size / 2,)."""
    channels = torch.arange(0, head_size, 2)
    periods = theta ** (channels / head_size)
    return rope_stretch(periods, **scaling)


# ---- out ----

def metadata_of(config):
    """{key: value} for the architecture of a GPTConfig. NoTarget if llama.cpp can't compute it."""
    family = _family_in_llama_cpp(config)
    entries = {
        'context_length': config.block_size,
        'embedding_length': config.n_embd,
        'block_count': config.n_layer,
        'feed_forward_length': config.mlp_width,
        'vocab_size': config.vocab_size,
        'attention.head_count': config.n_head,
        'attention.head_count_kv': config.n_kv_head,
    }
    if family is GPT2:
        entries['attention.layer_norm_epsilon'] = config.norm_eps
    else:
        entries |= {
            'attention.key_length': config.head_size,
            'attention.value_length': config.head_size,
            'attention.layer_norm_rms_epsilon': config.norm_eps,
            'rope.dimension_count': config.head_size,
            'rope.freq_base': float(config.rope_theta),
        }
    metadata = {f'{family.name}.{name}': value for name, value in entries.items()}
    if config.rope_scaling is not None:
        for name, value in config.rope_scaling.items():
            metadata[OUR_ROPE_SCALING + name] = value
    return metadata


def _family_in_llama_cpp(config):
    """families.family_for(), with a NoTarget for what transformers computes but llama.cpp not."""
    family = family_for(config)
    if config.rope_scaling is not None and family in (QWEN2, QWEN3):
        raise NoTarget(f'rope_scaling has no place in a GGUF file of {family.name}')
    if config.bias and family is not GPT2 and family is not LLAMA:
        raise NoTarget(f'bias=True has no place in a GGUF file of {family.name}')
    return family
