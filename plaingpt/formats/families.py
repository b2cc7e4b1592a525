"""
The architectures of other programs that compute exactly what some GPTs compute, and which of their
tensors hold which of our parameters.

A family has the same name in Hugging Face's config.json (model_type) and in GGUF files
(general.architecture). Both forms split our matrices into the same parts; only the names differ,
and the order of some rows and columns:

    ours                      Hugging Face's Llama                     GGUF's llama
    transformer.wte.weight    model.embed_tokens.weight                token_embd.weight
    …h.0.attn.c_attn.weight   …layers.0.self_attn.q_proj.weight        blk.0.attn_q.weight, permuted
                              …k_proj.weight, …v_proj.weight           …attn_k (permuted), …attn_v
    …h.0.mlp.c_fc.weight      …mlp.gate_proj.weight, …up_proj.weight   …ffn_gate, …ffn_up
"""
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Family:
    """An architecture that other programs have."""
    name: str          # model_type in config.json, general.architecture in GGUF
    architecture: str  # the class of transformers
    permuted: bool     # whether GGUF has queries and keys in another order of rows


GPT2 = Family('gpt2', 'GPT2LMHeadModel', permuted=False)
LLAMA = Family('llama', 'LlamaForCausalLM', permuted=True)
QWEN2 = Family('qwen2', 'Qwen2ForCausalLM', permuted=False)
QWEN3 = Family('qwen3', 'Qwen3ForCausalLM', permuted=False)
ARCEE = Family('arcee', 'ArceeForCausalLM', permuted=True)
FAMILIES = {family.name: family for family in (GPT2, LLAMA, QWEN2, QWEN3, ARCEE)}


class Part(NamedTuple):
    """A tensor of the family that holds some rows of one of our parameters."""
    hugging_face: str  # its name there
    gguf: str
    rows: int
    heads: int | None = None  # where GGUF permutes the rows of a head: how many heads they are


class Mapping(NamedTuple):
    """One of our parameters, and the parts of it in order, from the first row to the last."""
    ours: str
    parts: list
    transposed: bool  # in Hugging Face's form: its GPT-2 stores these matrices as (in, out)


class Constant(NamedTuple):
    """A tensor that the family needs and the GPT lacks, with the value that changes nothing."""
    hugging_face: str
    gguf: str
    shape: tuple
    value: float


class NoTarget(ValueError):
    """No family computes what this GPT does. The message is one sentence that names the options."""


# ---- which family ----

def family_for(config):
    """The Family that computes exactly what a GPT of this GPTConfig does. NoTarget if none does."""
    if config.position == 'learned':
        family = GPT2
    elif config.mlp == 'relu2':
        family = ARCEE
    elif config.qk_norm:
        family = QWEN3
    elif has_qkv_bias_alone(config):
        family = QWEN2
    else:
        family = LLAMA
    lacking = []
    for name, value in _needed(family, config).items():
        if getattr(config, name) != value:
            lacking.append(f'{name}={getattr(config, name)!r}')
    if lacking:
        raise NoTarget('no architecture of transformers and llama.cpp computes what this model '
                       f'does: the nearest, {family.name}, has no {", ".join(lacking)}')
    return family


def has_qkv_bias_alone(config):
    """Whether queries, keys and values have biases, and no other layer has."""
    return config.qkv_bias and not config.bias


