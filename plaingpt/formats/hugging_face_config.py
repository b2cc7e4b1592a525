"""
config.json of Hugging Face, to a GPTConfig and back.

What a model's entries ask for is either a field of GPTConfig or refused. An entry that decides
nothing about the logits is left out, and so is one that names code.
"""
import math

from model import GPTConfig
from plaingpt.formats import families

# The architectures that can be read, by their model_type. Mistral without windows is a Llama.
LLAMAS = ('llama', 'mistral', 'qwen2', 'qwen3', 'arcee')

# How transformers names the activations that a GPT has.
GELU_FORMS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'exact'}
SILU_NAMES = ('silu', 'swish')

# Entries with which a model computes something else than a GPT, and the values at which it does
# not. A missing entry does no harm either.
HARMLESS = {
    'quantization_config': (None,),
    'partial_rotary_factor': (None, 1),
    'residual_multiplier': (None, 1),
    'embedding_multiplier': (None, 1),
    'attention_multiplier': (None,),
    'logits_scaling': (None, 1),
    'logit_scale': (None, 1),
    'attn_logit_softcapping': (None,),
    'final_logit_softcapping': (None,),
    'clip_qkv': (None,),
    'no_rope_layers': (None, []),
    'use_sliding_window': (None, False),
    'add_cross_attention': (None, False),
    'is_encoder_decoder': (None, False),
    'scale_attn_weights': (None, True),
    'scale_attn_by_inverse_layer_idx': (None, False),
}

MOST_LAYERS = 1000
DEFAULT_THETA = 10000.0  # of all these architectures, where config.json has none


# ---- in ----

def gpt_config(entries, dropout=0.0):
    """The GPTConfig of a model with these entries, a dict, in its config.json.

    ValueError, naming the entries, if they describe anything that GPT does not compute."""
    model_type = entries.get('model_type')
    if model_type not in ('gpt2', *LLAMAS):
        raise ValueError(f'its architecture, the model_type in config.json, is {model_type!r}')
    harmful = [key for key, values in HARMLESS.items() if entries.get(key) not in values]
    if harmful:
        found = ', '.join(f'{key}={repr(entries[key])[:99]}' for key in harmful)
        raise ValueError(f'its config.json has {found}, which GPT lacks')
    fields = _gpt2_fields(entries) if model_type == 'gpt2' else _llama_fields(entries, model_type)
    if fields['n_layer'] > MOST_LAYERS:
        raise ValueError(f'it has {fields["n_layer"]} layers, more than {MOST_LAYERS}')
    return GPTConfig(**fields, dropout=dropout)


def _gpt2_fields(entries):
    return {
        'block_size': _integer(entries, 'n_positions'),
        'vocab_size': _integer(entries, 'vocab_size'),
        'n_layer': _integer(entries, 'n_layer'),
        'n_head': _integer(entries, 'n_head'),
        'n_embd': _integer(entries, 'n_embd'),
        'mlp_width': _integer(entries, 'n_inner', optional=True),
        'norm_eps': _number(entries, 'layer_norm_epsilon', 1e-5),
        'gelu': GELU_FORMS[_choice(entries, 'activation_function', 'gelu_new', *GELU_FORMS)],
        'tied': _flag(entries, 'tie_word_embeddings', True),
        'bias': True,
    }


