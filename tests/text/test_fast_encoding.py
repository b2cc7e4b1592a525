"""gigatoken encodes a corpus only where it gives the ids of the package tokenizers."""
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import sent
from tokenizers import (AddedToken, ByteLevelBPETokenizer, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors)

from plaingpt.system.messages import UserError
from plaingpt.text import fast_encoding
from plaingpt.text.fast_encoding import PROBE, FastEncoder
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer
from plaingpt.text.tokenizer_layout import sentencepiece_content
from plaingpt.text.tokenizer_training import byte_tokenizer

END = '<|endoftext|>'
ANY_TEXT = st.text(st.characters(exclude_categories=['Cs', 'Cn']), max_size=30)


def small_bpe(special_tokens=(END,)):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([PROBE] * 3, vocab_size=400, special_tokens=list(special_tokens),
                            show_progress=False)
    return bpe


def with_special_tokens_first():
    return small_bpe()


def with_a_normalizer():
    bpe = small_bpe()
    bpe._tokenizer.normalizer = normalizers.NFKC()
    return bpe


def with_a_token_that_is_text():
    bpe = small_bpe()
    bpe.add_tokens([AddedToken('<tool>', normalized=False), '    '])
    return bpe


def with_a_beginning():
    bpe = small_bpe(['<s>', END])
    begin = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 0)])
    bpe._tokenizer.post_processor = begin
    return bpe


def with_other_words():
    bpe = small_bpe()
    bpe._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(' x', 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return bpe


def with_a_space_before():
    bpe = small_bpe()
    bpe._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return bpe


def words():
    vocab = {'?': 0, 'the': 1, 'king': 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='?'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def sentencepiece():
    tokens = ['<unk>', '<s>', *[f'<0x{byte:02X}>' for byte in range(256)], '▁', 't', 'h', 'th']
    vocab = {token: i for i, token in enumerate(tokens)}
    content = sentencepiece_content(vocab, [('t', 'h')], [], '<unk>', adds_space=True)
    return Tokenizer.from_str(json.dumps(content))


KINDS = [with_special_tokens_first, with_a_normalizer, with_a_token_that_is_text, with_a_beginning,
         with_other_words, with_a_space_before, words, sentencepiece]


@pytest.fixture(scope='module', params=KINDS, ids=lambda make: make.__name__)
def tokenizer(request):
    made = request.param()
    return HuggingFaceTokenizer(getattr(made, '_tokenizer', made).to_str())


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(ANY_TEXT | st.sampled_from([PROBE, END, '<tool>      ', '', 'a<s> x'])))
def test_a_corpus_has_the_ids_of_its_texts(tokenizer, texts):
    encoded = tokenizer.encode_corpus(texts)
    assert len(encoded) == len(texts)
    for ids, text in zip(encoded, texts, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text, special=False)


def test_byte_level_tokenizers_take_the_fast_way(tokenizer, request):
    kind = request.node.callspec.id
    if kind in ('with_special_tokens_first', 'with_a_beginning'):
        assert tokenizer._fast_encoder is not None
    if kind in ('words', 'sentencepiece'):
        assert tokenizer._fast_encoder is None


def test_where_the_ids_differ_the_slow_way_is_taken(monkeypatch):
    import gigatoken
    encode = gigatoken.Tokenizer.encode
    monkeypatch.setattr(gigatoken.Tokenizer, 'encode', lambda self, text: encode(self, text)[1:])
    tokenizer = byte_tokenizer()
    assert tokenizer._fast_encoder is None
    assert tokenizer.encode_corpus(['abc'])[0].tolist() == [97, 98, 99]


def test_what_gigatoken_refuses_goes_the_slow_way(monkeypatch):
    import gigatoken

    class PanicException(BaseException):
        pass

    for error in (RuntimeError('unknown'), PanicException('panic')):
        def fail(data, error=error):
            raise error

        monkeypatch.setattr(gigatoken.Tokenizer, 'from_json', fail)
        assert byte_tokenizer().encode_corpus(['a'])[0].tolist() == [97]


def test_a_key_press_is_no_refusal(monkeypatch):
    import gigatoken

    def interrupt(data):
        raise KeyboardInterrupt

    monkeypatch.setattr(gigatoken.Tokenizer, 'from_json', interrupt)
    with pytest.raises(KeyboardInterrupt):
        byte_tokenizer().encode_corpus(['a'])


def test_a_text_that_can_not_be_encoded_is_one_sentence():
    vocab = Tokenizer(models.WordLevel({'a': 0}, unk_token='?'))
    tokenizer = HuggingFaceTokenizer(vocab.to_str())
    with pytest.raises(UserError, match='cannot encode this text'):
        tokenizer.encode_corpus(['a', 'b'])


def test_a_tokenizer_travels_to_another_process(tokenizer):
    tokenizer.encode_corpus(['a'])
    again = sent(tokenizer)
    assert again.to_meta() == tokenizer.to_meta()
    assert again.encode_corpus(['the th'])[0].tolist() == tokenizer.encode('the th')
    assert isinstance(again, HuggingFaceTokenizer)


def test_words_that_gigatoken_keeps_are_forgotten_once_in_a_while(monkeypatch):
    monkeypatch.setattr(fast_encoding, 'RENEWAL_BYTES', 10)
    loaded = []

    class Bytes:
        def encode(self, content):
            return np.frombuffer(content, np.uint8).astype(np.uint32)

    def load():
        loaded.append(Bytes())
        return loaded[-1]

    encoder = FastEncoder(load)
    texts = ['abcdef', 'ghij', 'mnopqr', 'longer than the limit', 'st']
    encoded = encoder.encode(texts)  # also within one call
    assert [bytes(ids.tolist()).decode() for ids in encoded] == texts
    assert len(loaded) == 4
