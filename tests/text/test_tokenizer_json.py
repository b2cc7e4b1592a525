"""Tokenizers from a tokenizer.json: round trips, refusals, and telling GPT-2's own."""
import json
import sys

import pytest
from conftest import or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (AddedToken, ByteLevelBPETokenizer, Tokenizer, decoders, models,
                        pre_tokenizers, processors, trainers)

from plaingpt.system.messages import UserError
from plaingpt.text.tiktoken_encodings import GPT2_IDS, GPT2_MERGES, fetch_file
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer, describe_tokenizer_json
from plaingpt.text.tokenizer_layout import (BYTE_LEVEL, byte_characters, byte_level_content,
                                            sentencepiece_content)
from plaingpt.text.tokenizers import GPT2Tokenizer, load_tokenizer

TEXT = 'naïve 日本 🙂\r\n\tdef f(x): return x  # 123'
CORPUS = ['the king and queen of all our sleeping hearts', 'naïve Größe', TEXT] * 9
END = '<|endoftext|>'


@pytest.fixture(scope='module')
def own_json():
    """The tokenizer.json of a small byte-level BPE, trained here."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(CORPUS, vocab_size=300, special_tokens=[END], show_progress=False)
    return bpe.to_str()


@pytest.fixture(scope='module')
def own(own_json):
    return load_tokenizer(describe_tokenizer_json(own_json))


def refusal(call, *arguments):
    """The one line of the UserError that the call must raise."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


# ---- text to ids and back ----

@pytest.mark.parametrize('text', ['', 'a', '\n', ' the', TEXT, '\ufeffa', 'a\ufffdb'])
def test_text_comes_back(own, text):
    ids = own.encode(text)
    assert own.decode(ids) == text
    assert all(0 <= i < own.vocab_size for i in ids)


def test_the_ids_are_those_of_the_package(own, own_json):
    assert own.encode(TEXT) == Tokenizer.from_str(own_json).encode(TEXT).ids
    assert len(own.encode('the king')) < len('the king'), 'nothing was merged'


def test_half_a_surrogate_pair_becomes_a_replacement_character(own):
    assert own.decode(own.encode('a\udcffb')) == 'a\N{REPLACEMENT CHARACTER}b'


def test_special_tokens_are_tokens_only_where_they_are_special(own):
    text = f'a{END}b'
    special = own.encode(text)
    plain = own.encode(text, special=False)
    assert own.end_of_text == 0
    assert special == [*own.encode('a'), 0, *own.encode('b')]
    assert 0 not in plain
    assert own.decode(special) == own.decode(plain) == text


