"""Tests of what looks wrong: each finding appears where it should, and only there."""
import copy

import pytest

from plaingpt.corpus.chat_messages import reason_against
from plaingpt.corpus.chunks import reason_against_text, reason_by_line
from plaingpt.corpus.documents import Reading
from plaingpt.inspection.characters import MOJIBAKE, ODD
from plaingpt.inspection.findings import REMEDIES_FOR_CHARACTERS, findings


def facts_of(**changes):
    """The facts of a corpus in which nothing is wrong, with changes: {name or name__key: value}."""
    facts = {
        'documents': 1000, 'characters': 4_000_000, 'bytes': 4_000_000,
        'tokens': {'train': 950_000, 'val': 50_000}, 'split_documents': {'train': 950, 'val': 50},
        'bytes_per_token': 4.0, 'vocab_size': 50257, 'tokenizer': 'gpt2', 'dedup': 'none',
        'test_size': 0.05, 'split_by': 'document', 'min_chars': 1, 'max_line_applies': True,
        'lengths': {'mean': 4000.0, 'smallest': 100, 'largest': 90_000, 'quantiles': {'50%': 3000}},
        'blank_documents': 0, 'short_documents': 0,
        'longest_documents': [{'characters': 90_000, 'origin': 'long.txt', 'text': ''}],
        'odd_characters': {},
        'exact_duplicates': {'repeated': 0, 'share': 0.0},
        'near_duplicates': {'documents': 1000, 'repeated': 0, 'share': 0.0, 'not_exact': 0,
                            'all_compared': True},
        'exact_overlap': {'val_documents': 50, 'also_in_train': 0, 'share': 0.0},
        'near_overlap': {'val_documents': 50, 'also_in_train': 0, 'share': 0.0},
        'window_overlap': {'share': 0.001},
        'longest_lines': [{'characters': 900, 'origin': 'long.txt', 'text': ''}],
        'long_line_characters': 0,
        'repeated_lines': [], 'skipped': {},
    }
    facts = copy.deepcopy(facts)
    for name, value in changes.items():
        outer, _, inner = name.partition('__')
        if inner:
            facts[outer][inner] = value
        else:
            facts[outer] = value
    return facts


def found(**changes):
    return findings(facts_of(**changes))


def repetitions(repeated):
    return {'repeated': repeated, 'share': repeated / 1000}


def near_repetitions(repeated, not_exact, documents=1000):
    return {'documents': documents, 'repeated': repeated, 'share': repeated / documents,
            'not_exact': not_exact, 'all_compared': documents == 1000}


def overlapping(documents):
    return {'val_documents': 50, 'also_in_train': documents, 'share': documents / 50}


def odd(characters, documents):
    return {'characters': characters, 'documents': documents, 'example': 'a.txt'}


def repeated_line(share, characters):
    return [{'documents': int(share * 1000), 'share': share, 'characters': characters,
             'line': 'All rights reserved', 'origin': 'a.txt'}]


def left_out(**counts):
    return {reason: {'documents': count, 'example': 'a.bin'} for reason, count in counts.items()}


def test_nothing_is_wrong_with_a_good_corpus():
    assert found() == []


