"""plaingpt/formats/gguf_reading.py: what a GGUF file holds is loaded exactly, or refused."""
import random
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from forgery import frugal
from gguf_files import SCALING, change, written

from plaingpt.formats import gguf_file, gguf_reading
from plaingpt.formats.gguf_file import TENSOR_TYPES
from plaingpt.formats.gguf_metadata import rope_factors
from plaingpt.formats.gguf_reading import gguf_tokenizer_of, load_gguf
from plaingpt.formats.hugging_face import CannotLoad
from plaingpt.system.messages import UserError

NAN = float('nan')
DOWN = 'blk.0.ffn_down.weight'


# ---- types of tensors ----

def random_blocks(tensor_type, shape):
    """Random bytes of a quantised tensor whose scales, in float16, are all finite."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    row_bytes = shape[1] // block * block_bytes
    # Below 0x78, a byte can't be the half of a float16 that makes it infinite or no number.
    return np.random.default_rng(0).integers(0, 0x78, (shape[0], row_bytes), np.uint8)


@pytest.mark.parametrize('name', TENSOR_TYPES)
def test_each_type_of_tensor_is_read_as_the_package_gguf_reads_it(tmp_path, monkeypatch, name):
    monkeypatch.setattr(gguf_file, 'NUMBERS_AT_ONCE', 5 * 256)  # several parts, the last smaller
    _, path = written(tmp_path, mlp_width=256)
    tensor_type = gguf.GGMLQuantizationType[name]
    raw = random_blocks(tensor_type, (32, 256))
    change(path, tensors={DOWN: raw}, types={DOWN: tensor_type})
    found = load_gguf(path).transformer.h[0].mlp.c_proj.weight
    expected = gguf.dequantize(raw, tensor_type)
    assert torch.equal(found, torch.from_numpy(expected))
    assert expected.any()


@pytest.mark.parametrize('name', ['Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0'])
def test_a_quantised_matrix_is_near_the_one_it_was_made_of(tmp_path, name):
    gpt, path = written(tmp_path)
    tensor_type = gguf.GGMLQuantizationType[name]
    matrix = gpt.transformer.h[0].mlp.c_proj.weight.detach()
    raw = gguf.quantize(matrix.numpy(), tensor_type)
    change(path, tensors={DOWN: raw}, types={DOWN: tensor_type})
    found = load_gguf(path).transformer.h[0].mlp.c_proj.weight
    bits = int(name[1])
    assert (found - matrix).abs().max() < 2.2 * matrix.abs().max() / 2 ** bits


# ---- metadata ----

def test_entries_that_are_missing_have_llama_cpps_defaults(tmp_path):
    gpt, path = written(tmp_path)
    names = ('vocab_size', 'attention.head_count_kv', 'attention.key_length',
             'attention.value_length', 'rope.dimension_count', 'rope.freq_base')
    change(path, {f'llama.{name}': None for name in names})
    gpt.config.vocab_size = 60
    assert load_gguf(path).config == gpt.config


def test_entries_that_change_nothing_are_allowed(tmp_path):
    _, path = written(tmp_path)
    expected = load_gguf(path).config
    change(path, {'llama.expert_count': 0, 'llama.rope.scaling.type': 'linear',
                  'llama.rope.scaling.factor': 1.0, 'llama.attention.causal': True,
                  'llama.tensor_data_layout': 'Meta AI original pth', 'general.license': 'mit',
                  'split.count': 1})
    assert load_gguf(path).config == expected


def test_dropout_can_be_chosen(tmp_path):
    _, path = written(tmp_path)
    gpt = load_gguf(path, {'dropout': 0.25})
    assert gpt.config.dropout == gpt.transformer.h[0].mlp.dropout.p == 0.25


def test_without_weights_a_model_has_the_shape_alone(tmp_path):
    _, path = written(tmp_path, 'qwen3')
    random_weights = load_gguf(path, weights=False)
    loaded = load_gguf(path)
    assert random_weights.config == loaded.config
    assert not torch.equal(random_weights.lm_head.weight, loaded.lm_head.weight)


# ---- scaled rope ----

def scaled(tmp_path, factors, **metadata):
    """Path of a Llama with these factors of rope and no numbers of ours beside them."""
    _, path = written(tmp_path, head_size=16)
    change(path, metadata, {'rope_freqs.weight': factors})
    return path


def test_the_scaling_of_llama_3_is_recognised_by_its_factors(tmp_path):
    scaling = SCALING | {'factor': 32.0, 'original_context': 8192}
    path = scaled(tmp_path, rope_factors(10000.0, 16, scaling).numpy())
    assert load_gguf(path).config.rope_scaling == scaling


def test_factors_of_one_scale_nothing(tmp_path):
    path = scaled(tmp_path, np.ones(8, np.float32))
    assert load_gguf(path).config.rope_scaling is None


@pytest.mark.parametrize('factors', [
    np.arange(1, 9, dtype=np.float32), np.full(8, NAN, np.float32), np.zeros(8, np.float32),
    np.full(8, 2, np.float32), np.full(8, -1, np.float32)])
def test_other_factors_are_refused(tmp_path, factors):
    ours = {f'plaingpt.rope_scaling.{name}': value for name, value in SCALING.items()}
    assert_refused(scaled(tmp_path, factors), 'rope_freqs.weight')
    assert_refused(scaled(tmp_path, factors, **ours), 'rope_freqs.weight')
    ours['plaingpt.rope_scaling.factor'] = 'eight'
    assert_refused(scaled(tmp_path, factors, **ours), 'rope_freqs.weight')


# ---- refusals ----

def assert_refused(path, reason=''):
    """Asserts that a file is refused in one sentence with this reason."""
    for weights in (True, False):
        with pytest.raises(CannotLoad) as refusal:
            load_gguf(path, weights=weights)
        message = str(refusal.value)
        assert reason in message
        assert path in message
        assert '\n' not in message


@pytest.mark.parametrize('model, metadata, reason', [
    ('llama', {'general.architecture': 'mamba'}, "general.architecture is 'mamba'"),
    ('llama', {'llama.expert_count': 8}, 'llama.expert_count is 8'),
    ('llama', {'llama.attention.sliding_window': 4096}, 'llama.attention.sliding_window is 4096'),
    ('llama', {'llama.logit_scale': 0.5}, 'llama.logit_scale is 0.5'),
    ('llama', {'llama.attention.scale': 0.5}, 'llama.attention.scale is 0.5'),
    ('llama', {'llama.attention.causal': False}, 'llama.attention.causal is False'),
    ('llama', {'llama.rope.scaling.type': 'yarn'}, "llama.rope.scaling.type is 'yarn'"),
    ('llama', {'llama.rope.scaling.factor': 4.0}, 'llama.rope.scaling.factor is 4.0'),
    ('llama', {'llama.rope.dimension_count': 4}, 'llama.rope.dimension_count is not the 8'),
    ('llama', {'llama.attention.value_length': 4}, 'llama.attention.value_length is not the 8'),
    ('llama', {'llama.vocab_size': 61}, 'llama.vocab_size is not the 60'),
    ('llama', {'tokenizer.ggml.tokens': ['a', 'b']}, 'it has 2 tokens but 60 embeddings'),
    ('llama', {'llama.something_new': 1.0}, 'llama.something_new is 1.0'),
    ('llama', {'llama.block_count': None}, 'it has no llama.block_count'),
    ('llama', {'llama.block_count': 3}, 'its tensor blk.2.attn_norm.weight is missing'),
    ('llama', {'llama.block_count': 1}, 'it has the tensor blk.1.'),
    ('llama', {'llama.block_count': 2 ** 31 - 1}, 'llama.block_count is 2147483647'),
    ('llama', {'llama.block_count': True}, 'llama.block_count is True'),
    ('llama', {'llama.embedding_length': 2 ** 30}, 'has the shape'),
    ('llama', {'llama.feed_forward_length': 2 ** 30}, 'has the shape'),
    ('llama', {'llama.feed_forward_length': [128, 64]}, 'feed_forward_length is [128, 64]'),
    ('llama', {'llama.attention.head_count': 0}, 'llama.attention.head_count is 0'),
    ('llama', {'llama.attention.head_count': 'four'}, "llama.attention.head_count is 'four'"),
    ('llama', {'llama.attention.head_count_kv': 3}, 'multiple of n_kv_head=3'),
    ('llama', {'llama.rope.freq_base': NAN}, 'llama.rope.freq_base is nan'),
    ('llama', {'llama.rope.freq_base': 0.0}, 'rope_theta=0.0'),
    ('llama', {'llama.attention.layer_norm_rms_epsilon': 2.0}, 'norm_eps=2.0'),
    ('gpt2', {'gpt2.context_length': 2 ** 30}, 'position_embd.weight has the shape'),
    ('gpt2', {'gpt2.attention.layer_norm_epsilon': None}, 'no gpt2.attention.layer_norm_epsilon'),
    ('gpt2', {'gpt2.rope.scaling.factor': 2.0}, 'gpt2.rope.scaling.factor is 2.0'),
    ('llama', {'split.count': 3}, 'it is one of 3 parts'),
    ('llama', {'general.alignment': 33}, 'its general.alignment is 33'),
])
def test_what_no_gpt_computes_is_refused_by_name(tmp_path, model, metadata, reason):
    _, path = written(tmp_path, model)
    change(path, metadata)
    with frugal():
        assert_refused(path, reason)


@pytest.mark.parametrize('model, tensors, reason', [
    ('llama', {DOWN: None}, f'{DOWN} is missing'),
    ('llama', {'token_embd.weight': None}, 'no tensor token_embd.weight'),
    ('llama', {'blk.0.attn_q.bias': np.ones(32, np.float32)}, 'those of a qwen2, not of a llama'),
    ('llama', {'blk.1.attn_q.bias': np.ones(32, np.float32)}, 'the tensor blk.1.attn_q.bias'),
    ('llama', {DOWN: np.ones((32, 127), np.float32)}, f'{DOWN} has the shape (32, 127), not'),
    ('llama', {DOWN: np.ones((1, 32, 128), np.float32)}, f'{DOWN} has the shape (1, 32, 128), not'),
    ('llama', {'rope_freqs.weight': np.ones(3, np.float32)}, 'shape (3,), but heads have 8'),
    ('llama', {DOWN: np.ones((32, 128), np.int32)}, f'{DOWN} has the type I32'),
    ('llama', {DOWN: np.ones((32, 128), np.float64)}, f'{DOWN} has the type F64'),
    ('qwen2', {'blk.0.attn_q.bias': None}, 'those of a llama, not of a qwen2'),
    ('qwen3', {'blk.0.attn_q_norm.weight': None}, 'blk.0.attn_q_norm.weight is missing'),
    ('gpt2', {'blk.1.attn_qkv.bias': None}, 'blk.1.attn_qkv.bias is missing'),
])
def test_tensors_of_another_model_are_refused(tmp_path, model, tensors, reason):
    _, path = written(tmp_path, model)
    change(path, tensors=tensors)
    assert_refused(path, reason)


@pytest.mark.parametrize('name', ['token_embd.weight', 'blk.1.attn_q.weight', 'output_norm.weight'])
@pytest.mark.parametrize('number', [NAN, float('inf')])
def test_numbers_that_are_not_finite_are_refused(tmp_path, name, number):
    gpt, path = written(tmp_path)
    shape = (32,) if 'norm' in name else (gpt.config.n_embd if 'blk' in name else 60, 32)
    array = np.ones(shape, np.float32)
    array.flat[-1] = number
    change(path, tensors={name: array})
    with pytest.raises(CannotLoad, match='not finite'):
        load_gguf(path)


# ---- damaged files ----

def header(*values, version=3):
    """The bytes of a header: numbers of struct's formats '<I' (int), '<Q' (tuple of one), text."""
    parts = [b'GGUF', struct.pack('<I', version)]
    for value in values:
        if isinstance(value, str):
            parts.append(struct.pack('<Q', len(value)) + value.encode())
        elif isinstance(value, tuple):
            parts.append(struct.pack('<Q', *value))
        else:
            parts.append(struct.pack('<I', value))
    return b''.join(parts)