def _llama_fields(entries, model_type):
    mlp = 'swiglu'
    if model_type == 'arcee':
        mlp = 'relu2'
        _choice(entries, 'hidden_act', 'relu2', 'relu2')
    else:
        _choice(entries, 'hidden_act', 'silu', *SILU_NAMES)
    _check_attention_windows(entries, model_type)
    # Where config.json has no such entries, only these two architectures have a rule that depends
    # on other entries alone.
    derives_heads = model_type in ('llama', 'arcee')
    head_size = _integer(entries, 'head_dim', optional=True)
    if model_type == 'qwen3' and head_size is None:
        head_size = 128
    return {
        'block_size': _integer(entries, 'max_position_embeddings'),
        'vocab_size': _integer(entries, 'vocab_size'),
        'n_layer': _integer(entries, 'num_hidden_layers'),
        'n_head': _integer(entries, 'num_attention_heads'),
        'n_kv_head': _integer(entries, 'num_key_value_heads', optional=derives_heads),
        'n_embd': _integer(entries, 'hidden_size'),
        'head_size': head_size,
        'mlp': mlp,
        'mlp_width': _integer(entries, 'intermediate_size'),
        'norm': 'rmsnorm',
        'norm_eps': _number(entries, 'rms_norm_eps'),
        'bias': _has_biases(entries, model_type),
        'qkv_bias': model_type == 'qwen2',
        'qk_norm': model_type == 'qwen3',
        'qk_norm_weight': model_type == 'qwen3',
        'tied': _flag(entries, 'tie_word_embeddings', False),
        'position': 'rope',
        **_rope_fields(entries),
    }


def _check_attention_windows(entries, model_type):
    """ValueError if a layer attends to the latest positions only."""
    default = 4096 if model_type == 'mistral' else None
    window = entries.get('sliding_window', default)
    if model_type in ('qwen2', 'qwen3'):
        window = None  # they have an entry to turn it off, which HARMLESS checks
    if window is not None:
        raise ValueError(f'its sliding_window is {repr(window)[:99]}, and GPT attends to all '
                         'positions')
    kinds = entries.get('layer_types')
    is_list = isinstance(kinds, list)
    if kinds is not None and not (is_list and all(kind == 'full_attention' for kind in kinds)):
        raise ValueError(f'its layer_types are {repr(kinds)[:99]}, and GPT has only full_attention')


def _has_biases(entries, model_type):
    """Whether all linear layers have biases. ValueError if only some have them."""
    in_attention = _flag(entries, 'attention_bias', False)
    in_mlp = _flag(entries, 'mlp_bias', False)
    if model_type == 'qwen2':
        in_attention = False  # it has biases of its own, whatever this entry says
    may_have_biases = model_type in ('llama', 'arcee')
    if in_attention != in_mlp or (in_attention and not may_have_biases):
        raise ValueError(f'its attention_bias is {in_attention} and its mlp_bias {in_mlp}, and '
                         f'a GPT like {model_type} does not have such biases')
    return in_attention


def _rope_fields(entries):
    """{'rope_theta': …, 'rope_scaling': …}.

    transformers 5 writes both into rope_parameters. Older versions write two entries."""
    rope = entries.get('rope_scaling') or entries.get('rope_parameters') or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f'its rope_parameters are {repr(rope)[:99]}, and GPT has one rope for all '
                         'layers')
    theta = _number(entries, 'rope_theta', DEFAULT_THETA)
    theta = _number(rope, 'rope_theta', theta)
    share = rope.get('partial_rotary_factor')
    if share not in (None, 1):
        raise ValueError(f'its partial_rotary_factor is {repr(share)[:99]}, and GPT turns all '
                         'channels')
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind == 'default':
        return {'rope_theta': theta, 'rope_scaling': None}
    if kind != 'llama3':
        raise ValueError(f'its rope_scaling is of the type {repr(kind)[:99]}, and GPT has only '
                         "'llama3'")
    trained_context = _number(entries, 'max_position_embeddings')
    if 'original_max_position_embeddings' in rope:
        trained_context = _number(rope, 'original_max_position_embeddings')
    if 'original_max_position_embeddings' in entries:  # which comes first in transformers
        trained_context = _number(entries, 'original_max_position_embeddings')
    scaling = {
        'factor': _number(rope, 'factor'),
        'low_freq_factor': _number(rope, 'low_freq_factor'),
        'high_freq_factor': _number(rope, 'high_freq_factor'),
        'original_context': trained_context,
    }
    is_positive = min(scaling.values()) > 0
    if not is_positive or scaling['low_freq_factor'] >= scaling['high_freq_factor']:
        raise ValueError(f'its rope_scaling has impossible values: {scaling}')
    return {'rope_theta': theta, 'rope_scaling': scaling}


