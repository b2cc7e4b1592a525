"""Trained tokenizers: the merges are those of the package tokenizers, and any text comes back."""
import itertools
import json
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from plaingpt.system.messages import UserError
from plaingpt.text.fast_encoding import utf8_of
from plaingpt.text.tokenizer_export import tiktoken_encoding_of, tiktoken_ranks_of
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer
from plaingpt.text.tokenizer_training import (LONGEST_RUN, _pieces_of, byte_tokenizer,
                                              train_tokenizer)
from plaingpt.text.tokenizers import load_tokenizer

END = '<|endoftext|>'
LANGUAGES = ['The quick brown fox jumps over the lazy dog. ', 'Съешь ещё этих мягких булок. ',
             '敏捷的棕色狐狸跳过了懒狗。', 'いろはにほへと ちりぬるを', 'نص حكيم له سر قاطع ',
             'Größe über alles ', '다람쥐 헌 쳇바퀴에 타고파 ', '🙂🙃 1234 ½ \n\n',
             "we'll I'M o'clock\t\r\n"]
# Characters that Unicode does not have yet (Cn) are split differently by older packages.
ANY_TEXT = st.text(st.characters(exclude_categories=['Cs', 'Cn']), max_size=30)
ODD_TEXT = st.lists(ANY_TEXT | st.sampled_from([*LANGUAGES, END, ' ' * 30, '<|endof', '|>']),
                    max_size=6).map(''.join)