HUGE = (2 ** 64 - 1,)
UINT32 = 4
TEXT = 8
ARRAY = 9
ONE_TENSOR = ((1,), (0,), 'x', 1, (4,), 0, (0,))  # its name, dimensions, size, type F32, offset

DAMAGED = {
    'nothing': (b'', 'does not begin with the letters GGUF'),
    'another file': (b'PK\3\4' * 100, 'does not begin with the letters GGUF'),
    'the letters alone': (b'GGUF', 'truncated'),
    'version 1': (header((0,), (0,), version=1), 'its version is 1, not 2 or 3'),
    'version 4': (header((0,), (0,), version=4), 'its version is 4'),
    'big-endian': (b'GGUF' + struct.pack('>IQQ', 3, 0, 0), 'big-endian'),
    'no metadata': (header((0,), (0,)), 'general.architecture is None'),
    'many entries': (header((0,), HUGE), 'truncated'),
    'many tensors': (header(HUGE, (0,)), 'truncated'),
    'long text': (header((0,), (1,), HUGE), 'truncated'),
    'long array of numbers': (header((0,), (1,), 'x', ARRAY, UINT32, HUGE), 'truncated'),
    'long array of texts': (header((0,), (1,), 'x', ARRAY, TEXT, HUGE), 'truncated'),
    'an array of arrays': (header((0,), (1,), 'x', ARRAY, ARRAY, (1,)), 'the unknown type 9'),
    'an unknown type of value': (header((0,), (1,), 'x', 99), 'the unknown type 99'),
    'two values of a key': (header((0,), (2,), 'x', UINT32, 1, 'x', UINT32, 2), 'two values of x'),
    'no UTF-8': (header((0,), (1,), (1,)) + b'\xff' * 9, 'no UTF-8'),
    'no numbers': (header(*ONE_TENSOR), 'bytes of its tensors are missing'),
    'two tensors of a name':
        (header((2,), (0,), *ONE_TENSOR[2:], *ONE_TENSOR[2:]), 'two tensors x'),
    'tensors that share bytes':
        (header((2,), (0,), *ONE_TENSOR[2:], 'y', *ONE_TENSOR[3:]), 'does not follow'),
    'many dimensions': (header((1,), (0,), 'x', 5), 'x has 5 dimensions'),
    'no dimensions': (header((1,), (0,), 'x', 0), 'x has 0 dimensions'),
    'an empty tensor': (header((1,), (0,), 'x', 1, (0,), 0, (0,)), 'has the shape (0,)'),
    'a large tensor':
        (header((1,), (0,), 'x', 2, HUGE, HUGE, 0, (0,)), 'bytes of its tensors are missing'),
    'half a block': (header((1,), (0,), 'x', 1, (48,), 8, (0,)), 'Q8_0 has the shape (48,)'),
    'an unknown type of tensor': (header((1,), (0,), 'x', 1, (4,), 99, (0,)), 'unknown type 99'),
    'a type that is not read': (header((1,), (0,), 'x', 1, (256,), 16, (0,)), 'the type IQ2_XXS'),
}


