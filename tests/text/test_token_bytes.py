"""The bytes that each token stands for add up to those of the text."""
import json

import pytest
from conftest import or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models

from plaingpt.text.token_bytes import token_bytes
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer
from plaingpt.text.tokenizer_layout import (SPACE, added_token, char_content,
                                            sentencepiece_content)
from plaingpt.text.tokenizers import CharTokenizer, GPT2Tokenizer

TEXT = 'the king  and queen\n naïve 日本 🙂'
END = '<|endoftext|>'
ANY_TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=40)


def size(text):
    return len(text.encode('utf-8'))


def length_of(tokenizer, text):
    """What the tokens of a text add up to."""
    return token_bytes(tokenizer)[tokenizer.encode(text)].sum()


@pytest.fixture(scope='module')
def byte_level():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT] * 9, vocab_size=300, special_tokens=[END], show_progress=False)
    content = json.loads(bpe.to_str())
    content['added_tokens'].append(added_token('<tool>', 300, special=False))
    return HuggingFaceTokenizer(json.dumps(content))


def sentencepiece(adds_space):
    """A tokenizer in the form of Llama 2's, with few words."""
    tokens = ['<unk>', '<s>', '</s>']
    tokens += [f'<0x{byte:02X}>' for byte in range(256)]
    tokens += [SPACE, 't', 'h', 'e', 'th', 'the', f'{SPACE}the', 'ï']
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [('t', 'h'), ('th', 'e'), (SPACE, 'the')]
    specials = [added_token(token, vocab[token], special=True) for token in ('<s>', '</s>')]
    content = sentencepiece_content(vocab, merges, specials, '<unk>', adds_space)
    return HuggingFaceTokenizer(json.dumps(content), '<s>', '</s>')


def test_each_character_counts_with_its_bytes():
    assert token_bytes(CharTokenizer('aï日🙂')).tolist() == [1, 2, 3, 4]


def test_gpt2_tokens_add_up_and_the_end_of_text_is_nothing():
    tokenizer = or_skip(GPT2Tokenizer)
    counts = token_bytes(tokenizer)
    assert len(counts) == 50257
    assert counts[tokenizer.end_of_text] == 0
    assert (counts > 0).sum() == 50256
    assert counts[tokenizer.encode(TEXT)].sum() == size(TEXT)


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT)
def test_byte_level_tokens_add_up(byte_level, text):
    assert length_of(byte_level, text) == size(text)


def test_added_tokens_count_unless_they_are_special(byte_level):
    assert length_of(byte_level, f'a<tool>b{END}') == size('a<tool>b')


def test_sentencepiece_tokens_add_up():
    tokenizer = sentencepiece(adds_space=False)
    assert len(tokenizer.encode('the the')) == 2
    for text in 'the the', ' the  e\n', TEXT:
        assert length_of(tokenizer, text) == size(text)
    assert length_of(tokenizer, '<s>the</s>') == 3


def test_the_space_that_a_tokenizer_adds_counts():
    assert length_of(sentencepiece(adds_space=True), 'the') == size(' the')


def test_tokens_that_are_plain_text_add_up():
    tokenizer = HuggingFaceTokenizer(json.dumps(char_content(sorted(set(TEXT)))))
    assert length_of(tokenizer, TEXT) == size(TEXT)


def test_the_token_that_ends_a_text_counts_nothing_even_if_the_file_calls_it_plain():
    content = char_content(['a', 'b'])
    content['model']['vocab'][END] = 2
    tokenizer = HuggingFaceTokenizer(json.dumps(content), eos=END)
    assert token_bytes(tokenizer).tolist() == [1, 1, 0]


def test_the_tokens_of_chats_count_nothing_even_if_the_file_calls_them_plain():
    content = char_content(['a', 'b'])
    content['added_tokens'] = [added_token('<|im_end|>', 2, special=False),
                               added_token('<tool>', 3, special=False)]
    assert token_bytes(HuggingFaceTokenizer(json.dumps(content))).tolist() == [1, 1, 0, 6]


def test_tokens_that_do_not_tell_have_no_lengths():
    bert = Tokenizer(models.WordPiece({'[UNK]': 0, 'a': 1, '##b': 2}, unk_token='[UNK]'))
    assert token_bytes(HuggingFaceTokenizer(bert.to_str())) is None
    bert.decoder = decoders.WordPiece()
    assert token_bytes(HuggingFaceTokenizer(bert.to_str())) is None