def test_no_text_is_cut_padded_or_begun_with_a_token(own_json, own):
    changed = json.loads(own_json)
    changed['truncation'] = {'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst',
                             'stride': 0}
    changed['padding'] = {'strategy': {'Fixed': 100}, 'direction': 'Right', 'pad_id': 0,
                          'pad_to_multiple_of': None, 'pad_type_id': 0, 'pad_token': END}
    begin = [{'SpecialToken': {'id': END, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
    changed['post_processor'] = {
        'type': 'TemplateProcessing', 'single': begin, 'pair': begin,
        'special_tokens': {END: {'id': END, 'ids': [0], 'tokens': [END]}}}
    tokenizer = HuggingFaceTokenizer(json.dumps(changed))
    assert tokenizer.encode(TEXT) == own.encode(TEXT)


def test_every_id_is_below_vocab_size_even_if_some_are_unused():
    tokenizer = HuggingFaceTokenizer(json.dumps(MINIMAL | {
        'model': {'type': 'BPE', 'vocab': {'a': 0, 'b': 7}, 'merges': []}}))
    assert tokenizer.vocab_size == 8
    assert tokenizer.end_of_text is None


# ---- text that must not become a special token ----

def unigram():
    letters = [(char, -5.0) for char in 'ab</s>?']
    model = models.Unigram([('<unk>', 0.0), ('<s>', 0.0), ('</s>', 0.0), *letters], 0, False)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def word_level():
    tokenizer = Tokenizer(models.WordLevel({'[UNK]': 0, '<s>': 1, '</s>': 2, 'a': 3, 'b': 4},
                                           unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def sentencepiece_bpe():
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), '▁']
    tokens += [*'ab</s>', '</', 's>']
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [('<', '/'), ('s', '>'), ('</', 's>')]
    return Tokenizer.from_str(json.dumps(
        sentencepiece_content(vocab, merges, [], '<unk>', adds_space=True)))


def byte_level_bpe(**options):
    vocab = {char: i for i, char in enumerate(byte_characters())}
    for token in ('</', 's>', '</s>', '<s>'):
        vocab[token] = len(vocab)
    merges = [('<', '/'), ('s', '>'), ('</', 's>')]
    return Tokenizer.from_str(json.dumps(
        byte_level_content(vocab, merges, [], BYTE_LEVEL, **options)))


def byte_level_bpe_of_whole_words():
    return byte_level_bpe(ignore_merges=True)


@pytest.mark.parametrize('eos_is', ['not added', 'special', 'not special'])
@pytest.mark.parametrize('make', [unigram, word_level, sentencepiece_bpe, byte_level_bpe,
                                  byte_level_bpe_of_whole_words])
def test_no_text_becomes_the_end_of_text(make, eos_is):
    tokenizer = make()
    if eos_is == 'special':
        tokenizer.add_special_tokens([AddedToken('</s>', normalized=False)])
    if eos_is == 'not special':
        tokenizer.add_tokens([AddedToken('</s>', normalized=False)])
    tokenizer = HuggingFaceTokenizer(tokenizer.to_str(), bos='<s>', eos='</s>')
    special = {tokenizer.end_of_text, tokenizer.tokenizer.token_to_id('<s>')}
    for text in ('</s>', 'a</s>b', 'a </s> b', '<s> a', '</</s>s>'):
        encoded, = tokenizer.encode_corpus([text])
        assert encoded.tolist() == tokenizer.encode(text, special=False)
        assert not special & set(encoded.tolist()), text
    if make is not word_level:  # which has no token for the parts
        assert tokenizer.decode(tokenizer.encode('a</s>b', special=False)).count('</s>') == 1
    for text in ('a b', 'a', 'aab? b'):
        assert tokenizer.encode(text, special=False) == tokenizer.encode(text)


def test_tokens_beside_a_special_one_keep_their_ids():
    """The package numbers added tokens by their order, whatever the file says."""
    tokenizer = sentencepiece_bpe()
    tokenizer.add_special_tokens(['<first>'])
    tokenizer.add_tokens([AddedToken('<tool>', normalized=False)])
    tokenizer = HuggingFaceTokenizer(tokenizer.to_str())
    tool = tokenizer.tokenizer.token_to_id('<tool>')
    assert tokenizer.encode('a<tool>')[-1] == tool
    assert tokenizer.encode('a<tool>', special=False)[-1] == tool


def test_a_text_may_be_unknown_but_not_where_that_ends_a_text():
    tokenizer = word_level()
    tokenizer.add_special_tokens(['[UNK]'])
    text = tokenizer.to_str()
    assert HuggingFaceTokenizer(text).encode('a x [UNK]', special=False) == [3, 0, 0]
    ends = HuggingFaceTokenizer(text, eos='[UNK]')
    assert 'change the text' in refusal(ends.encode, 'a x', False)


def test_a_special_token_of_one_character_is_refused_in_a_text():
    """Without its token, the model would drop the character."""
    tokenizer = HuggingFaceTokenizer(json.dumps(MINIMAL), eos='b')
    assert tokenizer.encode('ab') == [2]
    sentence = refusal(tokenizer.encode_corpus, ['aa', 'ba'])
    assert "the special token 'b'" in sentence


def test_the_tokens_around_a_text_are_no_part_of_it():
    tokenizer = word_level()
    tokenizer.post_processor = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
    tokenizer = HuggingFaceTokenizer(tokenizer.to_str(), bos='<s>')
    assert tokenizer.encode('a </s>', special=False, framed=True) == [1, 3, 0]


def test_no_merge_is_left_out_at_random(own_json):
    content = json.loads(own_json)
    content['model']['dropout'] = 0.5
    text = json.dumps(content)
    expected = HuggingFaceTokenizer(own_json).encode(TEXT)
    tokenizer = HuggingFaceTokenizer(text)
    for _ in range(5):
        assert tokenizer.encode(TEXT) == expected
        assert tokenizer.encode(TEXT, special=False) == expected
    assert describe_tokenizer_json(text) == describe_tokenizer_json(own_json)


# ---- streaming ----

def streamed(tokenizer, ids):
    decoder = tokenizer.decoder()
    return [decoder([i]) for i in ids]


def test_the_decoder_holds_back_half_a_character(own):
    ids = own.encode('a🙃b')  # this emoji is not in the corpus: one token a byte
    assert len(ids) > 3
    pieces = streamed(own, ids)
    assert '' in pieces
    assert [piece for piece in pieces if piece] == ['a', '🙃', 'b']


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=['Cs']), max_size=40), st.integers(1, 5))
def test_streamed_text_is_the_text(own, text, size):
    text += '.'  # a replacement character at the end would rightly be held back
    ids = own.encode(text)
    decoder = own.decoder()
    pieces = [decoder(ids[start:start + size]) for start in range(0, len(ids), size)]
    assert ''.join(pieces) == text


