"""Reading the files of a corpus: every kind, compressed or not, from any place on, or damaged."""
import csv
import gzip
import json
import os
import pickle

import pyarrow
import pyarrow.parquet
import pytest
from pools import sent

from plaingpt.corpus import compressed_files, json_stream, large_files, readers, record_files
from plaingpt.corpus.chunks import START
from plaingpt.corpus.documents import Reading, Skipped
from plaingpt.corpus.file_search import find
from plaingpt.corpus.readers import Source
from plaingpt.system.messages import UserError

TEXTS = ['one', 'two\nlines', 'Grüße, "€" 狐狸', 'a <|endoftext|> within', '\u2028 and \x85', '']


def read(files, include='', **options):
    """The texts of files, their origins, and what was skipped."""
    found = find(str(files), include)
    reading = Reading(skips_binaries=found.walked, **options)
    return documents_of(Source(found, reading))


def documents_of(source, first=START):
    texts, origins, skipped = [], [], Skipped()
    for chunk in source.chunks(first):
        documents, left_out = chunk.documents(source.reading)
        texts += [document.text for document in documents]
        origins += [document.origin for document in documents]
        skipped.merge(left_out)
    return texts, origins, skipped


# ---- each kind of file; each function writes TEXTS and returns the path ----

def as_text(folder):
    for number, text in enumerate(TEXTS):
        (folder / f'{number}.txt').write_bytes(text.encode())
    return folder / '*.txt'


def as_json_lines(folder):
    lines = [json.dumps({'n': 1, 'text': text}, ensure_ascii=False) for text in TEXTS]
    (folder / 'a.jsonl').write_text('\n\n'.join(lines) + '\n', encoding='utf-8')
    return folder / 'a.jsonl'


def as_json(folder):
    records = [{'n': 1.5, 'text': text or None} for text in TEXTS]
    (folder / 'a.json').write_text(json.dumps(records), encoding='utf-8')
    return folder / 'a.json'


def as_objects(folder):
    records = [json.dumps({'text': text}, indent=1) for text in TEXTS]
    (folder / 'a.json').write_text('\n'.join(records), encoding='utf-8-sig')
    return folder / 'a.json'


def as_csv(folder):
    with open(folder / 'a.csv', 'w', encoding='utf-8-sig', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['n', 'text'])
        writer.writerows([[number, text] for number, text in enumerate(TEXTS)])
    return folder / 'a.csv'


def as_parquet(folder):
    table = pyarrow.table({'n': [1] * len(TEXTS), 'text': TEXTS})
    pyarrow.parquet.write_table(table, folder / 'a.parquet', row_group_size=4)
    return folder / 'a.parquet'


KINDS = [as_text, as_json_lines, as_json, as_objects, as_csv, as_parquet]


@pytest.mark.parametrize('write', KINDS)
@pytest.mark.parametrize('compression', [None, 'gz', 'zst'])
def test_every_kind_of_file_gives_its_documents(tmp_path, write, compression):
    pattern = write(tmp_path)
    if compression:
        for name in os.listdir(tmp_path):
            content = (tmp_path / name).read_bytes()
            with pyarrow.output_stream(str(tmp_path / f'{name}.{compression}'),
                                       compression={'gz': 'gzip'}.get(compression, 'zstd')) as file:
                file.write(content)
        pattern = f'{pattern}.{compression}'
    texts, origins, skipped = read(pattern)
    assert texts == TEXTS
    assert len(set(origins)) == len(TEXTS)
    assert skipped.counts == {}
    texts, _, skipped = read(pattern, min_chars=1, max_chars=20)
    assert texts == [text for text in TEXTS if 1 <= len(text) <= 20]
    assert skipped.counts == {'empty': 1, 'longer than max_chars=20': 1}


