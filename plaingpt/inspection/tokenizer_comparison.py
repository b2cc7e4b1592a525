"""
Compares tokenizers on a sample of a corpus: how many tokens they make of it, how fast, and what
their vocabulary costs a model.

A tokenizer that is trained on text gets one half of the sample, and all are measured on the other,
so that none is measured on what it was made from.
"""
import textwrap

from plaingpt.corpus.worker_pool import WorkerPool
from plaingpt.inspection.comparison_sample import halves_of, line_of, read_sample
from plaingpt.inspection.tokenizer_measurements import Job, measure
from plaingpt.inspection.visible_tokens import joined_lines
from plaingpt.system.messages import UserError, explained
from plaingpt.text.tokenizer_choice import choose

MAX_SAMPLE_BYTES = 20_000_000  # a tokenizer.json that gigatoken cannot read takes 10 s for half
ENGLISH = 'The quick brown fox jumps over the lazy dog.'
CHINESE = '敏捷的棕色狐狸跳过了懒狗。'
EMBEDDING_WIDTH = 768  # GPT-2's n_embd
MOST_KINDS = 12        # in a table: those with the most text
WIDTH = 100            # columns
LABEL_CHARS = 24       # of a tokenizer's name, if that tells it from the others


def compare(specs, source, work, num_proc, sample_bytes):
    """Compares the tokenizers that specs name, a list of str as in choose().

    source: the corpus, a Source. work: a Work, of which the reading counts. num_proc: processes
    that read. sample_bytes: of text to train and measure on; at most MAX_SAMPLE_BYTES are used.

    Returns a dict for JSON, which lines_of() describes:

        {'corpus_bytes': …, 'trained_on': bytes, 'measured_on': bytes,
         'kinds': {'extension': {'.py': bytes, …}, 'script': {'Latin': bytes, …}},
         'examples': [text, …],
         'tokenizers': [what measure() returns, and 'is_trained', …]}

    UserError if a tokenizer can't be loaded, or the corpus has too little text."""
    choices = {}
    metas = {}
    with explained(UserError, prefix='compare: '):
        for spec in specs:
            choices[spec] = choose(spec)
            if not choices[spec].needs_text:
                metas[spec] = choices[spec].tokenizer().to_meta()
    try:
        texts = read_sample(source, work, num_proc, min(sample_bytes, MAX_SAMPLE_BYTES))
        training, measured = halves_of(texts)
        for spec, choice in choices.items():
            if choice.needs_text:
                metas[spec] = choice.train([text.text for text in training]).to_meta()
        examples = [ENGLISH, CHINESE]
        line = line_of(measured)
        if line is not None:
            examples.append(line)
        metas = {spec: metas[spec] for spec in choices}  # in the order that was asked for
        # A new process measures them all: measure() confines it to one core, but could not move
        # the threads that training has left in this one.
        with WorkerPool(1, metas) as pool:
            _, results = next(pool.map(measure, [Job(measured, training, examples)]))
    except KeyboardInterrupt:
        raise UserError('interrupted: run the same command again') from None

    for result in results:
        result['is_trained'] = choices[result['name']].needs_text
    return {'corpus_bytes': source.size,
            'trained_on': sum(text.bytes for text in training),
            'measured_on': sum(text.bytes for text in measured),
            'kinds': {'extension': _sizes(measured, 'extension'),
                      'script': _sizes(measured, 'script')},
            'examples': examples, 'tokenizers': results}


def _sizes(texts, attribute):
    """{kind: bytes} of the kinds with the most text, the largest first."""
    sizes = {}
    for text in texts:
        kind = getattr(text, attribute)
        sizes[kind] = sizes.get(kind, 0) + text.bytes
    by_size = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    return dict(by_size[:MOST_KINDS])


# ---- tables ----

def lines_of(comparison):
    """Describes what compare() returned: a list of lines of about WIDTH columns."""
    results = comparison['tokenizers']
    labels = _labels(results)
    lines = _paragraph(_introduction(comparison))
    lines += ['', *_main_table(results, labels), *_notes(results)]
    for attribute, sizes in comparison['kinds'].items():
        if len(sizes) > 1:
            lines += ['', *_table_of_kinds(results, labels, attribute, sizes)]
    for number, text in enumerate(comparison['examples']):
        lines += ['', text]
        for result, label in zip(results, labels, strict=True):
            lines += _example_lines(label, result['examples'][number])
    return lines


def _introduction(comparison):
    measured = _megabytes(comparison['measured_on'])
    corpus = _megabytes(comparison['corpus_bytes'])
    sentence = f'Measured on {measured} of text from files with {corpus}.'
    if any(result['is_trained'] for result in comparison['tokenizers']):
        trained = _megabytes(comparison['trained_on'])
        sentence += f' Tokenizers with a * were made from {trained} of other text in them.'
    return sentence


