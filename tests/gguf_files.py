"""What the tests of GGUF files share: random models of each architecture, and changed files."""
import gguf
import torch
from conftest import tiny_gpt

from plaingpt.formats.gguf_file import read_gguf
from plaingpt.formats.gguf_writing import write_gguf

# The vocabulary of the models has four rows more than their tokenizer.
CHARS = {'kind': 'char', 'chars': [chr(ord('A') + number) for number in range(60)]}
PADDED = 64
SHAPE = dict(block_size=128, vocab_size=PADDED, n_layer=2, n_head=4, n_embd=32)

LLAMA = dict(position='rope', norm='rmsnorm', mlp='swiglu', bias=False)
SCALING = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_context': 64}

# {name: fields of a GPTConfig}; a name begins with that of the architecture.
MODELS = {
    'gpt2': {},
    'gpt2 without biases, untied': dict(bias=False, tied=False),
    'gpt2 of other sizes': dict(mlp_width=96, norm_eps=1e-3),
    'llama': LLAMA,
    'llama with grouped heads of their own size, untied':
        LLAMA | dict(n_kv_head=2, head_size=16, tied=False, rope_theta=500.0, norm_eps=1e-6),
    'llama with biases': LLAMA | dict(bias=True, n_kv_head=2),
    'llama with scaled rope': LLAMA | dict(rope_scaling=SCALING),
    'qwen2': LLAMA | dict(qkv_bias=True, n_kv_head=2, tied=False),
    'qwen3 without weights': LLAMA | dict(qk_norm=True, n_kv_head=2),
    'qwen3': LLAMA | dict(qk_norm=True, qk_norm_weight=True, head_size=16, n_kv_head=1),
    'arcee': LLAMA | dict(mlp='relu2', n_kv_head=2),
    'arcee with scaled rope': LLAMA | dict(mlp='relu2', rope_scaling=SCALING),
}


def random_gpt(**options):
    """A GPT of SHAPE in evaluation mode, all of whose parameters are random, vectors too."""
    gpt = tiny_gpt(**{**SHAPE, **options})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.normal_(std=0.3)
            scales = parameter.dim() == 1 and not name.endswith('bias')
            if scales:
                parameter.add_(1)
    return gpt


def written(folder, model='llama', type='f32', **options):
    """(a random_gpt, the path of the GGUF file of it).

    model: one of MODELS; options: fields of the GPTConfig that differ."""
    gpt = random_gpt(**{**MODELS[model], **options})
    path = str(folder / 'model.gguf')
    write_gguf(path, gpt, CHARS, type)
    return gpt, path


def expected_state(gpt):
    """The state dict of a GPT without the rows that only pad the vocabulary."""
    state = dict(gpt.state_dict())
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        state[name] = state[name][:len(CHARS['chars'])]
    return state


def change(path, metadata=None, tensors=None, types=None):
    """Writes a GGUF file anew, with changes.

    metadata: {key: value}, None drops a key. tensors: {name: array}, None drops a tensor.
    types: {name: a gguf.GGMLQuantizationType} of tensors whose array holds raw bytes."""
    before = read_gguf(path)
    entries = before.metadata | (metadata or {})
    arrays = {name: before.tensor(name).numpy() for name in before.tensors} | (tensors or {})
    writer = gguf.GGUFWriter(path, str(entries['general.architecture']))
    for key, value in entries.items():
        if value is not None:
            writer.add_key_value(key, value, value_type(value))
    for name, array in arrays.items():
        if array is not None:
            writer.add_tensor(name, array, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def value_type(value):
    """The gguf.GGUFValueType that llama.cpp expects of a value."""
    if isinstance(value, int) and not isinstance(value, bool):
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)
