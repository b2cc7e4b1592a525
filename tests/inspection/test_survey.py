"""Tests of the survey of a corpus."""
import json

import pytest
from pools import Here
from surveys import source_of, survey_of, work_for

from plaingpt.corpus import large_files, readers
from plaingpt.inspection import large_document, survey
from plaingpt.inspection.chunk_survey import (EXCERPT_CHARS, EXTREMES, HEAD_CHARS, LONG_LINE, SHORT,
                                              Look, kind_of_file, survey_chunk)
from plaingpt.inspection.survey import take_survey

pytest.importorskip('rensa')


def test_counts_of_documents_characters_and_bytes(tmp_path):
    facts = survey_of(tmp_path, {'a.txt': 'one é\n', 'b.md': 'two', 'empty.txt': '',
                                 'blank.txt': ' \n'})
    assert facts['documents'] == 4
    assert facts['characters'] == 11
    assert facts['bytes'] == 12
    assert facts['blank_documents'] == 2
    assert facts['short_documents'] == 2
    assert facts['lengths']['smallest'] == 0 and facts['lengths']['largest'] == 6
    assert sorted((kind['kind'], kind['documents']) for kind in facts['kinds_of_files']) == [
        ('.md', 1), ('.txt', 3)]
    json.dumps(facts)


def test_blank_documents_are_not_among_the_short_ones(tmp_path):
    long_enough = 'x' * SHORT
    facts = survey_of(tmp_path, {'a.txt': ' ' * 99, 'b.txt': '\n', 'c.txt': long_enough[1:],
                                 'd.txt': long_enough})
    assert (facts['blank_documents'], facts['short_documents']) == (2, 1)


def test_an_empty_corpus(tmp_path):
    work = work_for(min_chars=5)
    facts = survey_of(tmp_path, {'a.txt': 'one'}, work)
    assert facts['documents'] == 0 and facts['excerpts'] == [] and facts['scripts'] == []
    assert facts['skipped'] == {
        'shorter than min_chars=5': {'documents': 1, 'example': str(tmp_path / 'a.txt')}}


def test_files_that_were_never_read_are_among_those_left_out(tmp_path):
    facts = survey_of(tmp_path, {'a.txt': 'text', 'b.bin': '\0'})
    assert facts['skipped'] == {'binary': {'documents': 1, 'example': str(tmp_path / 'b.bin')}}


@pytest.mark.parametrize('origin, kind', [
    ('src/model.py', '.py'), ('record 17 of a.jsonl', '.jsonl'), ('texts/B.TXT.gz', '.txt'),
    ('record 3 of x.parquet', '.parquet'), ('Makefile', 'without extension'), ('a.md.zst', '.md')])
def test_kinds_of_files(origin, kind):
    assert kind_of_file(origin) == kind


def test_duplicates_and_their_origins(tmp_path):
    text = 'the quick brown fox jumps over the lazy dog ' * 2
    facts = survey_of(tmp_path, {'a.txt': text, 'b.txt': text, 'c.txt': text.upper(),
                                 'd.txt': 'another text', 'e.txt': '', 'f.txt': ''})
    exact, near = facts['exact_duplicates'], facts['near_duplicates']
    assert (exact['repeated'], near['repeated']) == (1, 2)
    assert exact['largest_groups'] == [{
        'documents': 2, 'text': text[:HEAD_CHARS],
        'origins': [str(tmp_path / 'a.txt'), str(tmp_path / 'b.txt')]}]
    assert near['largest_groups'][0]['documents'] == 3


def near_copies(number):
    """Texts which differ in their hashes, but not in their words."""
    texts = {}
    text = 'the same words again and again'
    for copy in range(number):
        texts[f'{copy}.txt'] = text
        text += '!'
    return texts


@pytest.mark.parametrize('dedup, overlaps', [('none', True), ('exact', True), ('near', False)])
def test_near_duplicates_in_both_splits_unless_they_are_dropped(tmp_path, dedup, overlaps):
    facts = survey_of(tmp_path, near_copies(40), work_for(dedup))
    assert facts['near_duplicates']['repeated'] == 39
    overlap = facts['near_overlap']
    assert (overlap['also_in_train'] > 0) == overlaps
    if overlaps:
        assert overlap['also_in_train'] == overlap['val_documents'] < 40
        assert overlap['examples'] == [str(tmp_path / '0.txt')]
    assert facts['exact_overlap']['also_in_train'] == 0


def test_documents_that_are_cut_are_not_compared(tmp_path):
    facts = survey_of(tmp_path, near_copies(4), work_for(by='tail'))
    assert facts['exact_overlap'] is None and facts['near_overlap'] is None


def test_without_rensa_there_are_no_near_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, 'can_find', lambda kind: kind != 'near')
    facts = survey_of(tmp_path, near_copies(4))
    assert facts['near_duplicates'] is None and facts['near_overlap'] is None
    assert facts['exact_duplicates']['repeated'] == 0