def _megabytes(count):
    if count < 1e5:
        return f'{count / 1e3:,.1f} kB'
    return f'{count / 1e6:,.1f} MB'


def _main_table(results, labels):
    header = ['tokenizer', 'vocabulary', 'tokens', 'bytes/token', 'tokens/s', 'MB/s', 'used',
              'embedding']
    rows = [header]
    for result, label in zip(results, labels, strict=True):
        tokens_per_second, megabytes_per_second = '-', '-'
        # A vocabulary without any character of the text may make no tokens of it.
        if result['tokens_per_second'] and result['tokens']:
            tokens_per_second = f'{result["tokens_per_second"] / 1e6:.2f} M'
            bytes_per_second = result['tokens_per_second'] * result['bytes'] / result['tokens']
            megabytes_per_second = f'{bytes_per_second / 1e6:.1f}'
        share = result['used'] / result['vocab_size']
        rows.append([label, f'{result["vocab_size"]:,}', f'{result["tokens"]:,}',
                     _bytes_per_token(result), tokens_per_second, megabytes_per_second,
                     f'{share:.1%}', f'{_embedding_parameters(result) / 1e6:.2f} M'])
    notes = (f'tokens/s and MB/s: on one core. used: share of the vocabulary that occurs in this '
             f'text. embedding: parameters at n_embd={EMBEDDING_WIDTH}, for comparison with the 85 '
             'M of the blocks of GPT-2 (124M).')
    return [*table_lines(rows), *_paragraph(notes)]


def _embedding_parameters(result):
    """Parameters of the token embedding, which is the output layer as well."""
    return result['rounded_vocab_size'] * EMBEDDING_WIDTH


def _bytes_per_token(counts):
    """Text for counts of 'bytes' and 'tokens'."""
    if not counts['tokens']:
        return '-'
    return f'{counts["bytes"] / counts["tokens"]:.2f}'


def _notes(results):
    """What the figures alone don't tell."""
    lines = []
    for result in results:
        name = result['name']
        if result['left_out']:
            lines += _paragraph(f'{name} cannot express {result["left_out"]:,} of the texts, '
                                'which its figures leave out. Of the first of them it says: '
                                f'{result["reason"]}.')
        if result['changed']:
            lines += _paragraph(f'{name} changes text: {result["changed"]:,} of '
                                f'{result["checked"]:,} texts are different when decoded.')
    return lines


def _table_of_kinds(results, labels, attribute, sizes):
    """Bytes a token by kind of text: a row for each kind, a column for each tokenizer."""
    rows = [['bytes/token in', 'text', *labels]]
    for kind, size in sizes.items():
        row = [kind, _megabytes(size)]
        for result in results:
            counts = result['of_kind'][attribute].get(kind, {'bytes': 0, 'tokens': 0})
            row.append(_bytes_per_token(counts))
        rows.append(row)
    return table_lines(rows)


def _example_lines(label, example):
    if 'problem' in example:
        return _paragraph(f'  {label}: {example["problem"]}')
    tokens = example['tokens']
    lines = [f'  {label}, {len(tokens)} tokens']
    for line in joined_lines(tokens, WIDTH - 4):
        lines.append(f'    {line}')
    return lines


def _labels(results):
    """What the tables call each tokenizer: its name, of a path its end; with a star if it was
    trained."""
    longest = LABEL_CHARS
    names = [result['name'] for result in results]
    labels = [_shortened(name, longest) for name in names]
    while len(set(labels)) < len(set(names)):  # two paths have the same end
        longest += LABEL_CHARS
        labels = [_shortened(name, longest) for name in names]
    return [label + '*' if result['is_trained'] else label
            for label, result in zip(labels, results, strict=True)]


def _shortened(name, longest):
    return name if len(name) <= longest else '...' + name[3 - longest:]


def table_lines(rows):
    """Lines of a table whose first column is aligned left, the others right.

    Columns that don't fit into WIDTH follow below, again with the first one."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    groups = [[]]
    room = WIDTH - widths[0]
    for column, width in enumerate(widths[1:], start=1):
        if groups[-1] and room < width + 2:
            groups.append([])
            room = WIDTH - widths[0]
        groups[-1].append(column)
        room -= width + 2
    lines = []
    for group in groups:
        if lines:
            lines.append('')
        for row in rows:
            cells = [row[0].ljust(widths[0])]
            cells += [row[column].rjust(widths[column]) for column in group]
            lines.append('  '.join(cells).rstrip())
    return lines


def _paragraph(text):
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