@pytest.mark.parametrize('name', DAMAGED)
def test_a_damaged_file_is_refused_and_takes_no_memory(tmp_path, ends_in_time, name):
    content, reason = DAMAGED[name]
    path = tmp_path / 'model.gguf'
    path.write_bytes(content)
    with frugal():
        assert_refused(str(path), reason)
        with pytest.raises(UserError if name == 'no metadata' else CannotLoad):
            gguf_tokenizer_of(str(path))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    _, path = written(tmp_path)
    with open(path, 'rb') as file:
        content = file.read()
    for size in (*range(8, 3000, 171), len(content) // 2, len(content) - 40):
        with open(path, 'wb') as file:
            file.write(content[:size])
        assert_refused(path, 'truncated')


def test_any_flipped_byte_of_the_header_is_refused_or_changes_nothing_but_the_model(
        tmp_path, ends_in_time):
    _, path = written(tmp_path, 'llama with scaled rope')
    with open(path, 'rb') as file:
        content = file.read()
    end = content.index(b'rope_freqs.weight')
    for at in random.Random(0).sample(range(end), 150):
        for mask in (0xff, 0x01):
            with open(path, 'wb') as file:
                file.write(content[:at] + bytes([content[at] ^ mask]) + content[at + 1:])
            try:
                load_gguf(path)
                gguf_tokenizer_of(path)
            except (CannotLoad, UserError) as error:
                assert '\n' not in str(error)


@pytest.mark.parametrize('path', ['missing.gguf', '.'])
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert_refused(path, 'there is no such file')


def test_without_the_package_a_sentence_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gguf', None)
    with pytest.raises(UserError, match='pip install gguf'):
        load_gguf(str(tmp_path / 'model.gguf'))


@pytest.mark.parametrize('slipping', ['config_from', 'GPT'])
def test_a_bug_while_a_file_is_loaded_keeps_its_traceback(tmp_path, monkeypatch, slipping):
    def slip(*arguments):
        raise TypeError('a slip')

    _, path = written(tmp_path)
    monkeypatch.setattr(gguf_reading, slipping, slip)
    with pytest.raises(TypeError, match='^a slip$'):
        load_gguf(path)
