"""Tests of the report: its three files, and that a text can do no harm to the page."""
import json
import sys
from html.parser import HTMLParser

import pytest
from pools import Here
from surveys import character_data_set, chat_data_set, source_of, work_for

from plaingpt.corpus.worker_pool import WorkerPool
from plaingpt.inspection import report
from plaingpt.inspection.html_pieces import visible
from plaingpt.inspection.report import write_report
from plaingpt.inspection.report_page import page
from plaingpt.system.messages import UserError

pytest.importorskip('rensa')

HOSTILE = '<script>alert(1)</script> & "quoted" \u202egnirts\x01 </pre><img src=x onerror=alert(1)>'


def texts_of(number):
    texts = {}
    for document in range(number):
        lines = [f'Line {line} of document {document} is unlike the others.' for line in range(9)]
        texts[f'{document:02}.txt'] = '\n'.join(lines)
    texts['again.txt'] = texts['00.txt']
    texts['hostile.txt'] = HOSTILE
    return texts


@pytest.fixture
def corpus(tmp_path):
    """A source, its Work, and the folder, tokenizer and Counts of the data set made from it."""
    work = work_for(test_size=0.3)
    source = source_of(tmp_path / 'texts', texts_of(30), work)
    folder = tmp_path / 'mine'
    folder.mkdir()
    tokenizer, counts = character_data_set(folder, source, work)
    return source, work, folder, tokenizer, counts


def report_on(corpus, pool=None):
    """Writes a report, and returns its facts."""
    source, work, folder, tokenizer, counts = corpus
    write_report(str(folder), pool or Here(1, work), source, work, tokenizer, counts)
    return json.loads((folder / 'report.json').read_text())


