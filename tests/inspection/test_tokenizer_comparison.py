"""Comparing tokenizers: the sample, what is measured on it, and the tables."""
import json
import os

import pytest

from plaingpt.corpus.documents import Reading
from plaingpt.corpus.file_search import find
from plaingpt.corpus.readers import Source
from plaingpt.corpus.splitting import Splitting
from plaingpt.corpus.tokenization import Work
from plaingpt.inspection import tokenizer_measurements
from plaingpt.inspection.comparison_sample import Text, halves_of, line_of, read_sample, script_of
from plaingpt.inspection.tokenizer_comparison import (CHINESE, ENGLISH, WIDTH, _labels, compare,
                                                      lines_of, table_lines)
from plaingpt.inspection.tokenizer_measurements import Job, measure
from plaingpt.inspection.visible_tokens import columns_of, joined_lines, visible_tokens
from plaingpt.system.messages import UserError
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer
from plaingpt.text.tokenizer_layout import BYTE_LEVEL, byte_level_content
from plaingpt.text.tokenizers import CharTokenizer

PYTHON = 'def add(number, other):\n    """The sum of two numbers."""\n    return number + other\n'
CHINESE_LINES = '敏捷的棕色狐狸跳过了懒狗。\n今天天气很好，我们去公园散步吧。\n'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with 30 files in Python and 10 in Chinese, each with a letter of its own."""
    folder = tmp_path_factory.mktemp('corpus')
    for number in range(30):
        letter = chr(0x400 + number)  # Cyrillic
        text = f'# {letter}\n' + f'{PYTHON}value{number} = add({number}, 1)\n' * 20
        (folder / f'module{number}.py').write_text(text, encoding='utf-8')
    for number in range(10):
        text = f'{number}\n' + CHINESE_LINES * 20
        (folder / f'text{number}.txt').write_text(text, encoding='utf-8')
    return folder


def source_and_work(files, **reading):
    found = find(str(files), '')
    how = Reading(**reading)
    return Source(found, how), Work(how, Splitting(0.1, 'document'))


def text_of(text, extension='.txt', script='Latin'):
    return Text(text, len(text.encode()), hash(text), extension, script)


def byte_tokenizer(merges=()):
    """A byte-level tokenizer with a token for each byte and for each merge."""
    from tokenizers.pre_tokenizers import ByteLevel
    tokens = sorted(ByteLevel.alphabet()) + [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    return HuggingFaceTokenizer(json.dumps(byte_level_content(vocab, merges, [], BYTE_LEVEL)))


def lower_case_tokenizer():
    """One that changes text: all in lower case, and words it doesn't know become one token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    vocab = {'<unk>': 0, 'the': 1, 'fox': 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return HuggingFaceTokenizer(tokenizer.to_str())


# ---- a whole comparison ----

@pytest.fixture(scope='module')
def comparison(folder):
    source, work = source_and_work(folder)
    return compare(['bpe:400', 'char', 'byte'], source, work, 1, 10**6)


def test_all_are_measured_on_the_half_that_none_was_trained_on(folder, comparison):
    bpe, char, byte = comparison['tokenizers']
    assert [result['name'] for result in comparison['tokenizers']] == ['bpe:400', 'char', 'byte']
    assert [result['is_trained'] for result in comparison['tokenizers']] == [True, True, False]
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert comparison['corpus_bytes'] == size
    assert comparison['trained_on'] + comparison['measured_on'] == size
    assert 0.3 < comparison['trained_on'] / size <= 0.5
    assert bpe['bytes'] == byte['bytes'] == byte['tokens'] == comparison['measured_on']
    assert bpe['bytes'] > 3 * bpe['tokens'] and 300 < bpe['vocab_size'] <= 400
    assert 0 < byte['used'] < 128 + 64
    assert all(result['tokens_per_second'] > 0 for result in (bpe, byte))


def test_a_vocabulary_that_lacks_characters_is_told(comparison):
    """Each Python file has a letter that no other has, so char knows those of one half alone."""
    char = comparison['tokenizers'][1]
    assert 10 <= char['left_out'] <= 25
    assert char['bytes'] < comparison['measured_on']
    assert char['tokens_per_second'] is None
    text = ' '.join(lines_of(comparison))
    assert f'char cannot express {char["left_out"]} of the texts' in text
    assert 'is not in this vocabulary of' in text


def test_it_is_counted_by_extension_and_by_script(comparison):
    kinds = comparison['kinds']
    assert list(kinds['extension']) == ['.py', '.txt'] and list(kinds['script']) == ['Latin', 'Han']
    assert sum(kinds['extension'].values()) == comparison['measured_on']
    byte = comparison['tokenizers'][2]
    for attribute, sizes in kinds.items():
        for kind, size in sizes.items():
            assert byte['of_kind'][attribute][kind] == {'bytes': size, 'tokens': size}


