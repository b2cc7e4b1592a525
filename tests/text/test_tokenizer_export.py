"""A tokenizer.json for every tokenizer: transformers must give our ids to every text."""
import json

import pytest
from conftest import or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from plaingpt.system.messages import UserError
from plaingpt.text.tokenizer_export import (tiktoken_encoding_of, tiktoken_ranks_of,
                                            tokenizer_config_of, tokenizer_json_of)
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer, describe_tokenizer_json
from plaingpt.text.tokenizer_layout import added_token
from plaingpt.text.tokenizer_training import byte_tokenizer
from plaingpt.text.tokenizers import CharTokenizer, GPT2Tokenizer, load_tokenizer

END = '<|endoftext|>'
CHARS = sorted('\0\n\r\t !\'",.abcdefghijéß日🙂\u0301\u00a0\u200b')
CHAR_META = {'kind': 'char', 'chars': CHARS}


def in_transformers(folder, meta):
    """The tokenizer that transformers loads from a folder with both files."""
    from transformers import AutoTokenizer
    (folder / 'tokenizer.json').write_text(tokenizer_json_of(meta), encoding='utf-8')
    config = json.dumps(tokenizer_config_of(meta))
    (folder / 'tokenizer_config.json').write_text(config, encoding='utf-8')
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope='module')
def char_pair(tmp_path_factory):
    """A tokenizer of characters, ours and in transformers."""
    return load_tokenizer(CHAR_META), in_transformers(tmp_path_factory.mktemp('char'), CHAR_META)


@pytest.fixture(scope='module')
def gpt2_pair(tmp_path_factory):
    """GPT-2's tokenizer, ours and in transformers."""
    ours = or_skip(GPT2Tokenizer)
    return ours, in_transformers(tmp_path_factory.mktemp('gpt2'), {'kind': 'gpt2'})


# ---- characters ----

@settings(max_examples=200, deadline=None)
@given(st.text(CHARS, max_size=40))
def test_characters_are_the_same_in_transformers(char_pair, text):
    ours, theirs = char_pair
    ids = ours.encode(text)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == text
    assert theirs.decode(ids, skip_special_tokens=True) == text


def test_transformers_adds_no_token_to_the_characters(char_pair):
    ours, theirs = char_pair
    assert len(theirs) == ours.vocab_size
    assert theirs.bos_token is theirs.eos_token is theirs.unk_token is None
    with pytest.raises(Exception, match='UNK'):
        theirs('Q')


def test_characters_come_back_as_characters(char_pair, tmp_path):
    text = tokenizer_json_of(CHAR_META)
    assert describe_tokenizer_json(text) == CHAR_META
    assert describe_tokenizer_json(json.dumps(json.loads(text), indent=1)) == CHAR_META
    char_pair[1].save_pretrained(tmp_path)
    saved = (tmp_path / 'tokenizer.json').read_text(encoding='utf-8')
    assert describe_tokenizer_json(saved) == CHAR_META


def test_a_change_of_the_characters_makes_it_another_tokenizer():
    content = json.loads(tokenizer_json_of({'kind': 'char', 'chars': ['a', 'b']}))

    def kind(**changes):
        return describe_tokenizer_json(json.dumps(content | changes))['kind']

    assert kind() == 'char'
    assert kind(decoder=None) == 'tokenizer.json'
    assert kind(normalizer={'type': 'Lowercase'}) == 'tokenizer.json'
    for vocab in ({'a': 0, 'b': 2}, {'a': 0, 'bc': 1}, {'a': 0, '': 1}):
        assert kind(model=content['model'] | {'vocab': vocab}) == 'tokenizer.json'
    with_template = describe_tokenizer_json(json.dumps(content), chat_template='{{ messages }}')
    assert with_template['chat_template'] == '{{ messages }}'


def test_a_character_without_utf8_is_one_sentence():
    with pytest.raises(UserError, match='half a surrogate pair'):
        tokenizer_json_of(CharTokenizer('a\ud800').to_meta())


# ---- GPT-2 ----

@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_gpt2_is_the_same_in_transformers(gpt2_pair, text):
    ours, theirs = gpt2_pair
    text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    ids = ours.encode(text, special=False)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == text


def test_gpt2s_end_of_text_is_special_in_transformers(gpt2_pair):
    ours, theirs = gpt2_pair
    text = f'a{END}b . c'
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.bos_token_id == theirs.eos_token_id == ours.end_of_text
    assert len(theirs) == ours.vocab_size


def test_gpt2_comes_back_as_gpt2():
    or_skip(GPT2Tokenizer)
    assert describe_tokenizer_json(tokenizer_json_of({'kind': 'gpt2'})) == {'kind': 'gpt2'}