@pytest.mark.parametrize('write', KINDS)
def test_reading_continues_at_each_place(tmp_path, write, monkeypatch):
    monkeypatch.setattr(readers, 'CHUNK_BYTES', 8)
    monkeypatch.setattr(record_files, 'CHUNK_BYTES', 8)
    source = Source(find(str(write(tmp_path))), Reading())
    whole, _, _ = documents_of(source)
    assert whole == TEXTS
    read_so_far = []
    ends = []
    for chunk in source.chunks():
        documents, _ = chunk.documents(source.reading)
        read_so_far += [document.text for document in documents]
        rest, _, _ = documents_of(source, chunk.next_place)
        assert read_so_far + rest == TEXTS
        ends.append(chunk.bytes_read)
    assert ends == sorted(ends) and ends[-1] == source.size
    if write not in (as_csv, as_parquet):
        assert len(ends) > 2  # there was more than one chunk


def test_the_origin_of_a_record_is_its_line(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n\n{"text": "b"}')
    path = f'{tmp_path}/a.jsonl'
    assert read(path)[1] == [f'record 1 of {path}', f'record 3 of {path}']


# ---- a folder, where not all is text ----

def test_what_is_no_text_in_a_folder_is_counted(tmp_path):
    (tmp_path / 'a.py').write_text('code')
    (tmp_path / 'picture.png').write_bytes(b'\x89PNG\0\0')
    (tmp_path / 'latin.py').write_bytes('naïve'.encode('latin-1'))
    (tmp_path / 'minified.js').write_text('x' * 101 + '\ny')
    texts, _, skipped = read(tmp_path, max_line=100)
    assert texts == ['code']
    assert skipped.counts == {'not UTF-8': 1, 'a line over max_line=100 characters': 1}
    assert skipped.examples['not UTF-8'] == f'{tmp_path}/latin.py'


def compress(path, content, method):
    with pyarrow.output_stream(str(path), compression=method) as file:
        file.write(content)


@pytest.mark.parametrize('piece_bytes', [2**22, 1000])
def test_a_damaged_compressed_file_in_a_folder_is_counted(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(large_files, 'PIECE_BYTES', piece_bytes)
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'fake.gz').write_bytes(b'\x1f\x8b\x08 no more')
    (tmp_path / 'fake.zst').write_bytes(b'no such thing')
    for name, method in (('cut.txt.gz', 'gzip'), ('cut.txt.zst', 'zstd')):
        compress(tmp_path / name, os.urandom(5000).hex().encode(), method)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    compress(tmp_path / 'film.gz', b'\0' * 5000, 'gzip')
    (tmp_path / 'z.txt').write_text('the end')
    found = find(str(tmp_path))
    source = Source(found, Reading(skips_binaries=True))
    texts, _, skipped = documents_of(source)
    assert texts == ['text', 'the end']
    assert skipped.counts == {'damaged': 4, 'binary': 1}
    for chunk in source.chunks():
        assert documents_of(source, chunk.next_place)[0] in (texts[1:], [])
    assert list(source.chunks())[-1].bytes_read == source.size


def test_binary_files_of_a_folder_do_not_count_in_its_size(tmp_path):
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'film').write_bytes(b'\0' * 10_000)
    source = Source(find(str(tmp_path)), Reading(skips_binaries=True))
    assert source.size == 4
    assert documents_of(source)[0] == ['text']


# ---- what is refused ----

