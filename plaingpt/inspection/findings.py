"""
What looks wrong in a corpus, in words, and what mends it: often a flag of data/prepare.py.

Each check reads the facts that report.py collects, a dict, and returns a Finding, several, or none.
The thresholds are the constants; a finding says what was found, not that it must be changed.
"""
from typing import NamedTuple

from plaingpt.inspection.characters import MOJIBAKE
from plaingpt.inspection.chunk_survey import LONG_LINE, SHORT
from plaingpt.inspection.overlap import WINDOW
from plaingpt.system.messages import counted

EMPTY_SHARE = 0.01            # of documents
SHORT_SHARE = 0.05            # of documents, where the median is at least SHORT_MEDIAN characters
SHORT_MEDIAN = 500
HUGE_SHARE = 0.2              # of all characters in one document, which has at least HUGE_CHARS and
HUGE_CHARS = 100_000          # is one of at least HUGE_AMONG
HUGE_AMONG = 10
DUPLICATE_SHARE = 0.01        # of documents
OVERLAP_DOCUMENTS = 0.01      # of val's documents
OVERLAP_TOKENS = 0.02         # of val's tokens
ODD_DOCUMENTS = 0.005         # of documents, and
ODD_PER_MILLION = 10          # of all characters
LONG_LINES_SHARE = 0.01       # of all characters
REPEATED_LINE_DOCUMENTS = 0.5   # of documents, for one line
REPEATED_LINES_CHARACTERS = 0.02  # of all characters, for the most frequent lines together
VAL_TOKENS = 10_000
VAL_DOCUMENTS = 10
VAL_SHARE = 0.3               # of all tokens
SKIPPED_SHARE = 0.1           # of documents that were read or left out
BYTES_PER_TOKEN = 2.0         # of a vocabulary of at least LARGE_VOCABULARY
LARGE_VOCABULARY = 1000

REMEDIES_FOR_CHARACTERS = {
    'control characters': 'remove them from the text: they come from binary files or terminals',
    'replacement characters': 'read the source again in its own encoding: these characters stand '
                              'where bytes could not be decoded',
    'private use': 'replace or remove them: they are symbols of one particular font',
    'zero-width spaces': 'remove them from the text: they are invisible, and cut words in two',
    'bidirectional controls': 'remove them unless the text mixes directions on purpose: they make '
                              'text look different from what it is',
    'byte order marks inside': 'remove them from the text: they come from files that were joined',
    'surrogates': 'repair the source: these are halves of characters, which UTF-8 does not have',
    MOJIBAKE: "convert the source anew: it is UTF-8 that was read as Latin-1 or Windows-1252, so "
              "that 'é' has become 'Ã©'",
}

# By what the reason contains; files that were left out for another reason are to be chosen.
REMEDIES_FOR_SKIPPED = {
    'min_chars': 'choose a smaller --min_chars',
    'max_chars': 'choose a larger --max_chars, or cut them into shorter documents',
    'max_line': 'choose a larger --max_line',
    'UTF-8': 'convert them to UTF-8',
    'unreadable': 'make them readable',
    'no message of the assistant': 'add its answers to the source',
    'begins with a reply': 'add what it replies to to the source',
}


class Finding(NamedTuple):
    """Something that looks wrong."""
    what: str
    how_much: str
    remedy: str


def findings(facts):
    """The Findings in the facts of a report, in the order in which to mend them."""
    found = []
    for check in CHECKS:
        found += check(facts)
    return found


# ---- documents ----

def duplicates(facts):
    """Documents that repeat an earlier one, unless the preparation has dropped them."""
    found = []
    exact = facts['exact_duplicates']
    if exact['share'] >= DUPLICATE_SHARE and facts['dedup'] == 'none':
        found.append(Finding(
            'exact duplicates', f'{counted(exact["repeated"], "document")} '
            f'({exact["share"]:.1%}), equal to an earlier one', '--dedup=exact drops them'))
    near = facts['near_duplicates']
    if near is None or facts['dedup'] == 'near':
        return found
    more = near['not_exact']
    if more > 0 and more >= DUPLICATE_SHARE * near['documents']:
        found.append(Finding(
            'near duplicates', f'{counted(more, "document")}{among_the_first(near)} '
            f'({more / near["documents"]:.1%}), nearly equal to an earlier one',
            '--dedup=near drops them, and exact duplicates'))
    return found