def test_bytes_that_are_no_text_are_not_held_back_forever(own, own_json):
    half = json.loads(own_json)['model']['vocab']['ł']  # the byte-level form of a lone byte
    assert own.decode([half]) == '\N{REPLACEMENT CHARACTER}'
    pieces = streamed(own, [half] * 9)
    assert ''.join(pieces) == '\N{REPLACEMENT CHARACTER}' * 6  # 3 might still be one character
    assert len(pieces[-1]) == 1


def test_decoders_are_independent(own):
    ids = own.encode('🙃')
    own.decoder()(ids[:1])
    assert own.decoder()(ids) == '🙃'


def test_the_spaces_between_words_are_streamed():
    # In this format the first space of a text is dropped, so a word depends on the ones before.
    tokenizer = Tokenizer(models.BPE(unk_token='?'))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=['?'], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    words = HuggingFaceTokenizer(tokenizer.to_str())
    text = 'the king and queen'
    ids = words.encode(text)
    assert words.decode(ids) == text
    assert ''.join(streamed(words, ids)) == text


# ---- what can't be used ----

MINIMAL = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [],
           'normalizer': None, 'pre_tokenizer': None, 'post_processor': None, 'decoder': None,
           'model': {'type': 'BPE', 'vocab': {'a': 0, 'b': 1, 'ab': 2}, 'merges': ['a b']}}


def changed_model(**changes):
    return json.dumps(MINIMAL | {'model': MINIMAL['model'] | changes})


DAMAGED = {
    'empty': '',
    'cut': '{"version": "1.0"',
    'null': 'null',
    'a list': '[]',
    'no keys': '{}',
    'deep': '[' * 100_000,
    'deep and complete': '[' * 500 + ']' * 500,
    'a long number': '{"version": ' + '9' * 5000 + '}',
    'not a number': '{"version": NaN}',
    'half a surrogate pair': '"\\ud800"',
    'half a surrogate pair, raw': '"\ud800"',
    'no model': json.dumps(MINIMAL | {'model': None}),
    'unknown model': changed_model(type='GPT'),
    'merge of unknown tokens': changed_model(merges=['x y']),
    'merge of one token': changed_model(merges=['ab']),
    'merge without a result': changed_model(merges=['b a']),
    'negative id': changed_model(vocab={'a': -1}, merges=[]),
    'large id': changed_model(vocab={'a': 2**32}, merges=[]),
    'ids far beyond the tokens': changed_model(vocab={'a': 2**32 - 1}, merges=[]),
    'an added id far beyond the tokens': changed_model(vocab={'a': 0, 'b': 10**6}, merges=[]),
    'empty vocabulary': changed_model(vocab={}, merges=[]),
    'a panic in the merges': changed_model(continuing_subword_prefix='xxxxx'),
    'a panic in the normalizer': json.dumps(MINIMAL | {
        'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}}),
    'a broken regular expression': json.dumps(MINIMAL | {
        'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': '('}, 'behavior': 'Isolated',
                          'invert': False}}),
}


@pytest.mark.parametrize('name', DAMAGED)
def test_a_damaged_tokenizer_json_is_one_sentence(name):
    assert 'save or download it again' in refusal(describe_tokenizer_json, DAMAGED[name])
    # In a checkpoint, the text may be damaged after it was accepted.
    stored = {'kind': 'tokenizer.json', 'json': DAMAGED[name]}
    assert 'save or download it again' in refusal(load_tokenizer, stored)


def test_a_text_that_the_vocabulary_cannot_express_is_one_sentence():
    model = {'type': 'WordLevel', 'unk_token': '?', 'vocab': {'a': 0}}
    tokenizer = HuggingFaceTokenizer(json.dumps(MINIMAL | {'model': model}))
    assert tokenizer.encode('a') == [0]
    assert 'cannot encode this text' in refusal(tokenizer.encode, 'b')


def test_ctrl_c_is_not_disguised(own_json, monkeypatch):
    class Interrupted:
        @staticmethod
        def from_str(text):
            raise KeyboardInterrupt

    monkeypatch.setattr('tokenizers.Tokenizer', Interrupted)
    with pytest.raises(KeyboardInterrupt):
        HuggingFaceTokenizer(own_json)