def _integer(entries, key, optional=False):
    value = entries.get(key)
    if value is None and optional:
        return None
    if type(value) is not int:
        raise ValueError(f'its {key} is {repr(value)[:99]}, not an integer')
    return value


def _number(entries, key, default=None):
    value = entries.get(key)
    if value is None:
        value = default
    if type(value) not in (int, float) or not abs(value) < math.inf:
        raise ValueError(f'its {key} is {repr(value)[:99]}, not a number')
    return value


def _flag(entries, key, default):
    value = entries.get(key)
    if value is None:
        value = default
    if type(value) is not bool:
        raise ValueError(f'its {key} is {repr(value)[:99]}, neither true nor false')
    return value


def _choice(entries, key, default, *choices):
    value = entries.get(key, default)
    if value not in choices:
        raise ValueError(f'its {key} is {repr(value)[:99]}, and GPT has {" or ".join(choices)}')
    return value


# ---- out ----

def config_entries(config, dtype, bos=None, eos=None):
    """The entries of config.json for a GPT of this GPTConfig, a dict.

    dtype: the torch.dtype of its tensors. bos, eos: ids of the tokens that begin and end a text.
    families.NoTarget if no architecture of transformers computes what the GPT does."""
    family = families.family_for(config)
    dtype_name = str(dtype).removeprefix('torch.')
    entries = {
        'architectures': [family.architecture],
        'model_type': family.name,
        'dtype': dtype_name,
        'torch_dtype': dtype_name,  # its name in transformers 4
        'vocab_size': config.vocab_size,
        'bos_token_id': bos,
        'eos_token_id': eos,
        'tie_word_embeddings': config.tied,
    }
    if family is families.GPT2:
        return entries | _gpt2_entries(config)
    return entries | _llama_entries(family, config)


def _gpt2_entries(config):
    return {
        'n_positions': config.block_size,
        'n_embd': config.n_embd,
        'n_layer': config.n_layer,
        'n_head': config.n_head,
        'n_inner': config.mlp_width,
        'activation_function': 'gelu_new' if config.gelu == 'tanh' else 'gelu',
        'layer_norm_epsilon': config.norm_eps,
        'resid_pdrop': config.dropout,
        'embd_pdrop': config.dropout,
        'attn_pdrop': config.dropout,
    }


def _llama_entries(family, config):
    is_llama = family in (families.LLAMA, families.ARCEE)
    if is_llama and config.n_embd % config.n_head != 0:
        raise families.NoTarget(f"transformers' {family.architecture} needs an n_embd, here "
                                f'{config.n_embd}, that is a multiple of n_head={config.n_head}')
    entries = {
        'hidden_size': config.n_embd,
        'intermediate_size': config.mlp_width,
        'num_hidden_layers': config.n_layer,
        'num_attention_heads': config.n_head,
        'num_key_value_heads': config.n_kv_head,
        'head_dim': config.head_size,
        'hidden_act': 'relu2' if config.mlp == 'relu2' else 'silu',
        'max_position_embeddings': config.block_size,
        'rms_norm_eps': config.norm_eps,
        'attention_dropout': config.dropout,
        'rope_theta': config.rope_theta,
        'rope_scaling': None,
        # The same once more, as transformers 5 writes it.
        'rope_parameters': {'rope_type': 'default', 'rope_theta': config.rope_theta},
    }
    if is_llama:
        entries |= {'attention_bias': config.bias, 'mlp_bias': config.bias}
    else:
        entries |= {'attention_bias': False, 'use_sliding_window': False}
    if config.rope_scaling is not None:
        scaling = {
            'rope_type': 'llama3',
            'factor': config.rope_scaling['factor'],
            'low_freq_factor': config.rope_scaling['low_freq_factor'],
            'high_freq_factor': config.rope_scaling['high_freq_factor'],
            'original_max_position_embeddings': config.rope_scaling['original_context'],
        }
        entries['rope_scaling'] = scaling
        entries['rope_parameters'] = scaling | {'rope_theta': config.rope_theta}
    return entries
