"""Text files that are read in pieces."""
import numpy as np
import pytest
from conftest import or_skip
from hypothesis import given, settings
from hypothesis import strategies as st

from plaingpt.corpus import large_files
from plaingpt.corpus.documents import Reading
from plaingpt.corpus.file_search import find
from plaingpt.corpus.readers import Source
from plaingpt.corpus.splitting import Splitting, hash_of
from plaingpt.system.messages import UserError
from plaingpt.text.tiktoken_encodings import TiktokenTokenizer
from plaingpt.text.tokenizer_training import train_tokenizer


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(large_files, 'PIECE_BYTES', 64)
    monkeypatch.setattr(large_files, 'SEARCH_BYTES', 32)


def pieces_of(path, **options):
    reading = Reading(**options)
    documents = []
    for chunk in Source(find(str(path)), reading).chunks():
        documents += chunk.documents(reading)[0]
    return documents


TEXTS = st.text(st.sampled_from('ab €狐\n \U0001F98A\r'), min_size=65, max_size=600)


@settings(max_examples=50)
@given(text=TEXTS, mark=st.booleans())
def test_the_pieces_are_the_document(tmp_path_factory, text, mark):
    path = tmp_path_factory.mktemp('large') / 'a.txt'
    path.write_bytes(text.encode('utf-8-sig' if mark else 'utf-8'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_files, 'PIECE_BYTES', 64)
        patch.setattr(large_files, 'SEARCH_BYTES', 32)
        documents = pieces_of(path)
    assert ''.join(document.text for document in documents) == text
    if len(documents) == 1:
        return
    first_char = 0
    for document in documents:
        assert document.extent.first_char == first_char
        assert document.extent.all_chars == len(text)
        assert document.extent.key == hash_of(text)
        assert len(document.text.encode()) <= 67
        first_char += len(document.text)
        assert document.extent.is_last == (document is documents[-1])


LINES = {
    'code': ['    return x', 'def f(x):', 'the end.', '', '  ', "it's", 'über', '9 lives'],
    'Cyrillic': ['Все счастливые семьи', 'похожи друг на друга,', '— каждая', '', 'Ёлка 12'],
    'Chinese': ['学而时习之，', '不亦说乎？', '「有朋」', '', '三十而立。', '2 人行'],
}


@pytest.mark.parametrize('line_break', ['\n', '\r\n'])
@pytest.mark.parametrize('script', LINES)
@pytest.mark.parametrize('encoding', ['gpt2', 'cl100k_base',
                                      pytest.param('o200k_base', marks=pytest.mark.slow)])
def test_a_piece_ends_where_tokenizers_cut(tmp_path, monkeypatch, encoding, script, line_break):
    monkeypatch.setattr(large_files, 'PIECE_BYTES', 512)
    monkeypatch.setattr(large_files, 'SEARCH_BYTES', 400)
    tokenizer = or_skip(lambda: TiktokenTokenizer(encoding))
    random = np.random.default_rng(0)
    text = line_break.join(random.choice(LINES[script], 1500))
    (tmp_path / 'a.txt').write_bytes(text.encode())
    documents = pieces_of(tmp_path / 'a.txt')
    assert len(documents) > 8
    ids = []
    for document in documents:
        ids += tokenizer.encode(document.text)
    assert ids == tokenizer.encode(text)


def test_a_piece_ends_where_an_own_vocabulary_cuts_too(tmp_path, monkeypatch):
    pytest.importorskip('gigatoken')
    monkeypatch.setattr(large_files, 'PIECE_BYTES', 256)
    monkeypatch.setattr(large_files, 'SEARCH_BYTES', 192)
    random = np.random.default_rng(0)
    text = '\r\n'.join(random.choice(LINES['code'] + LINES['Cyrillic'], 500))
    tokenizer = train_tokenizer([text], 340)
    assert len(tokenizer.encode('\r\n')) == 1  # but before a word, it is two tokens
    (tmp_path / 'a.txt').write_bytes(text.encode())
    ids = []
    for document in pieces_of(tmp_path / 'a.txt'):
        ids += tokenizer.encode(document.text)
    assert ids == tokenizer.encode(text)


@pytest.mark.parametrize('text, cut', [
    ('one two\nthree four', 'one two\n'),
    ('one two\r\nthree four', 'one two\r\nthree'),
    ('一二。\r\n三四', '一二。\r\n'),
    ('а б\nв г', 'а б\n'),
    ('one\u2003\nthree', 'one\u2003\nthre'),  # an em space is no end of a word
    ('one\u3000\r\n三四', 'one\u3000\r\n三'),
    ('one\n_two', 'one\n_tw'),
    ('one\n\u0301two', 'one\n\u0301tw'),      # an accent alone is no letter
    ('one\n 1 2', 'one\n 1 '),
])
def test_a_good_place_to_cut(text, cut):
    content = text.encode()
    assert content[:large_files._good_end(content)].decode() == cut


def test_a_large_file_can_be_left_out(tmp_path, small_pieces):
    path = tmp_path / 'a.txt'
    path.write_text('line\n' * 100)
    assert pieces_of(path, max_chars=499) == []
    assert len(pieces_of(path, max_chars=500)) > 1
    assert pieces_of(path, skips_binaries=True, max_line=3) == []
    path.write_bytes(b'line\n' * 100 + b'\xff')
    assert pieces_of(path, skips_binaries=True) == []
    with pytest.raises(UserError, match='not valid UTF-8 at byte 500 '):
        pieces_of(path)
    path.write_bytes(b'line\n' * 100 + '€'.encode()[:2])
    with pytest.raises(UserError, match='ends within a character, at byte 500'):
        pieces_of(path)


@pytest.mark.parametrize('by', ['document', 'tail'])
@pytest.mark.parametrize('test_size', [0.1, 0.5, 1 / 3])
def test_a_large_file_is_split_as_a_small_one(tmp_path, monkeypatch, by, test_size):
    path = tmp_path / 'a.txt'
    path.write_text('\n'.join(f'line {i}' for i in range(100)))
    splitting = Splitting(test_size, by)

    def split():
        texts = {'train': '', 'val': ''}
        ends = []
        for document in pieces_of(path):
            for part in splitting.parts(document):
                texts[part.split] += part.text
                if part.is_end:
                    ends.append(part.split)
        return texts, ends

    whole = split()
    monkeypatch.setattr(large_files, 'PIECE_BYTES', 64)
    assert split() == whole
    if by == 'tail':
        text = path.read_text()
        cut = int(len(text) * (1 - test_size))
        assert whole == ({'train': text[:cut], 'val': text[cut:]}, ['train', 'val'])