def among_the_first(near):
    """Where near duplicates were looked for, if not among all documents. near: the facts."""
    return '' if near['all_compared'] else f' of the first {near["documents"]:,}'


def empty_documents(facts):
    """Documents without text."""
    blank = facts['blank_documents']
    if blank == 0 or blank < EMPTY_SHARE * facts['documents']:
        return []
    remedy = 'remove them from the source; --min_chars leaves out those that are short'
    if facts['min_chars'] == 0:
        remedy = '--min_chars=1 leaves out those without any character'
    return [Finding('empty documents', f'{counted(blank, "document")} '
                    f'({blank / facts["documents"]:.1%}) with nothing but space', remedy)]


def short_documents(facts):
    """Documents that are much shorter than most."""
    short = facts['short_documents']
    if facts['lengths']['quantiles']['50%'] < SHORT_MEDIAN:
        return []  # short documents are what this corpus consists of
    if short < SHORT_SHARE * facts['documents']:
        return []
    return [Finding('very short documents', f'{counted(short, "document")} '
                    f'({short / facts["documents"]:.1%}) with fewer than {SHORT} characters, where '
                    f'half have {facts["lengths"]["quantiles"]["50%"]:,} or more',
                    f'--min_chars={SHORT} leaves them out')]


def huge_document(facts):
    """A document that outweighs the others."""
    largest = facts['lengths']['largest']
    share = largest / max(facts['characters'], 1)
    if facts['documents'] < HUGE_AMONG or largest < HUGE_CHARS or share < HUGE_SHARE:
        return []
    origin = facts['longest_documents'][0]['origin']
    return [Finding('one very long document', f'{origin} has {largest:,} characters, {share:.0%} '
                    f'of all text', f'--max_chars={largest - 1} leaves it out; or cut it into '
                    'documents of usual length')]


def skipped(facts):
    """Documents that were left out, except empty ones."""
    counts = {reason: left_out for reason, left_out in facts['skipped'].items()
              if reason != 'empty'}
    count = sum(left_out['documents'] for left_out in counts.values())
    if count == 0 or count < SKIPPED_SHARE * (count + facts['documents']):
        return []
    reason = max(counts, key=lambda name: counts[name]['documents'])
    return [Finding('documents were left out', f'{count:,}, beside {facts["documents"]:,} that '
                    f'were read; most often: {reason}, such as {counts[reason]["example"]}',
                    _remedy_for_skipped(reason))]


def _remedy_for_skipped(reason):
    """What to do about documents that were left out for this reason."""
    for key, remedy in REMEDIES_FOR_SKIPPED.items():
        if key in reason:
            return f'if you want them, {remedy}'
    return 'choose the files with --include'


# ---- text ----

def odd_characters(facts):
    """Characters that are seldom meant."""
    found = []
    for name, count in facts['odd_characters'].items():
        share = count['documents'] / max(facts['documents'], 1)
        per_million = count['characters'] / max(facts['characters'], 1) * 1e6
        if share >= ODD_DOCUMENTS and per_million >= ODD_PER_MILLION:
            found.append(Finding(
                name, f'{count["characters"]:,} in {counted(count["documents"], "document")} '
                f'({share:.1%}), such as {count["example"]}', REMEDIES_FOR_CHARACTERS[name]))
    return found


def long_lines(facts):
    """Lines that nobody wrote."""
    share = facts['long_line_characters'] / max(facts['characters'], 1)
    if share < LONG_LINES_SHARE:
        return []
    longest = facts['longest_lines'][0]
    remedy = 'cut such lines, or take documents with them out of the source'
    if facts['max_line_applies']:
        remedy = (f'--max_line={LONG_LINE} leaves such files out; or name those that you want with '
                  '--include')
    return [Finding('very long lines', f'{share:.1%} of the text is in lines of more than '
                    f'{LONG_LINE:,} characters, such as one of {longest["characters"]:,} in '
                    f'{longest["origin"]}, which is often data or generated code', remedy)]