@pytest.mark.parametrize('name, content, sentence', [
    ('a.txt', 'naïve'.encode('latin-1'), r'a.txt is not valid UTF-8 at byte 2 \(0xEF\)'),
    ('a.txt', 'wide'.encode('utf-16'), 'at byte 0 .*UTF-16'),
    ('a.txt', b'\xef\xbb\xbfab\xff', 'at byte 5 '),
    ('a.jsonl', b'{"text": "a"}\n{"text": "\xe9"}', 'at byte 24 '),
    ('a.jsonl', b'{"text": "a"}\n{"text":', 'record 2 of .*a.jsonl is not valid JSON'),
    ('a.jsonl', b'[' * 100_000, 'record 1 of .* is not valid JSON'),
    ('a.jsonl', b'{"text": "a"}\n["a"]', 'record 2 of .*a.jsonl is a list, not an object'),
    ('a.jsonl', b'{"text": 5}', "'text' of record 1 of .* holds a number, not text"),
    ('a.jsonl', b'{"body": "a", "n": 1}', "has no field 'text': choose among its fields, body, n"),
    ('a.json', b'[{"text": "a"}, {"text": ]', 'a.json is not valid JSON'),
    ('a.json', b'[{"text": "a"}, 7]', 'record 2 of .* is a number'),
    ('a.json', b'[{"text": "\xe9"}]', 'a.json is not valid UTF-8 at byte 11'),
    ('a.csv', b'n,text\n1,a\n2\n', 'record 2 of .*a.csv has 1 fields, .* names 2: correct line 3'),
    ('a.csv', b'n,text\n1,"a"b\n', 'a.csv is not valid CSV at line 2'),
    ('a.csv', b'n,text\n1,\xe9\n', 'a.csv is not valid UTF-8 at byte 9'),
    ('a.csv', b'n,body\n1,a\n', "record 1 of .*a.csv has no field 'text'"),
    ('a.csv', b'text,n,text\na,1,b\n', "a.csv has 2 fields 'text': give them different names"),
    ('a.csv', b'text\n\n1,2\n', 'record 1 of .*a.csv has 2 fields, .*: correct line 3'),
    ('a.csv', b'text\n"' + b'x' * 2000, r'has a field of more than 1,000 characters, at line \d'),
    ('a.txt', '€'.encode()[:2], 'a.txt ends within a character, at byte 0'),
    ('a.jsonl', '{"text": "€'.encode()[:-1], 'a.jsonl ends within a character, at byte 10'),
    ('a.json', '[{"text": "€'.encode()[:-1], 'a.json ends within a character, at byte 11'),
    ('a.csv', 'text\n€'.encode()[:-1], 'a.csv ends within a character, at byte 5'),
    ('a.json', b'[' * 5000, 'record 1 of .*a.json cannot be read .*recursion'),
    ('a.json', b'[{"text": "a"}, {"text": "b"', 'record 2 of .*a.json is not valid JSON'),
    ('a.json', b'[{"text": "a"} {"text": "b"}]', 'a.json is not valid JSON after record 1'),
    ('a.json', b'[{"text": "a"}', 'not valid JSON after record 1 .* may have been cut short'),
    ('a.json', b'[{"text": "a"},]', 'record 2 of .*a.json is not valid JSON'),
    ('a.json', b'[{"text": "a"}] [{"text": "b"}]', 'a.json goes on after an array with 1 records'),
    ('a.json', b'{"text": "a"}, {"text": "b"}', 'record 2 of .*a.json is not valid JSON'),
    ('a.json', b'{"n": 1, "data": [{"text": "a"}]}', "object whose field 'data' holds the records"),
    ('a.json', b'{"text": "' + b'x' * 2000, 'record 1 of .*a.json is longer than'),
    ('a.txt', b'%PDF-1.7\n\xe2\xe3', 'a.txt is a PDF document, not text: convert it'),
    ('a.docx', b'PK\x03\x04\x14\0\xff', 'a.docx is a zip archive, as .docx and .xlsx are'),
    ('a.txt.xz', b'\xfd7zXZ\0\xff', 'a.txt.xz is compressed with xz, not text: unpack it'),
    ('a.jsonl', b'\x1f\x8b\x08\0\xff', 'a.jsonl is compressed with gzip.* name that ends in .gz'),
    ('a.csv', b'\x28\xb5\x2f\xfd\0', 'a.csv is compressed with zstd.* name that ends in .zst'),
    ('a.json', b'\x89PNG\r\n\0', 'a.json is a PNG image'),
    ('a', b'text \0 \xff', 'a is a binary file, not text'),
    ('a\nb.txt', b'\xff', r'a\\nb.txt is not valid UTF-8'),
    ('a\nb.jsonl', b'{"n": 1}', r"record 1 of .*a\\nb.jsonl has no field"),
    ('a.parquet', b'PAR1 and no more', 'a.parquet is not a readable Parquet file'),
    ('a.txt.gz', b'\x1f\x8b\x08 no more', 'a.txt.gz cannot be read'),
    ('a.txt.zst', b'no such thing', 'a.txt.zst cannot be read'),
])
def test_damaged_files_are_refused_by_name(tmp_path, monkeypatch, name, content, sentence):
    monkeypatch.setattr(record_files, 'MAX_FIELD_CHARS', 1000)
    monkeypatch.setattr(json_stream, 'MAX_RECORD_CHARS', 1000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        read(tmp_path / name)
    assert '\n' not in str(error.value)


def test_a_compressed_file_that_was_cut_short_is_refused(tmp_path):
    for name, method in (('a.txt.gz', 'gzip'), ('b.txt.zst', 'zstd')):
        path = tmp_path / name
        with pyarrow.output_stream(str(path), compression=method) as file:
            file.write(os.urandom(100_000).hex().encode())
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match=f'{name} cannot be read'):
            read(path)