def test_the_lines_tell_what_was_measured(comparison):
    lines = lines_of(comparison)
    too_wide = [line for line in lines if columns_of(line) > WIDTH]
    assert all('捷敏散棕步' in line for line in too_wide)  # the vocabulary of char, one long word
    rows = {line.split()[0]: line.split() for line in lines if '%' in line and ',' in line}
    byte = comparison['tokenizers'][2]
    assert rows['byte'][2:4] == [f'{byte["tokens"]:,}', '1.00']
    assert set(rows) == {'bpe:400*', 'char*', 'byte'}
    assert '    ' + '|'.join(ENGLISH) in lines
    assert any(line.startswith('    <E6>|<95>|<8F>|<E6>') for line in lines)
    assert json.loads(json.dumps(comparison)) == comparison


def test_the_same_sample_gives_the_same_figures(folder, comparison):
    source, work = source_and_work(folder)
    again = compare(['bpe:400', 'char', 'byte'], source, work, 2, 10**6)
    for result, before in zip(again['tokenizers'], comparison['tokenizers'], strict=True):
        result['tokens_per_second'] = before['tokens_per_second']
    assert again == comparison


def test_an_unknown_tokenizer_is_refused_before_anything_is_read(folder):
    source, work = source_and_work(folder)
    source.chunks = None
    with pytest.raises(UserError, match='^compare: tokenizer=.gpt9. is no'):
        compare(['byte', 'gpt9'], source, work, 1, 10**6)


# ---- the sample ----

def test_one_large_text_is_cut_into_parts_for_both_halves(tmp_path):
    lines = [f'line {number} of the text\n' for number in range(3000)]
    (tmp_path / 'one.txt').write_text(''.join(lines))
    source, work = source_and_work(tmp_path / 'one.txt')
    texts = read_sample(source, work, 1, 10**6)
    assert sorted(''.join(text.text for text in texts)) == sorted(''.join(lines))
    assert all(text.text.endswith('\n') for text in texts) and len(texts) >= 16
    training, measured = halves_of(texts)
    sizes = [sum(text.bytes for text in half) for half in (training, measured)]
    assert min(sizes) > 0.4 * sum(sizes)
    assert not {text.text for text in training} & {text.text for text in measured}

    few = read_sample(source, work, 1, 10_000)
    assert 5_000 < sum(text.bytes for text in few) <= 10_000


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / 'one.txt').write_text('x')
    source, work = source_and_work(tmp_path / 'one.txt')
    with pytest.raises(UserError, match='too little text to compare'):
        halves_of(read_sample(source, work, 1, 10**6))


def test_a_folder_without_text_is_refused_with_the_reason(tmp_path):
    for number in range(2):
        (tmp_path / f'{number}.bin').write_bytes(b'\0\1')
    (tmp_path / 'latin.txt').write_bytes('Übung'.encode('latin-1'))
    source, work = source_and_work(tmp_path, skips_binaries=True)
    with pytest.raises(UserError) as error:
        read_sample(source, work, 1, 10**6)
    sentence = str(error.value)
    assert f'2 documents were left out (binary), such as {tmp_path / "0.bin"}' in sentence
    assert f'1 document was left out (not UTF-8), such as {tmp_path / "latin.txt"}: ' in sentence


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / 'empty.txt').write_text('')
    source, work = source_and_work(tmp_path / 'empty.txt')
    with pytest.raises(UserError, match='there is no text to compare tokenizers on: name other'):
        read_sample(source, work, 1, 10**6)


@pytest.mark.parametrize('text, script', [
    (ENGLISH, 'Latin'), (CHINESE, 'Han'), ('すばしこい茶色の狐', 'kana and Han'),
    ('नमस्ते', 'Devanagari'), ('빠른 갈색 여우', 'Hangul'), ('Быстрая the', 'Cyrillic'),
    (ENGLISH + 'すばし', 'Latin'), ('123 !?', 'no letters'), ('', 'no letters'),
])
def test_scripts(text, script):
    assert script_of(text) == script


def test_the_line_that_is_shown_is_neither_short_nor_long_and_has_words():
    texts = [text_of('short\n' + 'x' * 99 + '\n' + '-' * 50 + '\nwith a\ttab in the middle of it'),
             text_of('\n# A comment with some words in it.\n')]
    assert line_of(texts) == '# A comment with some words in it.'
    assert line_of(texts[:1]) is None


# ---- figures ----

def test_a_tokenizer_that_changes_text_is_told():
    texts = [text_of('the fox'), text_of('The Fox'), text_of('the  dog')]
    metas = {'lower': lower_case_tokenizer().to_meta(), 'byte': byte_tokenizer().to_meta()}
    lower, byte = measure(metas, Job(texts, texts, ['The fox']))
    assert (lower['changed'], lower['checked'], lower['tokens']) == (2, 3, 6)
    assert lower['examples'] == [{'tokens': ['the', 'fox']}]
    assert (byte['changed'], byte['tokens'], byte['used']) == (0, 22, 11)


