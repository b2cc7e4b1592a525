"""plaingpt/formats/gguf_writing.py: a file holds the model, and llama.cpp computes the same."""
import math
import sys
import tracemalloc

import gguf
import pytest
import torch
from conftest import tiny_ids
from gguf_files import CHARS, LLAMA, MODELS, SCALING, expected_state, random_gpt, written

from model import GPT, GPTConfig
from plaingpt.formats.families import NoTarget
from plaingpt.formats.gguf_file import read_gguf
from plaingpt.formats.gguf_reading import gguf_tokenizer_of, load_gguf
from plaingpt.formats.gguf_writing import write_gguf
from plaingpt.formats.llama_cpp import LlamaCpp
from plaingpt.system.messages import UserError
from plaingpt.text.tokenizers import load_tokenizer


# ---- out and in again ----

@pytest.mark.parametrize('model', MODELS)
def test_a_file_holds_each_number_of_the_model_and_its_whole_config(tmp_path, model):
    gpt, path = written(tmp_path, model)
    found = load_gguf(path)
    expected = expected_state(gpt)
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    gpt.config.vocab_size = len(CHARS['chars'])
    assert found.config == gpt.config
    assert (found.transformer.wte.weight is found.lm_head.weight) == gpt.config.tied
    assert gguf_tokenizer_of(path) == CHARS