def test_a_parquet_file_without_the_field_is_refused(tmp_path):
    path = as_parquet(tmp_path)
    with pytest.raises(UserError, match="a.parquet has no field 'body'.* n, text"):
        read(path, text_column='body')
    with pytest.raises(UserError, match="'n' of record 1 of .*a.parquet holds a number"):
        read(path, text_column='n')


def test_an_endless_line_of_json_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, 'CHUNK_BYTES', 8)
    monkeypatch.setattr(record_files, 'MAX_LINE_BYTES', 40)
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n' + 'x' * 100)
    with pytest.raises(UserError, match='record 2 of .* is longer than'):
        read(tmp_path / 'a.jsonl')


# ---- JSON ----

@pytest.mark.parametrize('blocks', [1, 3, 8, 2**20])
def test_json_may_be_cut_anywhere_between_its_blocks(tmp_path, monkeypatch, blocks):
    monkeypatch.setattr(record_files, 'CHUNK_BYTES', blocks)
    records = [{'text': text, 'n': [-1.5e300, 12345, True, None, {'a': []}]} for text in TEXTS]
    records[1]['text'] = '\U0001F98A'  # which is written as two escapes
    expected = [record['text'] for record in records]
    for content in (json.dumps(records), json.dumps(records, indent=2) + '\n\n',
                    '\n'.join(map(json.dumps, records)), ''.join(map(json.dumps, records))):
        (tmp_path / 'a.json').write_text(content)
        assert read(tmp_path / 'a.json')[0] == expected
    for content in ('', ' \n', '[]', '[ ]\n'):
        (tmp_path / 'a.json').write_text(content)
        assert read(tmp_path / 'a.json')[0] == []


def test_numbers_are_the_same_in_json_and_in_json_lines(tmp_path):
    content = '{"n": 123456789012345678901234567890, "x": NaN, "y": 1.50, "z": 1e3}'
    (tmp_path / 'a.json').write_text(f'[{content}]')
    (tmp_path / 'a.jsonl').write_text(content)
    expected = ['123456789012345678901234567890 nan 1.5 1000.0']
    for name in ('a.json', 'a.jsonl'):
        assert read(tmp_path / name, template='{n} {x} {y} {z}')[0] == expected


def test_a_deeply_nested_record_reaches_a_worker(tmp_path):
    (tmp_path / 'a.json').write_text('[{"text": "a", "tree": ' + '[' * 700 + ']' * 700 + '}]')
    chunk, = Source(find(f'{tmp_path}/a.json'), Reading()).chunks()
    documents, _ = sent(chunk).documents(Reading())
    assert documents[0].text == 'a'


def test_an_object_with_a_list_of_objects_may_be_a_record(tmp_path):
    (tmp_path / 'a.json').write_text('{"text": "a", "sources": [{"name": "b"}]}')
    assert read(tmp_path / 'a.json')[0] == ['a']


# ---- CSV ----