# ---- tiktoken's other encodings ----

@pytest.mark.parametrize('name', [
    'cl100k_base', pytest.param('o200k_base', marks=pytest.mark.slow)])
def test_an_encoding_is_the_same_in_transformers(tmp_path, name):
    meta = {'kind': 'tiktoken', 'name': name}
    ours = or_skip(lambda: load_tokenizer(meta))
    theirs = in_transformers(tmp_path, meta)
    for text in ('naïve 日本 🙂\r\n\n  DON\'T 12345  ', f'a{END}b', f'{END}<|endofprompt|>'):
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == text
    assert theirs.bos_token_id == theirs.eos_token_id == ours.end_of_text


# ---- tiktoken ----

def test_what_tiktoken_can_not_express_is_refused():
    for meta in (CHAR_META, own_meta()):
        assert tiktoken_ranks_of(meta) is None
        with pytest.raises(UserError, match="tiktoken can't express this tokenizer"):
            tiktoken_encoding_of(meta)


def changed_bytes(**changes):
    """The tokenizer dict of bytes whose tokenizer.json has some other entries."""
    content = json.loads(byte_tokenizer().json_text) | changes
    return {'kind': 'tokenizer.json', 'json': json.dumps(content)}


def test_a_tokenizer_that_splits_or_merges_otherwise_is_not_written_for_tiktoken():
    assert tiktoken_ranks_of(changed_bytes()) is not None
    model = json.loads(byte_tokenizer().json_text)['model']
    vocab = model['vocab'] | {END: 258, 'ab': 256, 'abc': 257, 'bc': 259}
    for changes in (
            {'normalizer': {'type': 'NFC'}},
            {'pre_tokenizer': None},
            {'added_tokens': [added_token('<tool>', 256, special=False)]},
            # tiktoken would also merge a and bc, of which Hugging Face's form knows nothing.
            {'model': model | {'vocab': vocab, 'merges': [['a', 'b'], ['ab', 'c']]}}):
        assert tiktoken_ranks_of(changed_bytes(**changes)) is None, changes


def test_the_ids_of_special_tokens_are_those_of_the_package_tokenizers():
    """It numbers added tokens itself, whatever the file says."""
    content = json.loads(byte_tokenizer().json_text)
    del content['model']['vocab'][END]
    content['added_tokens'][0]['id'] = 5000
    meta = {'kind': 'tokenizer.json', 'json': json.dumps(content)}
    ids = load_tokenizer(meta).encode(f'a{END}')
    assert ids == [97, 256]
    assert tiktoken_encoding_of(meta).encode(f'a{END}', allowed_special='all') == ids


def test_tiktokens_own_encodings_are_written_as_published(tmp_path):
    meta = {'kind': 'gpt2'}
    ours = or_skip(lambda: load_tokenizer(meta))
    (tmp_path / 'ranks').write_bytes(tiktoken_ranks_of(meta))
    from tiktoken.load import load_tiktoken_bpe
    ranks = load_tiktoken_bpe(str(tmp_path / 'ranks'))
    assert len(ranks) == 50256
    assert ranks[b' the'] == ours.encode(' the')[0]
    assert tiktoken_encoding_of(meta) is ours.bpe


# ---- tokenizer.json ----

def own_meta(**options):
    model = {'type': 'WordLevel', 'vocab': {'?': 0, 'a': 1, '</s>': 2, '<s>': 3},
             'unk_token': '?'}
    content = {'version': '1.0', 'added_tokens': [], 'normalizer': None,
               'pre_tokenizer': {'type': 'Whitespace'}, 'post_processor': None, 'decoder': None,
               'model': model}
    return describe_tokenizer_json(json.dumps(content), **options)


def test_a_tokenizer_json_is_kept_as_it_is(tmp_path):
    meta = own_meta(bos='<s>', eos='a', chat_template='{{ bos_token }}{{ messages[0].content }}')
    assert tokenizer_json_of(meta) == meta['json']
    theirs = in_transformers(tmp_path, meta)
    assert theirs.bos_token_id == 3
    assert theirs.eos_token_id == 1
    assert theirs.unk_token_id == 0
    text = theirs.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False)
    assert text == '<s>hi'


def test_the_end_of_text_is_named_even_if_only_its_name_says_so():
    config = tokenizer_config_of(own_meta())
    assert config['eos_token'] == '</s>'
    assert 'bos_token' not in config
    assert 'chat_template' not in config


def test_the_exported_text_is_read_by_the_package_alone():
    text = tokenizer_json_of(CHAR_META)
    assert Tokenizer.from_str(text).encode('a\n').ids == HuggingFaceTokenizer(text).encode('a\n')
