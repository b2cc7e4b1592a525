"""
Loads models of GPT-2's architecture in Hugging Face's form: config, weights and tokenizer, from
the hub or from a directory that save_pretrained() wrote.

Only data is read: config.json, safetensors files and tokenizer.json. transformers takes seconds to
import, so the functions that need it import it themselves.
"""
import contextlib
import os

import torch

from model import GPT, NORM_EPS, GPTConfig
from plaingpt.system.messages import UserError, explained, warn
from plaingpt.text.tokenizer_json import describe_tokenizer_json
from plaingpt.text.tokenizers import GPT2_VOCAB_SIZE

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
SHORT_NAMES = (*GPT2_NAMES, 'distilgpt2')  # the only hub ids without an owner; all use GPT-2's BPE

# The keys of config.json that decide a GPT-2's logits. No other key reaches transformers, because
# some of them ('auto_map', 'attn_implementation') make it download and run code.
HUGGING_FACE_KEYS = ('n_layer', 'n_head', 'n_embd', 'n_positions', 'vocab_size',
                     'activation_function', 'n_inner', 'layer_norm_epsilon', 'scale_attn_weights',
                     'scale_attn_by_inverse_layer_idx', 'tie_word_embeddings')

# How transformers names the activations that GPTConfig.gelu has.
GELU_FORMS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'exact'}

# transformers' Conv1D stores these matrices as (in, out), nn.Linear as (out, in).
CONV1D_WEIGHTS = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')


class CannotLoad(ValueError):
    """A model that can't be loaded. The message is one sentence for the user."""


def load_gpt2(model_type, overrides=None, weights=True):
    """GPT in float32 with the weights of a published or saved GPT-2.

    model_type: one of GPT2_NAMES, the hub id of a model of the same architecture, or a directory
    that save_pretrained() wrote.
    overrides: {'dropout': float} or None.
    weights=False: random weights in the same shape, for which config.json is enough.
    CannotLoad, a ValueError, if the model can't be loaded."""
    overrides = overrides or {}
    not_overridable = sorted(set(overrides) - {'dropout'})
    if not_overridable:
        raise ValueError('only dropout may be overridden in a pretrained model, '
                         f'not {not_overridable}')
    source = read_config(model_type)
    try:
        config = gpt_config(source, overrides.get('dropout', 0.0))
    except ValueError as error:
        raise refusal(model_type, error) from error
    if not weights:
        return GPT(config)
    # Read the weights first: they show whether the model is as large as its config claims.
    tensors = read_weights(model_type, source)
    gpt = GPT(config)
    copy_weights(gpt, tensors)
    return gpt


def tokenizer_of(model_type):
    """The tokenizer dict of a model, or None if it has no tokenizer.json and can't use GPT-2's.

    UserError if its tokenizer.json is damaged; CannotLoad if the model's files can't be reached."""
    is_directory = os.path.isdir(model_type)  # which may have such a name, too
    if model_type in SHORT_NAMES and not is_directory:
        return {'kind': 'gpt2'}
    path = _tokenizer_json(model_type)
    if path is not None:
        return _read_tokenizer(path)
    if read_config(model_type).vocab_size < GPT2_VOCAB_SIZE:
        return None
    warn(f"no tokenizer.json found for {model_type}: assuming that it uses GPT-2's tokenizer")
    return {'kind': 'gpt2'}


# ---- config ----

def read_config(model_type):
    """The transformers.GPT2Config of a model.

    CannotLoad if its config.json is missing or damaged, or describes another architecture."""
    is_directory = os.path.isdir(model_type)
    is_hub_id = '/' in model_type or model_type in SHORT_NAMES
    if not is_directory and not is_hub_id:
        raise refusal(model_type, 'it is no directory, and hub ids have the form owner/name')
    try:
        from huggingface_hub.utils import logging
        from transformers import GPT2Config
    except ImportError:
        raise UserError(f'{model_type} needs the package transformers: '
                        'pip install transformers') from None
    logging.set_verbosity_error()  # offline, it would report each retry before our sentence
    with _refusing(model_type):
        entries, _ = GPT2Config.get_config_dict(model_type)
    architecture = entries.get('model_type') if isinstance(entries, dict) else None
    if architecture != 'gpt2':
        raise refusal(model_type, f"its architecture is {architecture!r}, not 'gpt2'")
    trusted = {key: entries[key] for key in HUGGING_FACE_KEYS if key in entries}
    # We generate without transformers. Its default ids of special tokens would only bring a warning
    # where the vocabulary is smaller than GPT-2's.
    no_special_tokens = {'bos_token_id': None, 'eos_token_id': None}
    with _refusing(model_type):
        return GPT2Config(**trusted, **no_special_tokens)