@pytest.mark.parametrize('files_at_once', [1, 3, 1000])
def test_of_many_documents_the_first_are_looked_at_for_near_duplicates(tmp_path, monkeypatch,
                                                                       files_at_once):
    monkeypatch.setattr(survey, 'MAX_NEAR_DOCUMENTS', 4)
    monkeypatch.setattr(readers, 'FILES_AT_ONCE', files_at_once)
    texts = {**near_copies(6), '2.txt': near_copies(1)['0.txt'], 'empty.txt': ''}
    facts = survey_of(tmp_path, texts)
    near = facts['near_duplicates']
    assert (near['documents'], near['repeated'], near['not_exact']) == (4, 3, 2)
    assert near['share'] == 0.75 and not near['all_compared']
    assert facts['exact_duplicates']['documents'] == 6
    assert facts['exact_duplicates']['repeated'] == 1
    assert facts['near_overlap']['val_documents'] <= 4

    facts = survey_of(tmp_path, texts, work_for(dedup='near'))
    assert facts['near_duplicates']['documents'] == 6 and facts['near_duplicates']['all_compared']


def test_what_is_not_compared_gets_no_near_fingerprints(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, 'MAX_NEAR_DOCUMENTS', 4)
    monkeypatch.setattr(readers, 'FILES_AT_ONCE', 2)
    asked = []

    class Noting(Here):
        def map(self, function, chunks):
            for chunk, result in super().map(function, chunks):
                asked.append(getattr(chunk, 'fingerprints', None))
                yield chunk, result

    work = work_for()
    take_survey(Noting(1, work), source_of(tmp_path, near_copies(8), work), work.dedup)
    assert asked == ['near', 'near', 'exact', 'exact']


def test_odd_characters_with_counts_and_an_example(tmp_path):
    facts = survey_of(tmp_path, {
        'a.txt': 'plain', 'b.txt': 'x\x01y\x1b', 'c.txt': '\x07', 'd.txt': 'cafÃ© cafÃ©',
        'e.txt': 'a\ufeffb\u202e'})
    origin = {name: str(tmp_path / f'{name}.txt') for name in 'abcde'}
    assert facts['odd_characters'] == {
        'control characters': {'characters': 3, 'documents': 2, 'example': origin['b']},
        'bidirectional controls': {'characters': 1, 'documents': 1, 'example': origin['e']},
        'byte order marks inside': {'characters': 1, 'documents': 1, 'example': origin['e']},
        'mojibake': {'characters': 2, 'documents': 1, 'example': origin['d']}}


def test_scripts_by_their_share_of_letters(tmp_path):
    facts = survey_of(tmp_path, {'a.txt': 'abc 123', 'b.txt': 'лиса狐。'})
    assert facts['scripts'] == [{'script': 'Cyrillic', 'share': 0.5},
                                {'script': 'Latin', 'share': 0.375},
                                {'script': 'Han', 'share': 0.125}]


def test_longest_lines_and_documents(tmp_path):
    texts = {}
    for number in range(1, 9):
        line = ''.rjust(number, str(number))
        texts[f'{number}.txt'] = f'{line}\nshort'
    longest = ''.rjust(LONG_LINE + 1, 'x')
    second = ''.rjust(LONG_LINE, 'y')
    texts['long.txt'] = f'{longest}\n{second}'
    facts = survey_of(tmp_path, texts)
    lines = facts['longest_lines']
    assert [line['characters'] for line in lines] == [LONG_LINE + 1, 8, 7, 6, 5]
    assert lines[0]['origin'].endswith('long.txt') and lines[0]['text'] == 'x' * HEAD_CHARS
    assert facts['long_line_characters'] == LONG_LINE + 1
    assert len(facts['longest_documents']) == EXTREMES
    assert facts['longest_documents'][0]['origin'].endswith('long.txt')
    assert [document['characters'] for document in facts['shortest_documents']] == [
        7, 8, 9, 10, 11]


def test_lines_that_repeat(tmp_path):
    footer = 'This site uses cookies; accept them all.'
    texts = {f'{number}.txt': f'text number {number}, of its own\n  {footer}\n{footer}'
             for number in range(12)}
    line, = survey_of(tmp_path, texts)['repeated_lines']
    assert line['documents'] == 12 and line['share'] == 1.0 and line['line'] == footer
    assert line['characters'] == 12 * len(footer)
    assert line['origin'] == str(tmp_path / '0.txt')


def test_a_line_that_is_gone_at_the_second_reading_is_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr('plaingpt.inspection.survey.find_lines', lambda pool, source, hashes: {})
    texts = {f'{number}.txt': 'This line occurs in each document' for number in range(20)}
    assert survey_of(tmp_path, texts)['repeated_lines'] == []


def test_lines_in_few_documents_are_not_listed(tmp_path):
    texts = {f'{number}.txt': 'This line occurs in nine documents' for number in range(9)}
    assert survey_of(tmp_path, texts)['repeated_lines'] == []


def test_excerpts_are_of_different_documents_and_from_within(tmp_path):
    texts = {f'{number:02}.txt': f'{number} ' + 'word ' * 300 for number in range(30)}
    texts['same.txt'] = texts['00.txt']
    excerpts = survey_of(tmp_path, texts)['excerpts']
    assert len(excerpts) == 10
    assert len({excerpt['origin'] for excerpt in excerpts}) == 10
    assert all(0 < len(excerpt['text']) <= EXCERPT_CHARS for excerpt in excerpts)