def rounding_in_blocks(type, matrix):
    """How far a number may move in a file of this type, with a block of 32 numbers in each row."""
    blocks = matrix.unflatten(1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    rounded_to_float16 = largest * 2 ** -11
    if type == 'q8_0':
        return largest * 0.5 / 127 + rounded_to_float16
    if type == 'q4_0':
        # 8 steps to the number of largest magnitude, but only 7 on the other side of zero.
        return largest / 8 + rounded_to_float16
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
    return step / 2 + 3 * rounded_to_float16  # of the least number, and of 15 steps


@pytest.mark.parametrize('type', ['f16', 'bf16', 'q8_0', 'q4_0', 'q4_1'])
@pytest.mark.parametrize('model', ['gpt2', 'llama with biases', 'qwen3'])
def test_matrices_are_rounded_and_vectors_are_not(tmp_path, model, type):
    gpt, path = written(tmp_path, model, type)
    for name, tensor in load_gguf(path).state_dict().items():
        expected = expected_state(gpt)[name]
        if tensor.dim() == 1 or name == 'transformer.wpe.weight':
            assert torch.equal(tensor, expected)
        elif type == 'f16':
            assert torch.equal(tensor, expected.half().float())
        elif type == 'bf16':
            assert torch.equal(tensor, expected.bfloat16().float())
        else:
            difference = (tensor - expected).unflatten(1, (-1, 32)).abs()
            assert (difference <= rounding_in_blocks(type, expected) * 1.001).all()
            assert not torch.equal(tensor, expected)


@pytest.mark.parametrize('type', ['q8_0', 'q4_0', 'q4_1'])
def test_rows_that_are_no_whole_blocks_are_float16(tmp_path, type):
    _, path = written(tmp_path, 'llama', type, mlp_width=48)
    types = {name: info.type.name for name, info in read_gguf(path).tensors.items()}
    assert types['blk.0.ffn_down.weight'] == 'F16'
    assert types['blk.0.ffn_up.weight'] == types['token_embd.weight'] == type.upper()


@pytest.mark.parametrize('type, number', [
    ('q8_0', gguf.LlamaFileType.MOSTLY_Q8_0), ('q4_0', gguf.LlamaFileType.MOSTLY_Q4_0),
    ('q4_1', gguf.LlamaFileType.MOSTLY_Q4_1)])
def test_the_metadata_says_what_llama_cpp_shows(tmp_path, type, number):
    _, path = written(tmp_path, 'llama', type)
    fields = gguf.GGUFReader(path).fields
    found = {key: field.contents() for key, field in fields.items()}
    assert found['general.architecture'] == 'llama'
    assert found['general.name'] == 'plainGPT'
    assert found['general.file_type'] == number
    assert found['general.quantization_version'] == gguf.GGML_QUANT_VERSION
    assert found['llama.context_length'] == 128
    assert found['llama.vocab_size'] == len(found['tokenizer.ggml.tokens']) == 60


# ---- refusals ----

@pytest.mark.parametrize('options, reason', [
    (LLAMA | dict(mlp='relu2', bias=True), 'bias=True has no place in a GGUF file of arcee'),
    (LLAMA | dict(qk_norm=True, rope_scaling=SCALING), 'rope_scaling has no place'),
    (LLAMA | dict(qkv_bias=True, rope_scaling=SCALING), 'rope_scaling has no place'),
    (dict(position='alibi'), 'alibi'),
    (LLAMA | dict(logit_softcap=30.0), 'logit_softcap=30.0'),
])
def test_what_llama_cpp_cannot_compute_is_refused_and_nothing_is_written(
        tmp_path, options, reason):
    path = tmp_path / 'model.gguf'
    with pytest.raises(NoTarget, match=reason):
        write_gguf(str(path), random_gpt(**options), CHARS)
    assert not path.exists()


@pytest.mark.parametrize('type, number', [
    ('f16', 7e4), ('q8_0', 1e7), ('q4_0', 6e5), ('q4_1', -7e4), ('f32', math.nan),
    ('bf16', math.inf)])
def test_numbers_that_the_type_does_not_hold_are_refused(tmp_path, type, number):
    gpt = random_gpt(**LLAMA)
    with torch.no_grad():
        gpt.lm_head.weight[0, 0] = number
    with pytest.raises(NoTarget, match='token_embd.weight has numbers up to'):
        write_gguf(str(tmp_path / 'model.gguf'), gpt, CHARS, type)


def test_without_the_package_a_sentence_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gguf', None)
    with pytest.raises(UserError, match='pip install gguf'):
        write_gguf(str(tmp_path / 'model.gguf'), random_gpt(), CHARS)


# ---- memory ----

def test_writing_takes_no_more_memory_than_one_tensor(tmp_path):
    gpt = random_gpt(**LLAMA, n_layer=8, n_embd=256, tied=False)
    largest = max(parameter.numel() for parameter in gpt.parameters())
    tracemalloc.start()  # it counts numpy's memory, in which the conversion happens
    try:
        write_gguf(str(tmp_path / 'model.gguf'), gpt, CHARS, 'q8_0')
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    total = sum(parameter.numel() for parameter in gpt.parameters())
    assert total > 17 * largest  # so all of them in Q8_0 would take 18 bytes for each of `largest`
    assert peak < 12 * largest


# ---- llama.cpp ----

def difference_from_llama_cpp(gpt, path, lengths=(1, 5, 33, 100)):
    """The largest difference in the log-probabilities of the four likeliest next tokens."""
    model = LlamaCpp(path, context=gpt.config.block_size)
    vocab_size = len(CHARS['chars'])
    differences = []
    for length in lengths:
        ids = tiny_ids(1, length, vocab_size=vocab_size, seed=length)
        logits, _ = gpt(ids)
        ours = logits[0, -1, :vocab_size].log_softmax(-1)
        for token, value in model.top_log_probabilities(ids[0].tolist()).items():
            differences.append(abs(ours[token].item() - value))
    assert len(differences) == 4 * len(lengths)
    return max(differences)


@pytest.mark.parametrize('model', MODELS)
def test_llama_cpp_computes_the_same(tmp_path, model):
    pytest.importorskip('xllamacpp')
    gpt, path = written(tmp_path, model)
    # Its GELU rounds to float16, which changes the others by less than 1e-5.
    bound = 5e-3 if model.startswith('gpt2') else 2e-5
    assert difference_from_llama_cpp(gpt, path) < bound


@pytest.mark.parametrize('type, bound', [
    ('f16', 0.01), ('bf16', 0.1), ('q8_0', 0.3), ('q4_0', 0.3), ('q4_1', 0.3)])
def test_llama_cpp_reads_the_other_types(tmp_path, type, bound):
    pytest.importorskip('xllamacpp')
    _, path = written(tmp_path, 'llama', type)
    assert difference_from_llama_cpp(load_gguf(path).eval(), path) < bound


def test_llama_cpp_has_no_exact_gelu_so_a_warning_says_that(tmp_path, capfd):
    pytest.importorskip('xllamacpp')
    gpt, path = written(tmp_path, 'gpt2', gelu='exact')
    assert "gelu='exact'" in capfd.readouterr().err
    assert difference_from_llama_cpp(gpt, path) < 0.02


def test_llama_cpp_writes_the_text_that_we_write_and_nothing_else(tmp_path, capfd):
    pytest.importorskip('xllamacpp')
    gpt, path = written(tmp_path, 'llama with grouped heads of their own size, untied')
    tokenizer = load_tokenizer(CHARS)
    prompt = 'HELLO'
    ids = torch.tensor([tokenizer.encode(prompt)])
    ours = gpt.generate(ids, 40, temperature=0, vocab_size=tokenizer.vocab_size)
    text = tokenizer.decode(ours[0].tolist())
    assert prompt + LlamaCpp(path, context=64).greedy_text(prompt, 40) == text
    assert capfd.readouterr() == ('', '')


def test_llama_cpp_refuses_a_damaged_file_in_a_sentence(tmp_path):
    pytest.importorskip('xllamacpp')
    _, path = written(tmp_path)
    with open(path, 'r+b') as file:
        file.truncate(5000)
    with pytest.raises(UserError, match='llama.cpp cannot open .*model.gguf'):
        LlamaCpp(path, context=64)


def test_probabilities_come_where_the_likeliest_token_is_a_part_of_a_character(tmp_path):
    half_a_character = 447  # bytes E2 80 of GPT-2's vocabulary
    gpt = GPT(GPTConfig(16, 50257, 1, 2, 32)).eval()
    with torch.no_grad():
        gpt.lm_head.weight[half_a_character] = 5 * gpt.transformer.ln_f.weight
        gpt.transformer.ln_f.bias.fill_(1)
    path = str(tmp_path / 'model.gguf')
    write_gguf(path, gpt, {'kind': 'gpt2'})
    likeliest = LlamaCpp(path, context=16).top_log_probabilities([5, 6, 7])
    assert next(iter(likeliest)) == half_a_character