def test_a_missing_package_is_one_sentence_with_the_command(own_json, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    assert 'pip install tokenizers' in refusal(describe_tokenizer_json, own_json)


# ---- beginning and end of a text, chat template ----

def test_the_end_of_text_is_the_token_that_is_named(own_json):
    meta = describe_tokenizer_json(own_json, bos='a', eos='b', chat_template='{{ messages }}')
    assert meta['bos'] == 'a'
    assert meta['eos'] == 'b'
    assert meta['chat_template'] == '{{ messages }}'
    tokenizer = load_tokenizer(json.loads(json.dumps(meta)))  # as in meta.json
    assert tokenizer.end_of_text == tokenizer.encode('b')[0]
    assert tokenizer.to_meta() == meta
    assert load_tokenizer(describe_tokenizer_json(own_json)).end_of_text == 0


@pytest.mark.parametrize('key', ['bos', 'eos'])
@pytest.mark.parametrize('token', ['<|nowhere|>', '', 'half \ud800', 'long ' * 999])
def test_a_token_that_is_missing_is_one_sentence(own_json, key, token):
    sentence = refusal(lambda: describe_tokenizer_json(own_json, **{key: token}))
    assert f'{key} token' in sentence
    assert len(sentence) < 400


def test_gpt2s_tokenizer_with_more_to_say_keeps_its_file(gpt2_json):
    text = json.dumps(gpt2_json)
    assert describe_tokenizer_json(text, bos=END, eos=END) == {'kind': 'gpt2'}
    assert describe_tokenizer_json(text, eos=END) == {'kind': 'gpt2'}
    assert describe_tokenizer_json(text, eos='!')['eos'] == '!'
    assert describe_tokenizer_json(text, chat_template='x')['chat_template'] == 'x'


# ---- as dicts ----

def test_a_tokenizer_survives_its_dict(own, own_json):
    meta = describe_tokenizer_json(own_json)
    assert meta['kind'] == 'tokenizer.json'
    assert own.to_meta() == meta
    assert load_tokenizer(meta).encode(TEXT) == own.encode(TEXT)


def test_files_that_differ_in_white_space_are_one_tokenizer(own_json):
    content = json.loads(own_json)
    indented = json.dumps(content, indent=4)
    readable = json.dumps(content, ensure_ascii=False)
    expected = describe_tokenizer_json(own_json)
    assert describe_tokenizer_json(indented) == expected
    assert describe_tokenizer_json(readable) == expected


@pytest.fixture(scope='module')
def gpt2_json(tmp_path_factory):
    """The content of a tokenizer.json that is made from GPT-2's published files."""
    folder = str(tmp_path_factory.mktemp('gpt2'))

    def fetch_both():
        return fetch_file(GPT2_IDS, folder), fetch_file(GPT2_MERGES, folder)

    bpe = ByteLevelBPETokenizer(*or_skip(fetch_both))
    bpe.add_special_tokens([END])
    return json.loads(bpe.to_str())


def with_merges_as(form, content):
    pairs = content['model']['merges']
    merges = [' '.join(pair) for pair in pairs] if form is str else [list(pair) for pair in pairs]
    return content | {'model': content['model'] | {'merges': merges}}


@pytest.mark.parametrize('form', [str, list])
def test_gpt2s_own_tokenizer_is_recognised(gpt2_json, form):
    text = json.dumps(with_merges_as(form, gpt2_json), indent=2)
    assert describe_tokenizer_json(text) == {'kind': 'gpt2'}


def test_gpt2s_tokenizer_reads_as_tiktokens(gpt2_json):
    ours = or_skip(GPT2Tokenizer)
    theirs = HuggingFaceTokenizer(json.dumps(gpt2_json))
    assert theirs.vocab_size == ours.vocab_size
    assert theirs.end_of_text == ours.end_of_text
    for text in (TEXT, f'a{END}b'):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.encode(text, special=False) == ours.encode(text, special=False)


def test_a_change_of_gpt2s_tokenizer_makes_it_another(gpt2_json):
    def kind(**changes):
        return describe_tokenizer_json(json.dumps(gpt2_json | changes))['kind']

    assert kind() == 'gpt2'
    padding = {'id': 50257, 'content': '<pad>', 'single_word': False, 'lstrip': False,
               'rstrip': False, 'normalized': False, 'special': True}
    assert kind(added_tokens=[*gpt2_json['added_tokens'], padding]) == 'tokenizer.json'
    assert kind(normalizer={'type': 'Lowercase'}) == 'tokenizer.json'
    before = gpt2_json['pre_tokenizer']
    assert kind(pre_tokenizer=before | {'add_prefix_space': True}) == 'tokenizer.json'
    assert kind(pre_tokenizer=before | {'use_regex': False}) == 'tokenizer.json'
    model = gpt2_json['model']
    fewer = model | {'merges': model['merges'][:-1]}
    assert kind(model=fewer) == 'tokenizer.json'
    # Two tokens that change places: the same tokens and ids, but another vocabulary.
    vocab = dict(model['vocab'])
    vocab['!'], vocab['"'] = vocab['"'], vocab['!']
    assert kind(model=model | {'vocab': vocab}) == 'tokenizer.json'