def gpt_config(source, dropout):
    """The GPTConfig for a transformers.GPT2Config.

    ValueError, naming each difference, if the model computes anything that GPT does not."""
    problems = []

    def check(condition, message):
        if not condition:
            problems.append(message)

    check(source.activation_function in GELU_FORMS,
          f'activation_function is {source.activation_function!r}')
    check(source.n_inner in (None, 4 * source.n_embd), f'n_inner is {source.n_inner}')
    check(source.layer_norm_epsilon == NORM_EPS,
          f'layer_norm_epsilon is {source.layer_norm_epsilon}')
    check(source.scale_attn_weights, 'scale_attn_weights is False')
    check(not source.scale_attn_by_inverse_layer_idx, 'scale_attn_by_inverse_layer_idx is True')
    check(source.tie_word_embeddings, 'tie_word_embeddings is False')
    check(1 <= source.n_layer <= 1000, f'n_layer is {source.n_layer}')
    if problems:
        raise ValueError(f"its config differs from GPT-2's: {', '.join(problems)}")
    return GPTConfig(block_size=source.n_positions, vocab_size=source.vocab_size,
                     n_layer=source.n_layer, n_head=source.n_head, n_embd=source.n_embd,
                     bias=True, gelu=GELU_FORMS[source.activation_function], dropout=dropout)


# ---- weights ----

def read_weights(model_type, source):
    """{name: float32 tensor} of a model with this transformers.GPT2Config.

    CannotLoad if its safetensors files are missing or damaged, or hold another model."""
    from transformers import GPT2LMHeadModel
    with _refusing(model_type):
        # transformers finds the files on the hub, joins shards, and knows the old names of tensors.
        model, loading = GPT2LMHeadModel.from_pretrained(
            model_type, config=source, dtype=torch.float32, use_safetensors=True,
            output_loading_info=True)
    missing = len(loading['missing_keys'])
    if missing:  # transformers has filled them with random numbers
        raise refusal(model_type, f'its file lacks {missing} tensors of the model in its config')
    return model.state_dict()


@torch.no_grad()
def copy_weights(gpt, tensors):
    """Copies what read_weights() has returned into a GPT."""
    for name, parameter in gpt.named_parameters():
        weight = tensors[name]
        if name.endswith(CONV1D_WEIGHTS):
            weight = weight.t()
        parameter.copy_(weight)


# ---- tokenizer ----

def _tokenizer_json(model_type):
    """Path of a model's tokenizer.json, downloaded if need be; None if there is none."""
    if os.path.isdir(model_type):
        path = os.path.join(model_type, 'tokenizer.json')
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    with _refusing(model_type):
        try:
            return hf_hub_download(model_type, 'tokenizer.json')
        except EntryNotFoundError:  # or, offline, the model was downloaded without it
            return None


def _read_tokenizer(path):
    try:
        with open(path, encoding='utf-8') as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read ({error})') from error
    with explained(UserError, prefix=f'{path}: '):
        return describe_tokenizer_json(text)


# ---- refusals ----

def refusal(model_type, reason):
    """The CannotLoad that says why a model can't be loaded, and which models can."""
    reason = ' '.join(str(reason).split())[:300]  # one line
    return CannotLoad(f'{model_type} cannot be loaded as a GPT-2 ({reason}): give '
                      f'{", ".join(GPT2_NAMES)}, the hub id of a model of that architecture, or a '
                      'directory with config.json and model.safetensors; offline, only directories '
                      'and downloaded models work')


@contextlib.contextmanager
def _refusing(model_type):
    """Turns what Hugging Face's packages raise for a missing or broken model into refusal().

    It belongs around calls of those packages alone, so that a bug of ours keeps its traceback."""
    import httpx
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    unreachable = (OSError, httpx.HTTPError)
    refused = (ValueError, RuntimeError, StrictDataclassError, SafetensorError)
    # transformers does not check the form of JSON files: a list where it expects an object, or a
    # missing key, ends in one of these.
    malformed = (TypeError, LookupError, AttributeError)
    try:
        yield
    except (*unreachable, *refused, *malformed) as error:
        raise refusal(model_type, error) from error