@pytest.mark.parametrize('what, how_much, remedy, changes', [
    ('exact duplicates', '20 documents (2.0%)', '--dedup=exact',
     dict(exact_duplicates=repetitions(20), near_duplicates=near_repetitions(20, 0))),
    ('near duplicates', '20 documents (2.0%)', '--dedup=near',
     dict(exact_duplicates=repetitions(5), near_duplicates=near_repetitions(25, 20))),
    ('near duplicates', '3 documents of the first 100 (3.0%)', '--dedup=near',
     dict(exact_duplicates=repetitions(5), near_duplicates=near_repetitions(4, 3, 100))),
    ('documents of val in train', '1 of 50 documents', '--dedup=exact',
     dict(exact_overlap=overlapping(1))),
    ('documents of val in train', '10 of 50 documents', '--dedup=near',
     dict(near_overlap=overlapping(10))),
    ('passages of val in train', '3.0% of the tokens', 'remove passages',
     dict(window_overlap__share=0.03)),
    ('passages of val in train', '3.0% of the tokens', 'try --dedup=near',
     dict(window_overlap__share=0.03, near_duplicates=near_repetitions(3, 3))),
    ('empty documents', '10 documents', 'remove them', dict(blank_documents=10)),
    ('empty documents', '10 documents', '--min_chars=1', dict(blank_documents=10, min_chars=0)),
    ('very short documents', '60 documents', '--min_chars=50', dict(short_documents=60)),
    ('very short documents', '60 documents', '--min_chars=50',
     dict(short_documents=60, blank_documents=9)),
    ('one very long document', 'long.txt has 1,000,000', '--max_chars=999999',
     dict(lengths__largest=1_000_000)),
    ('very long lines', '5.0% of the text', '--max_line=10000', dict(long_line_characters=200_000)),
    ('very long lines', '5.0% of the text', 'cut such lines',
     dict(long_line_characters=200_000, max_line_applies=False)),
    ('boilerplate', 'All rights reserved', 'remove such lines',
     dict(repeated_lines=repeated_line(0.6, 1000))),
    ('boilerplate', '5.0% of the text', 'remove such lines',
     dict(repeated_lines=repeated_line(0.1, 200_000))),
    ('a large val', '40% of all tokens', 'smaller --test_size',
     dict(tokens={'train': 600_000, 'val': 400_000})),
    ('a small val', '4,000 tokens', '--test_size=0.1',
     dict(tokens={'train': 996_000, 'val': 4000})),
    ('a small val', '4,000 tokens', 'use more text', dict(tokens={'train': 10_000, 'val': 4000})),
    ('a small val', 'of 1 document,', '--test_size=0.1', dict(split_documents__val=1)),
    ('many tokens', '1.30 bytes', '--tokenizer=bpe:N', dict(bytes_per_token=1.3)),
    ('many tokens', '1.30 bytes', 'choose a larger N',
     dict(bytes_per_token=1.3, tokenizer='tokenizer.json')),
    ('documents were left out', '500, beside 1,000', '--include',
     dict(skipped=left_out(binary=499, other=1))),
    *[(name, '500 in 5 documents (0.5%)', REMEDIES_FOR_CHARACTERS[name],
       dict(odd_characters={name: odd(500, 5)})) for name in [*ODD, MOJIBAKE]],
])
def test_what_looks_wrong_is_said_with_its_remedy(what, how_much, remedy, changes):
    finding, = found(**changes)
    assert finding.what == what
    assert how_much in finding.how_much
    assert remedy in finding.remedy


@pytest.mark.parametrize('changes', [
    dict(exact_duplicates=repetitions(9), near_duplicates=near_repetitions(18, 9)),  # below 1%
    dict(exact_duplicates=repetitions(50), near_duplicates=near_repetitions(50, 0), dedup='exact'),
    dict(exact_duplicates=repetitions(50), near_duplicates=near_repetitions(90, 40), dedup='near'),
    dict(near_duplicates=None, near_overlap=None),                              # no rensa
    dict(exact_overlap=None, near_overlap=None),                                # documents are cut
    dict(window_overlap__share=0.019),
    dict(blank_documents=9),
    dict(short_documents=49),
    dict(short_documents=900, lengths__quantiles={'50%': 40}),                  # all are short
    dict(lengths__largest=799_999),
    dict(lengths__largest=4_000_000, documents=9),
    dict(long_line_characters=39_999),
    dict(repeated_lines=repeated_line(0.4, 79_999)),
    dict(tokens={'train': 700_000, 'val': 300_000}),
    dict(split_documents__val=1, split_by='tail'),
    dict(bytes_per_token=1.0, vocab_size=65),                                   # characters
    dict(bytes_per_token=None),                                                 # chats
    dict(skipped=left_out(binary=100)),
    dict(skipped=left_out(empty=5000)),
    dict(characters=300_000, lengths__largest=90_000),      # 30% of the text, but no long document
    dict(odd_characters={'private use': odd(39, 39)}),                      # below 10 in a million
    dict(odd_characters={'private use': odd(4000, 4)}),                         # in few documents
])
def test_what_is_usual_is_no_finding(changes):
    assert found(**changes) == []


@pytest.mark.parametrize('reason, remedy', [
    (Reading(min_chars=9).reason_by_length(3), 'a smaller --min_chars'),
    (Reading(max_chars=9).reason_by_length(10), 'a larger --max_chars'),
    (reason_by_line(10, max_line=9), 'a larger --max_line'),
    (reason_against_text(b'\xff' * 9, max_line=0), 'convert them to UTF-8'),
    (reason_against_text(b'\0' * 9, max_line=0), 'choose the files with --include'),
    (reason_against([]), 'add its answers'),
    (reason_against([{'role': 'assistant'}]), 'add what it replies to'),
])
def test_documents_that_were_left_out_have_the_remedy_for_their_reason(reason, remedy):
    finding, = found(skipped=left_out(**{reason: 500, 'other': 1}))
    assert f'most often: {reason}' in finding.how_much
    assert remedy in finding.remedy


def test_each_kind_of_odd_characters_has_a_remedy():
    assert set(REMEDIES_FOR_CHARACTERS) == {*ODD, MOJIBAKE}
