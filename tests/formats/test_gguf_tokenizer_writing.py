"""Tokenizers written to GGUF files: llama.cpp must give our ids to every text."""
import json

import pytest
from conftest import or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp_tokenizer import TEXTS, LlamaCppTokenizer, write_tiny_gguf
from tokenizers import ByteLevelBPETokenizer

from plaingpt.formats.gguf_tokenizer_reading import (CONTROL, DUMMY_MERGE, PRE_TOKENIZERS, UNUSED,
                                                     USER_DEFINED, tokenizer_from_gguf)
from plaingpt.formats.gguf_tokenizer_writing import gguf_metadata_of
from plaingpt.system.messages import UserError
from plaingpt.text.tokenizer_json import describe_tokenizer_json
from plaingpt.text.tokenizer_layout import added_token
from plaingpt.text.tokenizers import CharTokenizer, GPT2Tokenizer, load_tokenizer

END = '<|endoftext|>'
ANY_TEXT = st.text(st.characters(exclude_categories=['Cs', 'Cc', 'Cn']), max_size=40)


def trained_content(merges=300):
    """The content of a tokenizer.json of a small byte-level BPE, with all 256 bytes."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS * 3, vocab_size=257 + merges, special_tokens=[END],
                            show_progress=False)
    return json.loads(bpe.to_str())


def meta_for(name, **options):
    """The tokenizer dict of a small byte-level BPE with one of PRE_TOKENIZERS."""
    content = trained_content()
    split = PRE_TOKENIZERS[name]
    content['pre_tokenizer'] = split.pre_tokenizer
    content['normalizer'] = split.normalizer
    content['model']['ignore_merges'] = split.ignore_merges
    return describe_tokenizer_json(json.dumps(content), eos=END, **options)


def in_llama_cpp(folder, metadata):
    path = folder / 'tiny.gguf'
    write_tiny_gguf(path, metadata)
    return LlamaCppTokenizer(path)


def assert_same_ids(theirs, ours, texts=TEXTS):
    for text in texts:
        ids = ours.encode(text, special=False)
        assert theirs.encode(text, special=False) == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text


def refusal(meta, vocab_size=1000):
    with pytest.raises(UserError) as error:
        gguf_metadata_of(meta, vocab_size)
    assert '\n' not in str(error.value)
    return str(error.value)


# ---- byte-level byte-pair encoding ----

@pytest.mark.parametrize('name', PRE_TOKENIZERS)
def test_llama_cpp_gives_our_ids(tmp_path, name):
    meta = meta_for(name)
    ours = load_tokenizer(meta)
    metadata = gguf_metadata_of(meta, ours.vocab_size)
    assert metadata['tokenizer.ggml.pre'] == name
    theirs = in_llama_cpp(tmp_path, metadata)
    # Qwen2's normalizer, which llama.cpp lacks, joins the letter and its accent.
    texts = [text.replace('e\u0301', 'é') for text in TEXTS]
    assert_same_ids(theirs, ours, texts)
    text = f'a{END}b'
    assert theirs.encode(text) == ours.encode(text)
    assert ours.end_of_text in theirs.encode(text)


@pytest.fixture(scope='module')
def gpt2_pair(tmp_path_factory):
    """GPT-2's tokenizer, ours and llama.cpp's."""
    ours = or_skip(GPT2Tokenizer)
    metadata = gguf_metadata_of({'kind': 'gpt2'}, ours.vocab_size)
    return ours, in_llama_cpp(tmp_path_factory.mktemp('gpt2'), metadata)


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT)
def test_llama_cpp_gives_gpt2s_ids_to_any_text(gpt2_pair, text):
    ours, theirs = gpt2_pair
    ids = ours.encode(text, special=False)
    assert theirs.encode(text, special=False) == ids
    assert theirs.decode(ids) == text


def test_gpt2_comes_back_as_gpt2(gpt2_pair):
    ours, theirs = gpt2_pair
    assert_same_ids(theirs, ours)
    metadata = gguf_metadata_of({'kind': 'gpt2'}, 50304)
    assert metadata['tokenizer.ggml.eos_token_id'] == 50256
    assert metadata['tokenizer.ggml.bos_token_id'] == 50256
    assert metadata['tokenizer.ggml.add_bos_token'] is False
    assert metadata['tokenizer.ggml.tokens'][50303] == '[PAD50303]'
    assert metadata['tokenizer.ggml.token_type'][50256:50258] == [CONTROL, UNUSED]
    assert tokenizer_from_gguf(metadata) == {'kind': 'gpt2'}


@pytest.mark.slow
@pytest.mark.parametrize('name, pre', [('cl100k_base', 'llama-bpe'), ('o200k_base', 'gpt-4o')])
def test_tiktokens_other_encodings_are_the_same_in_llama_cpp(tmp_path, name, pre):
    meta = {'kind': 'tiktoken', 'name': name}
    ours = or_skip(lambda: load_tokenizer(meta))
    metadata = gguf_metadata_of(meta, ours.vocab_size)
    assert metadata['tokenizer.ggml.pre'] == pre
    theirs = in_llama_cpp(tmp_path, metadata)
    assert_same_ids(theirs, ours, [*TEXTS, 'ПриВет МИР ÉCOLE École ǅ ʰ Straße', 'a/b//\n'])
    text = f'a{END}b'
    assert theirs.encode(text) == ours.encode(text)
    assert tokenizer_from_gguf(metadata) == meta


@pytest.mark.parametrize('name', PRE_TOKENIZERS)
def test_what_is_written_is_read_again(name):
    meta = meta_for(name, bos=END, chat_template='{{ messages }}')
    metadata = gguf_metadata_of(meta, 700)
    again = tokenizer_from_gguf(metadata)
    assert again['bos'] == again['eos'] == END
    assert again['chat_template'] == '{{ messages }}'
    assert gguf_metadata_of(again, 700) == metadata
    ours = load_tokenizer(meta)
    theirs = load_tokenizer(again)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)


def test_a_token_that_begins_every_text_is_kept(tmp_path):
    begin = [{'SpecialToken': {'id': END, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
    content = trained_content()
    content['post_processor'] = {
        'type': 'TemplateProcessing', 'single': begin, 'pair': begin,
        'special_tokens': {END: {'id': END, 'ids': [0], 'tokens': [END]}}}
    meta = describe_tokenizer_json(json.dumps(content), bos=END, eos=END)
    metadata = gguf_metadata_of(meta, 700)
    assert metadata['tokenizer.ggml.add_bos_token'] is True
    again = tokenizer_from_gguf(metadata)
    assert gguf_metadata_of(again, 700) == metadata
    theirs = in_llama_cpp(tmp_path, metadata)
    ours = load_tokenizer(again)
    assert theirs.encode_with_beginning('a b') == ours.tokenizer.encode('a b').ids
    assert theirs.encode_with_beginning('a b')[0] == 0
    assert 0 not in ours.encode('a b')


def test_without_merges_there_is_one_that_never_applies(tmp_path):
    content = trained_content(merges=0)
    assert content['model']['merges'] == []
    meta = describe_tokenizer_json(json.dumps(content))
    metadata = gguf_metadata_of(meta, 257)
    assert metadata['tokenizer.ggml.merges'] == [DUMMY_MERGE]
    assert_same_ids(in_llama_cpp(tmp_path, metadata), load_tokenizer(meta))
    assert load_tokenizer(tokenizer_from_gguf(metadata)).encode('ÿÿ') == \
        load_tokenizer(meta).encode('ÿÿ')


def test_added_tokens_keep_their_kind(tmp_path):
    content = trained_content()
    tool = len(content['model']['vocab'])
    message_end = tool + 1
    content['added_tokens'] += [added_token('<tool>', tool, special=False),
                                added_token('<|im_end|>', message_end, special=True)]
    meta = describe_tokenizer_json(json.dumps(content), eos='<|im_end|>')
    metadata = gguf_metadata_of(meta, message_end + 1)
    assert metadata['tokenizer.ggml.token_type'][tool:] == [USER_DEFINED, CONTROL]
    ours = load_tokenizer(meta)
    theirs = in_llama_cpp(tmp_path, metadata)
    again = load_tokenizer(tokenizer_from_gguf(metadata))
    text = f'a<tool> b<|im_end|>{END}'
    for special in (True, False):
        ids = ours.encode(text, special=special)
        assert tool in ids
        assert (message_end in ids) == special
        assert theirs.encode(text, special=special) == ids
        assert again.encode(text, special=special) == ids


def changed(**changes):
    return describe_tokenizer_json(json.dumps(trained_content() | changes))


def changed_model(**changes):
    return changed(model=trained_content()['model'] | changes)


METASPACE = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'always', 'split': True}
TAKES_SPACES = added_token('<mask>', 700, special=True) | {'lstrip': True}


@pytest.mark.parametrize('changes, named', [
    ({'normalizer': {'type': 'Lowercase'}}, 'normalizer'),
    ({'pre_tokenizer': None}, 'pre_tokenizer'),
    ({'pre_tokenizer': PRE_TOKENIZERS['gpt-2'].pre_tokenizer | {'add_prefix_space': True}},
     'pre_tokenizer'),
    ({'decoder': METASPACE}, 'byte-level'),
    ({'added_tokens': []}, 'token that ends a text'),
    ({'added_tokens': [*trained_content()['added_tokens'], TAKES_SPACES]}, "'<mask>'"),
], ids=lambda value: str(value)[:40])
def test_what_llama_cpp_can_not_do_is_refused_by_name(changes, named):
    if changes.get('added_tokens') == []:
        vocab = trained_content()['model']['vocab']
        vocab['<|other|>'] = vocab.pop(END)
        changes = changes | {'model': trained_content()['model'] | {'vocab': vocab}}
    sentence = refusal(changed(**changes))
    assert named in sentence
    assert '--to=hf' in sentence


@pytest.mark.parametrize('option, value', [
    ('unk_token', '!'), ('end_of_word_suffix', '</w>'), ('ignore_merges', True)])
def test_an_option_of_the_merges_is_refused_by_name(option, value):
    assert option in refusal(changed_model(**{option: value}))


def test_a_tokenizer_larger_than_the_model_is_refused():
    size = len(trained_content()['model']['vocab'])
    gguf_metadata_of(changed(), size)
    assert f'{size} tokens, but the model has {size - 1}' in refusal(changed(), size - 1)


def test_two_rows_of_one_text_are_refused():
    content = trained_content()
    size = len(content['model']['vocab'])
    content['added_tokens'].append(added_token(f'[PAD{size + 1}]', size, special=True))
    assert 'several tokens' in refusal(describe_tokenizer_json(json.dumps(content)), size + 2)


# ---- characters ----

CHARS = sorted('\0\n\r\t \\!"\',.;abcdefghijn0x19éß日🙂')


def test_characters_are_characters_in_llama_cpp(tmp_path, capsys):
    ours = CharTokenizer(CHARS)
    metadata = gguf_metadata_of(ours.to_meta(), len(CHARS))
    assert 'takes more and more memory' in capsys.readouterr().err
    theirs = in_llama_cpp(tmp_path, metadata)
    for text in ('a b', '\n\n\\n\\\\\t\r\n', 'é日🙂 ß', '\\x0a;', ''.join(CHARS[1:]) * 2):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert tokenizer_from_gguf(metadata) == ours.to_meta()


def test_no_character_ends_a_text_in_llama_cpp(tmp_path, capsys):
    ours = CharTokenizer('abcdefghijklmnopqrst')
    theirs = in_llama_cpp(tmp_path, gguf_metadata_of(ours.to_meta(), 20))
    assert capsys.readouterr().err == ''
    answer = theirs.complete('ab', 200, seed=1)
    assert set(answer['content']) == set(ours.chars)
    assert len(answer['content']) == 200
    assert answer['stop_type'] == 'limit'


def test_rows_without_a_character_are_unused(capsys):
    metadata = gguf_metadata_of(CharTokenizer('ab').to_meta(), 4)
    assert metadata['tokenizer.ggml.tokens'] == ['a', 'b', '[PAD2]', '[PAD3]']
    assert tokenizer_from_gguf(metadata) == {'kind': 'char', 'chars': ['a', 'b']}