def test_each_text_is_encoded_once_and_kinds_are_summed():
    texts = []
    for length in range(1, 12):
        text = ''.rjust(length, 'x')
        is_odd = length % 2
        texts.append(text_of(text, extension=f'.{is_odd}'))
    metas = {'char': CharTokenizer('xyz').to_meta(), 'other': CharTokenizer('z').to_meta()}
    char, other = measure(metas, Job(texts, [], []))
    assert char['tokens'] == char['bytes'] == sum(range(1, 12))
    assert char['of_kind']['extension'] == {'.0': {'bytes': 30, 'tokens': 30},
                                            '.1': {'bytes': 36, 'tokens': 36}}
    assert (char['used'], char['left_out'], char['reason']) == (1, 0, None)
    assert (other['left_out'], other['tokens'], other['tokens_per_second']) == (11, 0, None)
    assert other['reason'].startswith("the character 'x' (U+0078) is not in this vocabulary of 1 ")


def no_tokens():
    """A tokenizer that knows no letter, and no token for others: it makes no tokens of text."""
    from tokenizers import Tokenizer, models
    return HuggingFaceTokenizer(Tokenizer(models.BPE({'☃': 0}, [])).to_str())


def test_a_tokenizer_that_makes_no_tokens_has_no_speed():
    texts = [text_of(CHINESE)] * 10
    result, = measure({'none': no_tokens().to_meta()}, Job(texts, texts, [CHINESE]))
    assert (result['tokens'], result['changed']) == (0, 10)
    result['is_trained'] = False
    lines = lines_of({'corpus_bytes': 1, 'measured_on': 1, 'trained_on': 1,
                      'kinds': {'script': {'Han': 1, 'Latin': 1}}, 'examples': [CHINESE],
                      'tokenizers': [result]})
    row = next(line.split() for line in lines if line.startswith('none'))
    assert row == ['none', '1', '0', '-', '-', '-', '0.0%', '0.05', 'M']  # 64 rows of 768


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='only Linux has it')
def test_measuring_confines_the_process_to_one_core_only_meanwhile(monkeypatch):
    cores = os.sched_getaffinity(0)
    meanwhile = []
    load = tokenizer_measurements.load_tokenizer

    def load_and_note(meta):
        meanwhile.append(len(os.sched_getaffinity(0)))
        return load(meta)

    monkeypatch.setattr(tokenizer_measurements, 'load_tokenizer', load_and_note)
    measure({'char': CharTokenizer('ab').to_meta()}, Job([text_of('ab')], [], []))
    assert meanwhile == [1]
    assert os.sched_getaffinity(0) == cores


def test_labels_are_distinct():
    end = '/models/a_long_name/tokenizer.json'
    names = ['gpt2', f'first{end}', f'second{end}', 'x' * 30]
    results = [{'name': name, 'is_trained': name == 'gpt2'} for name in names]
    assert _labels(results) == ['gpt2*', f'first{end}', f'second{end}', 'x' * 30]
    assert _labels(results[:2] + results[3:]) == ['gpt2*', '...g_name/tokenizer.json',
                                                  '...' + 'x' * 21]


# ---- tokens and tables as text ----

def test_bytes_that_are_no_whole_character_are_shown_in_hex():
    merges = [('æ', 'ķ'), ('æķ', 'ı'), ('t', 'h'), ('Ġ', 'th'), ('Ċ', 'Ċ')]
    tokenizer = byte_tokenizer(merges)
    assert visible_tokens(tokenizer, 'th th敏æ\n\n\t') == [
        'th', ' th', '敏', '<C3>', '<A6>', '\\n\\n', '\\t']
    assert visible_tokens(tokenizer, '\u6555') == ['<E6><95>', '<95>']
    assert visible_tokens(tokenizer, 'x\ud83d') == ['x', '<EF>', '<BF>', '<BD>']
    assert visible_tokens(CharTokenizer('敏x'), 'x敏') == ['x', '敏']
    with pytest.raises(UserError, match='is not in this vocabulary'):
        visible_tokens(CharTokenizer('x'), '敏')


def test_tokens_are_wrapped_between_two():
    pieces = ['敏捷的', ' quick', 'x' * 15, ' ', 'fox'] * 5
    lines = joined_lines(pieces, 20)
    assert ''.join(lines) == '|'.join(pieces)
    assert max(map(columns_of, lines)) <= 20 < columns_of(lines[0] + lines[1])
    assert joined_lines(['x' * 30, 'y'], 20) == ['x' * 30 + '|', 'y']
    assert joined_lines([], 20) == ['']
    assert columns_of('敏e\u0301') == 3


def test_a_table_that_is_too_wide_goes_on_below():
    rows = [['bytes/token in', *(f'tokenizer{column:03}' for column in range(9))],
            ['.py', *(f'{column}.00' for column in range(9))]]
    lines = table_lines(rows)
    assert lines[0].startswith('bytes/token in  tokenizer000  tokenizer001')
    assert max(map(len, lines)) <= WIDTH
    assert lines[2] == '' and lines[3].split()[0] == 'bytes/token'
    figures = [word for word in ' '.join(lines).split() if word.endswith('.00')]
    assert figures == [f'{column}.00' for column in range(9)]