def _needed(family, config):
    """{option: the value that a GPT must have to be of this family}."""
    needed = {'logit_softcap': 0}
    if family is GPT2:
        needed |= {'norm': 'layernorm', 'mlp': 'gelu', 'qk_norm': False,
                   'n_kv_head': config.n_head, 'head_size': config.n_embd / config.n_head}
    else:
        needed |= {'position': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu'}
    if family is ARCEE:
        needed |= {'mlp': 'relu2', 'qk_norm': False}
    if family is QWEN3:
        needed['bias'] = False
    if has_qkv_bias_alone(config) and family is not QWEN2:
        needed['qkv_bias'] = False
    return needed


# ---- which tensors ----

class _Layer(NamedTuple):
    """A module of ours with a weight, and the parts of it, named without '.weight' or '.bias'."""
    ours: str
    parts: list
    has_bias: bool = False    # in the GPT
    needs_bias: bool = False  # in the family
    transposed: bool = False


def tensors_of(family, config):
    """A list with the Mapping of each parameter of a GPT; a tied head is none."""
    mappings = []
    for layer in _layers(family, config):
        weights = _with_suffix(layer.parts, '.weight')
        mappings.append(Mapping(layer.ours + '.weight', weights, layer.transposed))
        if layer.has_bias:
            biases = _with_suffix(layer.parts, '.bias')
            mappings.append(Mapping(layer.ours + '.bias', biases, transposed=False))
    if config.qk_norm_weight:
        for ours, part in _qk_norms(config):
            mappings.append(Mapping(ours, [part], transposed=False))
    return mappings


def constants_of(family, config):
    """A list of the Constants: GPT-2's biases, and the weights of Qwen3's query and key norms."""
    constants = []
    for layer in _layers(family, config):
        if layer.needs_bias and not layer.has_bias:
            for part in _with_suffix(layer.parts, '.bias'):
                constants.append(Constant(part.hugging_face, part.gguf, (part.rows,), 0.0))
    if family is QWEN3 and not config.qk_norm_weight:
        for _, part in _qk_norms(config):
            constants.append(Constant(part.hugging_face, part.gguf, (part.rows,), 1.0))
    return constants


def _with_suffix(parts, suffix):
    return [part._replace(hugging_face=part.hugging_face + suffix, gguf=part.gguf + suffix)
            for part in parts]


def _layers(family, config):
    """Yields the _Layers of a GPT."""
    if family is GPT2:
        yield from _gpt2_layers(config)
    else:
        yield from _llama_layers(family, config)
    if not config.tied:
        yield _Layer('lm_head', [Part('lm_head', 'output', config.vocab_size)])


def _gpt2_layers(config):
    channels = config.n_embd

    def layer(name, gguf, rows, transposed=False):
        # Our names are those of Hugging Face's GPT-2.
        return _Layer(name, [Part(name, gguf, rows)], config.bias, True, transposed)

    yield _Layer('transformer.wte', [Part('transformer.wte', 'token_embd', config.vocab_size)])
    yield _Layer('transformer.wpe', [Part('transformer.wpe', 'position_embd', config.block_size)])
    for i in range(config.n_layer):
        ours = f'transformer.h.{i}.'
        gguf = f'blk.{i}.'
        yield layer(ours + 'ln_1', gguf + 'attn_norm', channels)
        yield layer(ours + 'attn.c_attn', gguf + 'attn_qkv', 3 * channels, transposed=True)
        yield layer(ours + 'attn.c_proj', gguf + 'attn_output', channels, transposed=True)
        yield layer(ours + 'ln_2', gguf + 'ffn_norm', channels)
        yield layer(ours + 'mlp.c_fc', gguf + 'ffn_up', config.mlp_width, transposed=True)
        yield layer(ours + 'mlp.c_proj', gguf + 'ffn_down', channels, transposed=True)
    yield layer('transformer.ln_f', 'output_norm', channels)


def _llama_layers(family, config):
    """The layers of Llama and of those that descend from it."""
    channels = config.n_embd
    width = config.mlp_width
    q_rows = config.n_head * config.head_size
    kv_rows = config.n_kv_head * config.head_size
    q_heads = config.n_head if family.permuted else None
    k_heads = config.n_kv_head if family.permuted else None

    def layer(name, parts, has_bias=False):
        return _Layer(name, parts, has_bias, has_bias)

    yield layer('transformer.wte', [Part('model.embed_tokens', 'token_embd', config.vocab_size)])
    for i in range(config.n_layer):
        ours = f'transformer.h.{i}.'
        attention = f'model.layers.{i}.self_attn.'
        mlp = f'model.layers.{i}.mlp.'
        gguf = f'blk.{i}.'
        norm_1 = Part(f'model.layers.{i}.input_layernorm', gguf + 'attn_norm', channels)
        norm_2 = Part(f'model.layers.{i}.post_attention_layernorm', gguf + 'ffn_norm', channels)
        q = Part(attention + 'q_proj', gguf + 'attn_q', q_rows, q_heads)
        k = Part(attention + 'k_proj', gguf + 'attn_k', kv_rows, k_heads)
        v = Part(attention + 'v_proj', gguf + 'attn_v', kv_rows)
        o = Part(attention + 'o_proj', gguf + 'attn_output', channels)
        gate = Part(mlp + 'gate_proj', gguf + 'ffn_gate', width)
        up = Part(mlp + 'up_proj', gguf + 'ffn_up', width)
        down = Part(mlp + 'down_proj', gguf + 'ffn_down', channels)
        yield layer(ours + 'ln_1', [norm_1])
        yield layer(ours + 'attn.c_attn', [q, k, v], config.bias or config.qkv_bias)
        yield layer(ours + 'attn.c_proj', [o], config.bias)
        yield layer(ours + 'ln_2', [norm_2])
        hidden = [gate, up] if config.mlp == 'swiglu' else [up]
        yield layer(ours + 'mlp.c_fc', hidden, config.bias)
        yield layer(ours + 'mlp.c_proj', [down], config.bias)
    yield layer('transformer.ln_f', [Part('model.norm', 'output_norm', channels)])


def _qk_norms(config):
    """Yields (our name, Part) of the weights of the norms of queries and keys."""
    for i in range(config.n_layer):
        for kind in ('q', 'k'):
            part = Part(f'model.layers.{i}.self_attn.{kind}_norm.weight',
                        f'blk.{i}.attn_{kind}_norm.weight', config.head_size)
            yield f'transformer.h.{i}.attn.{kind}_scale', part