def repeated_lines(facts):
    """Lines that occur in many documents."""
    lines = facts['repeated_lines']
    share = sum(line['characters'] for line in lines) / max(facts['characters'], 1)
    is_frequent = bool(lines) and lines[0]['share'] >= REPEATED_LINE_DOCUMENTS
    if not is_frequent and share < REPEATED_LINES_CHARACTERS:
        return []
    line = lines[0]
    how_much = (f'the line “{line["line"]}” occurs in {line["share"]:.0%} of the documents; '
                f'counted once a document, the most frequent lines take {share:.1%} of the text')
    return [Finding('boilerplate', how_much, 'remove such lines from the text, unless they belong '
                    'to your template or to the code')]


# ---- splits and tokens ----

def overlap(facts):
    """What val has in common with train."""
    found = []
    for key, flag, how in (('exact_overlap', 'exact', 'equal to'),
                           ('near_overlap', 'near', 'nearly equal to')):
        documents = facts[key]
        if documents and documents['share'] >= OVERLAP_DOCUMENTS:
            found.append(Finding(
                'documents of val in train', f'{documents["also_in_train"]:,} of '
                f'{counted(documents["val_documents"], "document")} in val '
                f'({documents["share"]:.1%}) are {how} one in train, so the validation loss is too '
                'low', f'--dedup={flag} keeps one of them'))
    windows = facts['window_overlap']
    if windows['share'] < OVERLAP_TOKENS:
        return found
    remedy = 'remove passages that repeat: the report shows the longest'
    near = facts['near_duplicates']
    if facts['dedup'] != 'near' and near is not None and near['repeated'] > 0:
        remedy = f'try --dedup=near; if that is not enough, {remedy}'
    found.append(Finding(
        'passages of val in train', f'{windows["share"]:.1%} of the tokens in val are in runs of '
        f'{WINDOW} tokens that occur in train, too', remedy))
    return found


def split_sizes(facts):
    """A val that says little about the model, or takes much from it."""
    tokens = facts['tokens']
    both = max(tokens['train'] + tokens['val'], 1)
    share = tokens['val'] / both
    if share > VAL_SHARE:
        return [Finding('a large val', f'val has {share:.0%} of all tokens, which the model does '
                        'not learn from', 'choose a smaller --test_size')]
    by_document = facts['split_by'] == 'document'
    documents = facts['split_documents']['val']
    if tokens['val'] >= VAL_TOKENS and (documents >= VAL_DOCUMENTS or not by_document):
        return []
    # Doubling test_size may not be enough, but beyond VAL_SHARE train would miss the text.
    wanted = max(2 * facts['test_size'], 1.5 * VAL_TOKENS / both)
    remedy = f'--test_size={wanted:.2g}, or more text'
    if wanted > VAL_SHARE:
        remedy = 'use more text'
    return [Finding('a small val', f'val has {tokens["val"]:,} tokens of '
                    f'{counted(documents, "document")}, so its loss says little about other text',
                    remedy)]


def tokenizer(facts):
    """A vocabulary that was made for other text."""
    bytes_per_token = facts['bytes_per_token']
    if bytes_per_token is None or bytes_per_token >= BYTES_PER_TOKEN:
        return []
    if facts['vocab_size'] < LARGE_VOCABULARY:
        return []
    remedy = '--tokenizer=bpe:N makes a vocabulary for this text'
    if facts['tokenizer'] == 'tokenizer.json':  # which bpe:N makes, too
        remedy = f'{remedy}; if this one is of that kind, choose a larger N'
    return [Finding('many tokens', f'a token holds {bytes_per_token:.2f} bytes of this text, '
                    f'although the vocabulary has {facts["vocab_size"]:,}',
                    f'{remedy}. --compare shows what several would do')]


CHECKS = (duplicates, overlap, empty_documents, short_documents, huge_document, odd_characters,
          long_lines, repeated_lines, split_sizes, tokenizer, skipped)