class Page(HTMLParser):
    """Collects the tags of a page, their attributes, and its text."""

    def __init__(self, content):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.text = ''
        self.open = []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ('meta', 'img', 'br'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_files_agree_and_what_is_wrong_is_printed(corpus, capsys):
    facts = report_on(corpus)
    folder, counts = corpus[2], corpus[4]
    assert facts['name'] == 'mine'
    assert facts['documents'] == 32
    assert facts['tokens'] == counts.tokens
    assert facts['bytes_per_token'] == counts.bytes / sum(counts.tokens.values())
    assert (folder / 'lengths.png').read_bytes().startswith(b'\x89PNG')

    whats = [finding['what'] for finding in facts['findings']]
    assert 'exact duplicates' in whats
    printed = capsys.readouterr().out
    shown = Page((folder / 'report.html').read_text(encoding='utf-8')).text
    for finding in facts['findings']:
        assert finding['what'] in shown
        assert f'look at: {finding["what"]}: ' in printed
    assert '--dedup=exact' in shown and '--dedup=exact' in printed
    assert str(folder / 'report.html') in printed


def test_the_page_is_complete_and_asks_for_nothing(corpus):
    facts = report_on(corpus)
    content = (corpus[2] / 'report.html').read_text(encoding='utf-8')
    shown = Page(content)
    assert shown.open == []
    assert not {'script', 'link', 'iframe', 'object', 'a', 'form'} & set(shown.tags)
    sources = [value for name, value in shown.attributes if name in ('src', 'href')]
    assert len(sources) == 1 and sources[0].startswith('data:image/png;base64,iVBOR')
    assert 'http://' not in content and 'https://' not in content
    assert 'prefers-color-scheme: dark' in content
    for title in ('What looks wrong', 'Lengths of documents', 'Kinds of files', 'Characters',
                  'Duplicates', 'Overlap between train and val', 'Lines that repeat',
                  'Longest lines', 'Longest and shortest documents', '10 excerpts',
                  'How this was measured'):
        assert title in shown.text
    for excerpt in facts['excerpts']:
        assert visible(excerpt['text']).strip() in shown.text


def test_hostile_text_is_shown_as_text(corpus):
    report_on(corpus)
    content = (corpus[2] / 'report.html').read_text(encoding='utf-8')
    shown = Page(content)
    assert shown.tags.count('img') == 1
    assert not [name for name, _ in shown.attributes if name.startswith('on')]
    assert visible(HOSTILE) in shown.text
    assert '\u202e' not in content and '\x01' not in content


def test_a_hostile_name_is_shown_as_it_is(corpus):
    facts = report_on(corpus)
    facts['name'] = '<b>&amp;</title>\u202e'
    content = page(facts, None)
    assert '<title>Report on &lt;b&gt;&amp;amp;&lt;/title&gt;⟨U+202E⟩</title>' in content
    assert Page(content).text.count('Report on <b>&amp;</title>⟨U+202E⟩') == 2


@pytest.mark.parametrize('text, expected', [
    ('a\tb\nc\r\nd', 'a\tb\nc\nd'), ('\x1b[31m', '⟨U+001B⟩[31m'), ('\u202e', '⟨U+202E⟩'),
    ('\ud800', '⟨U+D800⟩'), ('\ufeff狐🦊', '⟨U+FEFF⟩狐🦊')])
def test_invisible_characters_are_shown_by_their_numbers(text, expected):
    assert visible(text) == expected


def test_the_same_report_from_worker_processes(corpus):
    expected = report_on(corpus)
    with WorkerPool(2, corpus[1]) as pool:
        assert report_on(corpus, pool) == expected


def test_a_good_corpus_has_no_findings(corpus, capsys):
    facts = report_on(corpus)
    capsys.readouterr()
    facts['findings'] = []
    assert report.short_form(facts) == ['nothing looks wrong']
    assert 'Nothing, by the thresholds' in page(facts, None)


def test_a_passage_of_train_in_val_is_shown(tmp_path):
    work = work_for(test_size=0.5)
    passage = 'This passage of more than fifty characters is in each of the documents. '
    texts = {f'{number}.txt': f'{number} ' * 50 + passage + f'{number}{number}' * 70
             for number in range(10)}
    source = source_of(tmp_path / 'texts', texts, work)
    tokenizer, counts = character_data_set(tmp_path, source, work)
    facts = report_on((source, work, tmp_path, tokenizer, counts))
    overlap = facts['window_overlap']
    assert overlap['covered_tokens'] >= len(passage) and overlap['share'] > 0.02
    assert passage.strip() in overlap['passages'][0]['text']
    assert 'passages of val in train' in [finding['what'] for finding in facts['findings']]


def test_a_val_that_is_shorter_than_a_window_has_no_probability(corpus):
    facts = report_on(corpus)
    windows = facts['window_overlap']
    assert 'is false is below' in page(facts, None)
    windows['false_hit_probability'] = 0.0
    assert 'is false' not in page(facts, None)


def chats(number):
    """JSON Lines of chats, whose messages are all shorter than a window; all but one have two."""
    lines = []
    for chat in range(number):
        question = f'What is {chat} and {chat * chat}?'
        messages = [{'role': 'user', 'content': question},
                    {'role': 'assistant', 'content': f'It is {chat + chat * chat}.'}]
        if chat > 0:
            messages += [{'role': 'user', 'content': 'Thank you!'},
                         {'role': 'assistant', 'content': 'Gladly. Anything else?'}]
        lines.append(json.dumps({'messages': messages}))
    return '\n'.join(lines)


def test_a_run_in_chats_goes_beyond_the_end_of_a_message(tmp_path):
    work = work_for(test_size=0.4, chat=True)
    source = source_of(tmp_path / 'texts', {'chats.jsonl': chats(20)}, work)
    tokenizer, counts = chat_data_set(tmp_path, source, work)
    facts = report_on((source, work, tmp_path, tokenizer, counts))
    windows = facts['window_overlap']
    # The thanks of each chat are 50 tokens and more, of which no message has so many.
    assert windows['covered_tokens'] >= 50 * (counts.documents['val'] - 1) > 0
    assert 'Thank you!' in windows['passages'][0]['text']
    assert windows['val_documents'] == 0 and facts['documents'] == 20
    shown = Page((tmp_path / 'report.html').read_text(encoding='utf-8')).text
    assert 'A run may go beyond the end of a document' in shown and 'such a run' not in shown
    assert 'A document is a chat' in shown


def test_bytes_a_token_are_not_told_of_chats(tmp_path):
    """The tokens write the template, which the bytes don't hold."""
    work = work_for(test_size=0.4, chat=True)
    source = source_of(tmp_path / 'texts', {'chats.jsonl': chats(20)}, work)
    tokenizer, counts = chat_data_set(tmp_path, source, work)
    facts = report_on((source, work, tmp_path, tokenizer, counts))
    assert facts['bytes_per_token'] is None
    shown = Page((tmp_path / 'report.html').read_text(encoding='utf-8')).text
    assert 'bytes a token' not in shown.split('How this was measured')[0]


def test_near_duplicates_of_the_first_documents_alone_are_told_as_such(corpus, monkeypatch):
    monkeypatch.setattr('plaingpt.inspection.survey.MAX_NEAR_DOCUMENTS', 25)
    report_on(corpus)
    shown = Page((corpus[2] / 'report.html').read_text(encoding='utf-8')).text
    assert 'of the first 25 (' in shown and 'not looked for in the others' in shown
    assert 'among the first 25 of the corpus' in shown


@pytest.mark.parametrize('walked', [False, True])
def test_max_line_is_advised_where_it_works(tmp_path, walked):
    work = work_for(skips_binaries=walked)
    texts = {f'{number}.txt': f'{number} ' * 10_000 for number in range(30)}
    source = source_of(tmp_path / 'texts', texts, work)
    tokenizer, counts = character_data_set(tmp_path, source, work)
    facts = report_on((source, work, tmp_path, tokenizer, counts))
    remedy, = [finding['remedy'] for finding in facts['findings']
               if finding['what'] == 'very long lines']
    assert ('--max_line' in remedy) == walked


def test_without_matplotlib_there_is_a_report_without_picture(corpus, monkeypatch, capsys):
    report_on(corpus)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    report_on(corpus)
    assert 'pip install matplotlib' in capsys.readouterr().err
    folder = corpus[2]
    assert not (folder / 'lengths.png').exists()
    assert 'img' not in Page((folder / 'report.html').read_text(encoding='utf-8')).tags


def test_a_folder_that_cannot_be_written_is_named(corpus, monkeypatch):
    def refuse(path, content):
        raise OSError(28, 'No space left on device', path)

    monkeypatch.setattr(report, 'write_atomically', refuse)
    with pytest.raises(UserError, match='the report could not be written: .*No space left'):
        report_on(corpus)


@pytest.mark.parametrize('histogram', [
    [[0, 4, 1]], [[100, 128, 5]], [[0, 4, 2], [4, 8, 0], [8, 12, 9]],
    [[64, 80, 1], [80, 96, 3], [2**20, 2**21, 1]]])
def test_pictures_of_narrow_and_wide_histograms(histogram):
    lengths = {'histogram': histogram, 'quantiles': {'50%': histogram[0][0]}}
    assert report.draw_lengths(lengths).startswith(b'\x89PNG')


def test_no_picture_of_no_documents():
    assert report.draw_lengths({'histogram': [], 'quantiles': {'50%': 0}}) is None