def varied(documents):
    """Texts of several kinds."""
    texts = {}
    for number in range(documents):
        parts = []
        for _ in range(number % 5 + 1):
            parts.append(f'Document {number} has a line of its own.\n')
            parts.append('And this line is in all of them.\n')
        parts.append(''.rjust(number % 3, '\x01'))
        texts[f'{number:03}.txt'] = ''.join(parts)
    texts['double.txt'] = texts['003.txt']
    return texts


def test_the_result_does_not_depend_on_the_chunks(tmp_path, monkeypatch):
    work = work_for()
    source = source_of(tmp_path, varied(60), work)
    expected = take_survey(Here(1, work), source, work.dedup).facts(True)
    monkeypatch.setattr(readers, 'FILES_AT_ONCE', 7)
    assert len(list(source.chunks())) > 5
    assert take_survey(Here(1, work), source, work.dedup).facts(True) == expected


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(large_files, 'PIECE_BYTES', 8192)
    monkeypatch.setattr(large_files, 'SEARCH_BYTES', 1024)


def novel(lines=2000):
    """A text with odd characters, a line that repeats, and long lines."""
    parts = []
    for line in range(lines):
        parts.append(f'Line {line} of a novel\nThis line is in all of its pieces\n')
        if line % 100 == 0:
            parts.append('a bell \x07\nand mojibake: Ã©\n')
    long_line = ''.rjust(LONG_LINE + 5, 'z')
    parts.insert(lines // 2, f'{long_line}\n')
    parts.append(''.rjust(3 * LONG_LINE, 'y'))
    return ''.join(parts)


def test_a_large_file_that_comes_in_pieces_is_one_document(tmp_path, monkeypatch):
    text = novel()
    texts = {'a.txt': text, 'b.txt': text + 'The end', 'c.txt': text, 'd.txt': 'short\x07',
             'e.txt': 'x' * 9000, 'f.md': 'This line is in all of its pieces'}
    work = work_for()
    source = source_of(tmp_path, texts, work)
    monkeypatch.setattr(survey, 'MIN_REPEATS', 2)
    expected = take_survey(Here(1, work), source, work.dedup).facts(True)
    monkeypatch.setattr(large_files, 'PIECE_BYTES', 8192)
    monkeypatch.setattr(large_files, 'SEARCH_BYTES', 1024)
    pieces = [chunk for chunk in source.chunks() if not hasattr(chunk, 'files')]
    assert len(pieces) > 30
    facts = take_survey(Here(1, work), source, work.dedup).facts(True)
    # Excerpts are of pieces. Lines that a piece cuts count there as two, so only others compare.
    del facts['excerpts'], expected['excerpts']
    for of_facts in (facts, expected):
        of_facts['repeated_lines'] = [line for line in of_facts['repeated_lines']
                                      if line['line'][0] not in 'yz']
    assert expected['odd_characters']['control characters']['documents'] == 4
    assert expected['repeated_lines'][0]['documents'] == 4
    assert facts == expected


def test_no_line_is_in_more_documents_than_there_are(tmp_path, small_pieces, monkeypatch):
    monkeypatch.setattr(survey, 'MIN_REPEATS', 1)
    facts = survey_of(tmp_path, {'a.txt': novel(), 'b.txt': 'This line is in all of its pieces'})
    assert facts['documents'] == 2
    assert facts['repeated_lines'][0]['documents'] == 2
    assert facts['repeated_lines'][0]['share'] == 1.0
    assert facts['odd_characters']['mojibake'] == {
        'characters': 20, 'documents': 1, 'example': str(tmp_path / 'a.txt')}


def test_a_line_that_is_longer_than_a_piece(tmp_path, small_pieces):
    line = 'xxxxxxx' + ''.rjust(3 * LONG_LINE, 'y')
    facts = survey_of(tmp_path, {'a.txt': f'{line}\n{line[:LONG_LINE]}\nend'})
    assert facts['long_line_characters'] == len(line)
    assert [found['characters'] for found in facts['longest_lines']] == [len(line)]
    assert facts['longest_lines'][0]['text'] == line[:HEAD_CHARS]


def test_lines_that_a_large_document_has_no_room_for_may_lack(tmp_path, small_pieces, monkeypatch):
    monkeypatch.setattr(large_document, 'MAX_LINES', 300)
    facts = survey_of(tmp_path, {'a.txt': novel(), 'b.txt': novel() + 'The end'})
    assert facts['repeated_lines_may_lack'] == 2


def test_records_in_a_chunk(tmp_path):
    work = work_for()
    lines = [json.dumps({'text': f'record {number}'}) for number in range(3)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    source = source_of(tmp_path, {}, work)
    chunk, = source.chunks()
    found = survey_chunk(work, Look(chunk, 'near'))
    assert found.origins[2] == f'record 3 of {tmp_path / "a.jsonl"}'
    assert found.heads == ['record 0', 'record 1', 'record 2']
    assert found.kinds == {'.jsonl': [3, 24]}
