"""
The report on a data set (--report=True): what is in it, what looks wrong, and what mends it.
report.json holds the facts, report.html shows them, lengths.png is the histogram.
"""
import io
import json
import os

from plaingpt.corpus.file_search import TEXT
from plaingpt.corpus.progress import Progress
from plaingpt.inspection.findings import findings
from plaingpt.inspection.html_pieces import visible
from plaingpt.inspection.overlap import WINDOW, find_overlap
from plaingpt.inspection.report_page import page
from plaingpt.inspection.survey import take_survey
from plaingpt.system.files import remove, write_atomically
from plaingpt.system.messages import explained, print0, warn
from plaingpt.text.data_sets import open_data_set

BLUE, VERMILION = '#0072B2', '#D55E00'


def write_report(folder, pool, source, work, tokenizer, counts):
    """Writes report.json, report.html and lengths.png into the folder of a finished data set.

    pool: a WorkerPool whose shared value is work.
    source: the Source that the data set was made from.
    work: the Work, with reading, splitting and dedup.
    counts: the preparation's Counts.

    Prints a short form. UserError if a file can't be read or written."""
    facts = collect_facts(folder, pool, source, work, tokenizer, counts)
    picture = draw_lengths(facts['lengths'])
    pages = page(facts, picture).encode('utf-8')
    content = json.dumps(facts, indent=1).encode('ascii')
    with explained(OSError, prefix='the report could not be written: '):
        picture_path = os.path.join(folder, 'lengths.png')
        if picture is None:
            remove([picture_path])  # that of an earlier report
        else:
            write_atomically(picture_path, picture)
        write_atomically(os.path.join(folder, 'report.html'), pages)
        write_atomically(os.path.join(folder, 'report.json'), content)
    report_path = visible(os.path.join(folder, 'report.html'))
    for line in [*short_form(facts), f'the whole report: {report_path}']:
        print0(line)


def collect_facts(folder, pool, source, work, tokenizer, counts):
    """All that report.json holds: a dict. Arguments as for write_report()."""
    splits_documents = work.splitting.by == 'document'
    survey = take_survey(pool, source, work.dedup)
    is_chat = work.reading.chat
    bytes_per_token = None
    if not is_chat:  # whose tokens also write the template, which the bytes don't hold
        tokens = counts.tokens['train'] + counts.tokens['val']
        bytes_per_token = counts.bytes / max(tokens, 1)
    facts = {
        'name': os.path.basename(os.path.abspath(folder)),
        'chat': is_chat,
        'tokens': counts.tokens,
        'split_documents': counts.documents,
        'bytes_per_token': bytes_per_token,
        'tokenizer': tokenizer.to_meta()['kind'],
        'vocab_size': tokenizer.vocab_size,
        'dedup': work.dedup,
        'dropped_duplicates': counts.duplicates,
        'min_chars': work.reading.min_chars,
        'max_line_applies': work.reading.skips_binaries and source.kind == TEXT,
        'test_size': work.splitting.test_size,
        'split_by': work.splitting.by,
        **survey.facts(splits_documents),
        'window_overlap': _window_overlap(folder, tokenizer, is_chat),
    }
    facts['findings'] = [finding._asdict() for finding in findings(facts)]
    return facts


def _window_overlap(folder, tokenizer, is_chat):
    """The Overlap of the token files in a folder, as a dict for JSON."""
    # What ends a text ends each message in many templates, and most are shorter than a window.
    end_of_text = None if is_chat else tokenizer.end_of_text
    _, train, val = open_data_set(folder, block_size=1)
    token_bytes = train.dtype.itemsize
    with Progress('comparing the splits', len(train) * token_bytes) as progress:
        overlap = find_overlap(train, val, end_of_text, tokenizer.vocab_size,
                               lambda tokens: progress.show(tokens * token_bytes))
    passages = [{'tokens': tokens, 'text': tokenizer.decode(ids)}
                for tokens, ids in overlap.passages]
    return {
        'window': WINDOW,
        'within_documents': end_of_text is not None,
        'val_tokens': overlap.val_tokens,
        'is_sample': overlap.is_sample,
        'covered_tokens': overlap.covered_tokens,
        'share': overlap.covered_tokens / max(overlap.val_tokens, 1),
        'val_documents': overlap.val_documents,
        'documents_with': overlap.documents_with,
        'false_hit_probability': overlap.false_hit_probability,
        'passages': passages,
    }


def short_form(facts):
    """The findings, one a line, or a line that says that there are none."""
    lines = []
    for finding in facts['findings']:
        lines.append(visible(f'look at: {finding["what"]}: {finding["how_much"]}. '
                             f'{finding["remedy"]}').replace('\n', ' '))
    if not lines:
        lines.append('nothing looks wrong')
    return lines


def draw_lengths(lengths):
    """The histogram of lengths as a PNG, 1600 pixels wide: bytes.

    lengths: the facts of that name. Without matplotlib, or without documents, it returns None."""
    try:
        # Not pyplot: Figure draws with Agg, which needs no display and keeps no global state.
        from matplotlib.figure import Figure
    except ImportError:
        warn('the report has no picture: drawing needs the package: pip install matplotlib')
        return None
    if not lengths['histogram']:
        return None
    edges = [first for first, _, _ in lengths['histogram']]
    edges.append(lengths['histogram'][-1][1])
    # A logarithmic axis begins at 1 at the earliest.
    spans_much = edges[-1] > 8 * max(edges[0], 1)
    if spans_much:
        edges[0] = max(edges[0], 1)
    documents = [count for _, _, count in lengths['histogram']]
    median = lengths['quantiles']['50%']

    picture = Figure(figsize=(8, 3.4), dpi=200, layout='constrained')
    axes = picture.subplots()
    axes.stairs(documents, edges, fill=True, color=BLUE, alpha=0.85)
    axes.axvline(max(median, 1), color=VERMILION, lw=1.5, ls='--', label=f'median {median:,}')
    axes.set(xscale='log' if spans_much else 'linear', xlabel='characters in a document',
             ylabel='documents')
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:,.4g}')
    axes.grid(color='#e5e5e5', lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    file = io.BytesIO()
    picture.savefig(file, format='png')
    return file.getvalue()