def merges_of_tokenizers(texts, vocab_size):
    """The merges that Hugging Face's trainer finds with GPT-2's words; END counts as a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END],
                                  initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())['model']['merges']


def merges_in(tokenizer):
    return json.loads(tokenizer.json_text)['model']['merges']


def python_sources(number):
    """Some files of the standard library."""
    paths = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    return [path.read_text(encoding='utf-8') for path in paths[:number]]


# ---- the merges ----

@pytest.mark.parametrize('vocab_size', [258, 300, 480])
def test_merges_in_many_languages_are_those_of_the_package_tokenizers(vocab_size):
    texts = [''.join(order) for order in itertools.permutations(LANGUAGES, 2)]
    tokenizer = train_tokenizer(texts, vocab_size)
    merges = merges_of_tokenizers(texts, vocab_size)
    assert merges_in(tokenizer) == merges
    assert tokenizer.vocab_size == vocab_size == 257 + len(merges)


def test_merges_of_code_are_those_of_the_package_tokenizers():
    texts = python_sources(20)
    assert merges_in(train_tokenizer(texts, 2000)) == merges_of_tokenizers(texts, 2000)


@settings(max_examples=100, deadline=None)
@given(st.lists(ODD_TEXT, min_size=1, max_size=5), st.integers(1, 60))
def test_merges_of_any_texts_are_those_of_the_package_tokenizers(texts, merges):
    expected = merges_of_tokenizers(texts, 257 + merges)
    if len(expected) == merges:
        assert merges_in(train_tokenizer(texts, 257 + merges)) == expected
    else:
        # The sentence names the vocabulary for which the texts are enough.
        with pytest.raises(UserError) as error:
            train_tokenizer(texts, 257 + merges)
        assert f'give {len(expected)} merges, where {merges} are' in str(error.value)
        works = 257 + len(expected)
        assume(expected)
        assert f'use bpe:{works} or fewer' in str(error.value)
        assert merges_in(train_tokenizer(texts, works)) == expected


def test_no_merge_spans_two_texts():
    texts = ['x'] * 50 + ['yz'] * 10
    assert merges_in(train_tokenizer(texts, 258)) == [['y', 'z']]
    with pytest.raises(UserError, match='give 1 merges, where 2 are needed'):
        train_tokenizer(texts, 259)


@pytest.mark.parametrize('texts', [[], [''], ['a'], ['a', 'b']])
def test_a_text_without_two_neighbours_gives_no_merges(texts):
    with pytest.raises(UserError, match='too few for 300 tokens.*use byte, or more text'):
        train_tokenizer(texts, 300)


def test_a_run_without_spaces_takes_no_quadratic_time(ends_in_time):
    # These five million characters would take ten minutes in one piece.
    run = ''.join(itertools.islice(itertools.cycle(['GATTACA', 'CCGT', 'TTAAG']), 1_000_000))
    tokenizer = train_tokenizer([f'a word {run} and more words'], 270)
    assert tokenizer.decode(tokenizer.encode(run[:50_000])) == run[:50_000]
    assert len(tokenizer.encode(run[:50_000])) < 10_000


@pytest.mark.parametrize('length', [0, 1, LONGEST_RUN, LONGEST_RUN + 1, 3 * LONGEST_RUN + 5])
def test_a_text_is_cut_in_long_runs_alone(length):
    first_run = 'x' * length
    second_run = 'y' * length
    words = 'some words ' * 2000
    text = f'{words}{first_run} {words}{second_run}'
    pieces = _pieces_of(text)
    assert b''.join(pieces).decode() == text
    cuts = (length - 1) // LONGEST_RUN if length > 0 else 0
    assert len(pieces) == 1 + 2 * cuts


def test_special_tokens_in_the_text_teach_nothing_special():
    tokenizer = train_tokenizer([f'a{END}b' * 9], 260)
    assert len(merges_in(tokenizer)) == 3
    assert tokenizer.encode(END) == [259]
    assert 259 not in tokenizer.encode_corpus([END])[0]


def test_training_prints_nothing(capfd):
    train_tokenizer(LANGUAGES, 300)
    assert capfd.readouterr() == ('', '')
    print('still here')
    assert capfd.readouterr().out == 'still here\n'


@pytest.mark.parametrize('closed', ['1>&-', '2>&-', '1>&- 2>&-', '0>&- 1>&- 2>&-'])
def test_training_works_without_an_output(closed, tmp_path):
    """As in a service that a system starts with closed streams."""
    path = tmp_path / 'size'
    code = (f'from pathlib import Path\n'
            f'from plaingpt.text.tokenizer_training import train_tokenizer\n'
            f'size = train_tokenizer(["the king and the queen"], 258).vocab_size\n'
            f'Path({str(path)!r}).write_text(str(size))\n')
    subprocess.run(f'{shlex.quote(sys.executable)} -c {shlex.quote(code)} {closed}', shell=True,
                   cwd=Path(__file__).parents[2], check=True)
    assert path.read_text() == '258'


def test_the_check_of_the_merges_holds_the_ids_of_one_text(monkeypatch):
    sizes = []
    encode = HuggingFaceTokenizer.encode_corpus

    def counted(self, texts):
        texts = list(texts)
        sizes.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(HuggingFaceTokenizer, 'encode_corpus', counted)
    train_tokenizer(LANGUAGES, 300)
    assert sizes == [1] * len(LANGUAGES)


# ---- ids ----

@pytest.fixture(scope='module', params=['byte', 'bpe:300', 'chat'])
def tokenizer(request):
    if request.param == 'byte':
        return byte_tokenizer()
    if request.param == 'chat':
        return train_tokenizer(LANGUAGES, 320, (END, '<|im_start|>', '<|im_end|>'))
    return train_tokenizer(LANGUAGES, 300)


def test_bytes_come_first_and_special_tokens_last(tokenizer):
    for byte in (0, 10, 32, 65, 127):
        assert tokenizer.encode(chr(byte)) == [byte]
    assert tokenizer.end_of_text == tokenizer.encode(END)[0] >= 256
    vocab = json.loads(tokenizer.json_text)['model']['vocab']
    assert sorted(vocab.values()) == list(range(tokenizer.vocab_size))
    merged = [''.join(pair) for pair in merges_in(tokenizer)]
    assert [vocab[token] for token in merged] == list(range(256, 256 + len(merged)))
    assert tokenizer.end_of_text == 256 + len(merged)


def test_the_fast_way_is_taken(tokenizer):
    assert tokenizer._fast_encoder is not None


@settings(max_examples=150, deadline=None)
@given(text=ODD_TEXT)
def test_any_text_comes_back_and_all_packages_give_its_ids(tokenizer, text):
    meta = tokenizer.to_meta()
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_corpus([text])[0].tolist() == ids
    theirs = Tokenizer.from_str(meta['json'])
    theirs.encode_special_tokens = True
    assert theirs.encode(text).ids == ids
    assert tiktoken_encoding_of(meta).encode_ordinary(text) == ids
    assert max(ids, default=0) < tokenizer.end_of_text


def test_special_tokens_are_tiktokens_too(tokenizer):
    encoding = tiktoken_encoding_of(tokenizer.to_meta())
    text = f'a{END}b'
    assert encoding.encode(text, allowed_special='all') == tokenizer.encode(text)
    assert encoding.n_vocab == tokenizer.vocab_size
    assert encoding.decode(tokenizer.encode(text)) == text


def test_the_file_of_ranks_is_read_by_tiktoken(tokenizer, tmp_path):
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    from plaingpt.text.tokenizer_export import GPT2_PATTERN
    path = tmp_path / 'tokenizer.tiktoken'
    path.write_bytes(tiktoken_ranks_of(tokenizer.to_meta()))
    ranks = load_tiktoken_bpe(str(path))
    assert len(ranks) == tokenizer.end_of_text
    encoding = tiktoken.Encoding('mine', pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={END: len(ranks)})
    text = ''.join(LANGUAGES)
    assert encoding.encode(text) == tokenizer.encode(text)


def test_transformers_loads_the_tokenizer_json(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast
    (tmp_path / 'tokenizer.json').write_text(tokenizer.json_text, encoding='utf-8')
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
    text = ''.join(LANGUAGES)
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


def test_half_a_surrogate_pair_becomes_a_replacement_character(tokenizer):
    ids, = tokenizer.encode_corpus(['a\ud800'])
    assert tokenizer.decode(ids.tolist()) == 'a\N{REPLACEMENT CHARACTER}'
    assert utf8_of('a\ud800') == 'a\N{REPLACEMENT CHARACTER}'.encode()


def test_a_trained_tokenizer_survives_its_dict(tokenizer):
    again = load_tokenizer(json.loads(json.dumps(tokenizer.to_meta())))
    text = ''.join(LANGUAGES)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.end_of_text == tokenizer.end_of_text
    assert again.bos == END