def test_tabs_stand_between_the_fields_of_tsv_alone(tmp_path):
    (tmp_path / 'a.tsv.csv').write_text('n,text\n1,a\tb\n')
    (tmp_path / 'a.tsv').write_text('n\ttext\n1\t"a, ""b"""\n')
    assert read(tmp_path / 'a.tsv.csv')[0] == ['a\tb']
    assert read(tmp_path / 'a.tsv')[0] == ['a, "b"']
    compress(tmp_path / 'b.tsv.gz', b'n\ttext\n1\ta,b\n', 'gzip')
    assert read(tmp_path / 'b.tsv.gz')[0] == ['a,b']


def test_fields_that_are_not_used_may_share_a_name(tmp_path):
    (tmp_path / 'a.csv').write_text(',,text\n1,2,a\n')
    assert read(tmp_path / 'a.csv')[0] == ['a']


# ---- Parquet ----

def test_rows_that_repeat_a_text_come_in_chunks_of_a_megabyte(tmp_path):
    texts = [f'{number} ' * 2500 for number in range(5)]  # which the file holds once each
    values = pyarrow.array([texts[number % 5] for number in range(20_000)])
    categories = values.dictionary_encode()
    for column in (values, categories):
        pyarrow.parquet.write_table(pyarrow.table({'text': column}), tmp_path / 'a.parquet')
        source = Source(find(f'{tmp_path}/a.parquet'), Reading())
        chunks = list(source.chunks())
        assert 60 < len(chunks) < 130
        assert max(len(pickle.dumps(chunk)) for chunk in chunks) < 2.5e6
        assert len(documents_of(source, chunks[-2].next_place)[0]) < 500
        assert chunks[-1].documents(Reading())[0][-1].text == texts[19_999 % 5]


def test_a_chunk_has_many_rows_if_they_are_short(tmp_path):
    numbers = [str(number) for number in range(25_000)]
    pyarrow.parquet.write_table(pyarrow.table({'text': numbers}), tmp_path / 'a.parquet')
    source = Source(find(f'{tmp_path}/a.parquet'), Reading())
    assert len(list(source.chunks())) == 3
    assert documents_of(source)[0] == numbers


def test_the_size_of_a_field_with_a_dot_in_its_name_is_known(tmp_path):
    table = pyarrow.table({'a.b': [f'{number}' + 'x' * 2**19 for number in range(40)],
                           'a': pyarrow.array([[{'b': 'x' * 2**19}]] * 40)})
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet', use_dictionary=False)
    metadata = pyarrow.parquet.ParquetFile(tmp_path / 'a.parquet').metadata
    assert record_files._rows_at_once(metadata, ['a.b']) == 1
    assert record_files._rows_at_once(metadata, ['a']) == 1
    texts, _, _ = read(tmp_path / 'a.parquet', text_column='a.b')
    assert texts[39].startswith('39x')


def test_text_in_parquet_that_is_not_utf_8_is_refused(tmp_path):
    values = pyarrow.array([b'good', b'gr\xfc\xdfe']).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({'text': values}), tmp_path / 'a.parquet')
    with pytest.raises(UserError, match='record 2 of .*a.parquet holds text that is not valid'):
        read(tmp_path / 'a.parquet')


# ---- compressed ----

def test_gzip_with_zeros_behind_it_is_read(tmp_path):
    (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b'one ') + gzip.compress(b'two') + bytes(512))
    assert read(tmp_path / 'a.txt.gz')[0] == ['one two']


def test_a_full_temporary_folder_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    path = tmp_path / 'a.parquet'
    pyarrow.parquet.write_table(pyarrow.table({'text': ['a' * 1000]}), path)
    compress(f'{path}.gz', path.read_bytes(), 'gzip')

    def full(buffering):
        return open('/dev/full', 'r+b', buffering=buffering)

    monkeypatch.setattr(compressed_files.tempfile, 'TemporaryFile', full)
    with pytest.raises(UserError, match='cannot be unpacked to the temporary folder .* TMPDIR'):
        read(f'{path}.gz')
