"""
The page of a report: one HTML file that needs no other, for people who look before they train.
"""
import base64
import html

from plaingpt.inspection import findings as thresholds
from plaingpt.inspection.chunk_survey import LONG_LINE
from plaingpt.inspection.findings import among_the_first
from plaingpt.inspection.html_pieces import (STYLE, escaped, paragraph, percent, preformatted,
                                             section, table, visible)
from plaingpt.inspection.overlap import WINDOW
from plaingpt.inspection.repeated_lines import MIN_CHARS
from plaingpt.system.messages import counted


def page(facts, picture):
    """The page of a report, as HTML.

    facts: those that report.py collects. picture: the PNG of lengths, or None."""
    name = f'Report on {facts["name"]}'
    sections = [
        _summary(facts), _findings(facts['findings']), _lengths(facts, picture), _kinds(facts),
        _characters(facts), _duplicates(facts), _overlap(facts), _lines(facts), _extremes(facts),
        _skipped(facts), _excerpts(facts), _method(facts)]
    body = '\n'.join(part for part in sections if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(visible(name))}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escaped(name)}</h1>
{body}
</body>
</html>
"""


# ---- sections ----

def _summary(facts):
    tokens = facts['tokens']
    documents = facts['split_documents']
    rows = [['documents', f'{facts["documents"]:,}'],
            ['characters', f'{facts["characters"]:,}'],
            ['bytes in UTF-8', f'{facts["bytes"]:,}'],
            ['tokens in train', f'{tokens["train"]:,} of '
                                f'{counted(documents["train"], "document")}'],
            ['tokens in val', f'{tokens["val"]:,} of {counted(documents["val"], "document")}'],
            ['tokenizer', f'{facts["tokenizer"]}, with {facts["vocab_size"]:,} tokens']]
    if facts['bytes_per_token'] is not None:
        rows.append(['bytes a token', f'{facts["bytes_per_token"]:.2f}'])
    if facts['dropped_duplicates']:
        rows.append(['dropped', f'{facts["dropped_duplicates"]:,} documents, by '
                                f'--dedup={facts["dedup"]}'])
    about = ('What is in this data set, and what looks wrong. Everything below is about the '
             'documents as they were read, before duplicates were dropped.')
    if facts['chat']:
        about = (f'{about} A document is a chat, of which the text of the messages counts, each '
                 'after its role and a colon; tokens also write the chat template.')
    return paragraph(about, 'quiet') + table(None, rows)


def _findings(found):
    parts = []
    for finding in found:
        parts.append(f'<div class="finding"><b>{escaped(finding["what"])}</b>: '
                     f'{escaped(finding["how_much"])}.<br>What to do: '
                     f'{escaped(finding["remedy"])}.</div>')
    if not found:
        parts.append('<div class="good">Nothing, by the thresholds at the end of this page.</div>')
    return section('What looks wrong', *parts)


def _lengths(facts, picture):
    lengths = facts['lengths']
    parts = [paragraph(f'{lengths["smallest"]:,} to {lengths["largest"]:,} characters, '
                        f'{lengths["mean"]:,.0f} in the mean.')]
    if picture is not None:
        data = base64.b64encode(picture).decode('ascii')
        parts.append('<img alt="Histogram of the lengths of documents, in characters" '
                     f'src="data:image/png;base64,{data}">')
    parts.append(table(['of the documents', *lengths['quantiles']],
                        [['have at most', *lengths['quantiles'].values()]]))
    return section('Lengths of documents', *parts)


def _kinds(facts):
    kinds = facts['kinds_of_files']
    rows = []
    for kind in kinds[:12]:
        share = kind['characters'] / max(facts['characters'], 1)
        rows.append([kind['kind'], kind['documents'], kind['characters'], percent(share)])
    parts = [table(['kind of file', 'documents', 'characters', 'share'], rows)]
    if len(kinds) > 12:
        parts.append(paragraph(f'and {len(kinds) - 12} other kinds', 'quiet'))
    return section('Kinds of files', *parts)


def _characters(facts):
    scripts = [f'{script["script"]} {percent(script["share"])}' for script in facts['scripts']
               if script['share'] >= 0.0001]
    parts = [paragraph(f'Letters by script: {escaped(", ".join(scripts) or "there are none")}.')]
    rows = []
    for name, count in facts['odd_characters'].items():
        share = percent(count['documents'] / max(facts['documents'], 1))
        rows.append([name, count['characters'], count['documents'], share, count['example']])
    if rows:
        parts.append(table(['outside the usual', 'times', 'documents', 'share', 'for example in'],
                            rows))
    else:
        parts.append(paragraph('No characters outside the usual: neither control characters nor '
                                'replacement characters, private use, zero-width spaces, '
                                'bidirectional controls, byte order marks, surrogates, or '
                                'mojibake.'))
    return section('Characters', *parts)


def _duplicates(facts):
    parts = []
    for key, how in (('exact_duplicates', 'equal to an earlier one'),
                     ('near_duplicates', 'equal or nearly equal to an earlier one')):
        duplicates = facts[key]
        if duplicates is None:
            parts.append(paragraph('Near duplicates were not looked for: pip install rensa'))
            continue
        among = among_the_first(duplicates) if key == 'near_duplicates' else ''
        parts.append(paragraph(f'{counted(duplicates["repeated"], "document")}{among} '
                                f'({percent(duplicates["share"])}), {how}.'))
        if among:
            parts.append(paragraph('Near duplicates were not looked for in the others, to save '
                                    'memory; --dedup=near finds them all.', 'quiet'))
        for group in duplicates['largest_groups'][:3]:
            places = ' and '.join(escaped(origin) for origin in group['origins'])
            among = 'among them ' if group['documents'] > 2 else ''
            parts.append(paragraph(f'{group["documents"]:,} documents, {among}{places}:',
                                    'quiet'))
            parts.append(preformatted(group['text']))
    return section('Duplicates', *parts)


def _overlap(facts):
    parts = []
    for key, how in (('exact_overlap', 'equal'), ('near_overlap', 'equal or nearly equal')):
        documents = facts[key]
        if documents is not None:
            among = ''
            if key == 'near_overlap' and not facts['near_duplicates']['all_compared']:
                among = f', among the first {facts["near_duplicates"]["documents"]:,} of the corpus'
            parts.append(paragraph(
                f'{documents["also_in_train"]:,} of '
                f'{counted(documents["val_documents"], "document")} in val '
                f'({percent(documents["share"])}) are {how} to one in train{among}.'))
            if documents['examples']:
                examples = ', '.join(escaped(origin) for origin in documents['examples'])
                parts.append(paragraph(f'Such as {examples}', 'quiet'))
    if facts['exact_overlap'] is None:
        parts.append(paragraph('Val has the last part of each document, so documents are not '
                                'compared.'))
    windows = facts['window_overlap']
    looked_at = f'{windows["val_tokens"]:,} tokens of val'
    if windows['is_sample']:
        looked_at = f'{looked_at} (a sample, spread evenly over it)'
    parts.append(paragraph(f'Of {looked_at}, {windows["covered_tokens"]:,} '
                            f'({percent(windows["share"])}) are in a run of {WINDOW} tokens that '
                            'occurs in train, too.'))
    if windows['val_documents']:
        among = ', or parts of documents in the sample,' if windows['is_sample'] else ''
        parts.append(paragraph(f'{windows["documents_with"]:,} of '
                                f'{counted(windows["val_documents"], "document")}{among} have such '
                                'a run.'))
    for passage in windows['passages']:
        parts.append(paragraph(f'{passage["tokens"]:,} tokens in both splits, which begin:',
                                'quiet'))
        parts.append(preformatted(passage['text']))
    return section('Overlap between train and val', *parts)


def _lines(facts):
    lines = facts['repeated_lines']
    parts = []
    if lines:
        rows = [[line['documents'], percent(line['share']), line['line'], line['origin']]
                for line in lines]
        parts.append(table(['documents', 'share', 'line', 'for example in'], rows))
    else:
        parts.append(paragraph('No line occurs in many documents.'))
    missing = facts['repeated_lines_may_lack']
    if missing:
        parts.append(paragraph(f'A count may be too low, by up to {missing:,}: there were too '
                                'many different lines to count all.', 'quiet'))
    longest = [[line['characters'], line['text'], line['origin']]
               for line in facts['longest_lines']]
    return section('Lines that repeat', *parts) + section(
        'Longest lines', table(['characters', 'begins', 'in'], longest))


def _extremes(facts):
    parts = []
    for key, name in (('longest_documents', 'longest'), ('shortest_documents', 'shortest')):
        rows = [[document['characters'], document['text'], document['origin']]
                for document in facts[key]]
        parts.append(table(['characters', f'the {name} begin', 'in'], rows))
    return section('Longest and shortest documents', *parts)


def _skipped(facts):
    rows = [[counts['documents'], reason, counts['example']]
            for reason, counts in facts['skipped'].items()]
    if not rows:
        return ''
    return section('Left out', table(['documents', 'because', 'for example'], rows))


def _excerpts(facts):
    parts = [paragraph('Chosen by their hashes, which is as good as at random, and the same at '
                        'each report.', 'quiet')]
    for excerpt in facts['excerpts']:
        parts.append(paragraph(escaped(excerpt['origin']), 'quiet'))
        parts.append(preformatted(excerpt['text']))
    return section(counted(len(facts['excerpts']), 'excerpt'), *parts)


def _method(facts):
    items = [
        'Exact duplicates have the same text, by a hash of 64 bits. Near duplicates share most '
        'runs of five words, without case and punctuation: 100% of the pairs whose Jaccard '
        'similarity is 0.9 are found, 90% at 0.8, 12% at 0.7. Empty documents are neither.',
        _method_of_overlap(facts['window_overlap']),
        f'Lines are stripped, and count from {MIN_CHARS} characters on, once a document.',
        'Quantiles are read from a histogram and are up to 3% off.',
        _method_of_findings(),
    ]
    listed = '\n'.join(f'<li>{html.escape(item)}</li>' for item in items)
    return section('How this was measured', f'<ul class="quiet">\n{listed}\n</ul>')


def _method_of_overlap(windows):
    method = f'Overlap compares hashes of 64 bits of {WINDOW} tokens.'
    probability = windows['false_hit_probability']
    if probability > 0:  # val has as many tokens
        method += f' The probability that even one hit is false is below {probability:.0e}.'
    if windows['within_documents']:
        return f'{method} No run goes beyond the end of a document.'
    return f'{method} A run may go beyond the end of a document.'


def _method_of_findings():
    """The thresholds of findings.py as a sentence."""
    parts = [
        f'duplicates {thresholds.DUPLICATE_SHARE:.0%} of the documents',
        f'val in train {thresholds.OVERLAP_DOCUMENTS:.0%} of its documents or '
        f'{thresholds.OVERLAP_TOKENS:.0%} of its tokens',
        f'empty documents {thresholds.EMPTY_SHARE:.0%}',
        f'short ones {thresholds.SHORT_SHARE:.0%}, where the median is at least '
        f'{thresholds.SHORT_MEDIAN} characters',
        f'one document, of at least {thresholds.HUGE_AMONG}, with {thresholds.HUGE_SHARE:.0%} of '
        f'the text, and at least {thresholds.HUGE_CHARS:,} characters',
        f'characters outside the usual in {thresholds.ODD_DOCUMENTS:.1%} of the documents and '
        f'{thresholds.ODD_PER_MILLION} in a million',
        f'lines over {LONG_LINE:,} characters with {thresholds.LONG_LINES_SHARE:.0%} of the text',
        f'a line in {thresholds.REPEATED_LINE_DOCUMENTS:.0%} of the documents, or frequent lines '
        f'with {thresholds.REPEATED_LINES_CHARACTERS:.0%} of the text',
        f'val below {thresholds.VAL_TOKENS:,} tokens or {thresholds.VAL_DOCUMENTS} documents, or '
        f'above {thresholds.VAL_SHARE:.0%}',
        f'below {thresholds.BYTES_PER_TOKEN:.0f} bytes a token with a vocabulary of at least '
        f'{thresholds.LARGE_VOCABULARY:,}',
        f'{thresholds.SKIPPED_SHARE:.0%} of the documents left out']
    return f'A finding appears from these thresholds on: {"; ".join(parts)}.'
