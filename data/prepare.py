r"""
Makes a data set of your own text: a folder, text files, or records as JSON, CSV or Parquet, each
also as .gz or .zst.

    python data/prepare.py --files=my_novel.txt --dataset=mine --tokenizer=char
    python data/prepare.py --files=~/src --include='*.py,*.md' --dataset=code --tokenizer=bpe:4096
    python data/prepare.py --files='qa/*.jsonl' --template='{question}\n{answer}\n' --dataset=qa
    python data/prepare.py --files='texts/*.parquet' --dataset=texts --report=True
    python data/prepare.py --files=texts --compare=gpt2,bpe:4096

If it is interrupted in any way, the same command resumes where it stopped.
"""
import json
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(__file__, '..', '..')))
from configurator import configure
from plaingpt.corpus.documents import Reading, shown
from plaingpt.corpus.duplicates import check_kind
from plaingpt.corpus.file_search import COMPARISON_FILE, TEXT, find
from plaingpt.corpus.preparation import prepare
from plaingpt.corpus.readers import Source
from plaingpt.corpus.splitting import Splitting
from plaingpt.corpus.tokenization import Work
from plaingpt.corpus.vocabulary import tokenizer_for
from plaingpt.corpus.worker_pool import WorkerPool
from plaingpt.inspection import tokenizer_comparison
from plaingpt.inspection.report import write_report
from plaingpt.system.files import write_atomically
from plaingpt.system.messages import UserError, complaints, explained, print0
from plaingpt.text.data_sets import folder_of
from plaingpt.text.tokenizer_choice import choose

# ---- configuration ----
# Documents
files = ''                  # folder, file or glob; several with commas between them
include = ''                # of a folder, only files with such names: '*.py,*.md'
text_column = 'text'        # field of a record with its text
template = ''               # text of a record, made of its fields: '{question}\n{answer}\n'
chat = False                # True: records are chats with "messages"; adds a loss mask
min_chars = 1               # {>= 0} shorter documents are left out
max_chars = 0               # {>= 0} longer documents are left out; 0: no limit
max_line = 100_000          # {>= 0} in a folder, files with a longer line are left out; 0: none
dedup = 'none'              # {'none' | 'exact' | 'near'} leave out repeated documents
# Data set
dataset = ''                # folder under data/ to write, or an absolute path
tokenizer = 'gpt2'          # gpt2, cl100k_base, o200k_base, byte, char, bpe:4096, or a path
sample_bytes = 100_000_000  # {>= 1} of text to train bpe:N on; compare reads at most 20 MB
test_size = 0.05            # {(0, 1)} share for val.bin: of the documents, or the tail of each
split = 'auto'              # {'auto' | 'document' | 'tail'} auto: tail for a single text file
shard_tokens = 0            # {>= 0} tokens in a file, as train_000.bin; 0: all in train.bin
# Looking
report = False              # True: write report.html, which shows what is in the text
compare = ''                # compare tokenizers instead: 'gpt2,cl100k_base,bpe:4096'
# Machine
num_proc = os.cpu_count()   # {>= 1} worker processes


def problems():
    """Yields what is wrong between keys, beyond the rules in their comments."""
    if not files:
        yield "files is missing: name a folder, a file or a glob, as in --files='texts/*.txt'"
    if not dataset and not compare:
        yield 'dataset is missing: name the folder to write under data/, as in --dataset=mine'
    if compare and report:
        yield 'compare and report exclude each other: choose one'
    if chat and template:
        yield 'chat=True and template exclude each other: choose one'
    if text_column != 'text' and (chat or template):
        other = 'chat=True' if chat else 'template'
        yield f'text_column={text_column!r} has no effect with {other}: leave out one of them'
    if chat and split == 'tail':
        yield "a chat can't be cut: use split='document' with chat=True"
    if 0 < max_chars < min_chars:
        yield f'max_chars={max_chars} is below min_chars={min_chars}, which leaves out all'
    yield from complaints(check_kind, dedup)
    if template:
        yield from complaints(Reading(template=template).check)


def main():
    wants_records = chat or bool(template)
    folder = folder_of(dataset) if dataset else None
    found = find(files, include, wants_records, output=folder)
    if wants_records and found.kind == TEXT:
        raise UserError(f'{shown(found.paths[0])} is text, but chat and template need records: '
                        "name .jsonl, .json, .csv or .parquet files, as in --files='qa/*.jsonl'")
    if include and not found.walked:
        raise UserError(f'include={include!r} chooses files of a folder, but files={files!r} '
                        'names none: put the pattern into --files')
    reading = Reading(text_column, template, chat, min_chars, max_chars,
                      max_line if found.walked else 0, skips_binaries=found.walked)
    source = Source(found, reading)
    by = split
    if split == 'auto':
        # One text file is usually one work, of which val has to be a part.
        is_one_text = found.kind == TEXT and len(found.paths) == 1
        by = 'tail' if is_one_text else 'document'
    work = Work(reading, Splitting(test_size, by), dedup=dedup)
    if compare:
        print_comparison(source, work, folder)
        return

    chosen = tokenizer_for(choose(tokenizer, chat), folder, source, work, num_proc, sample_bytes)
    counts = prepare(folder, source, work, chosen, num_proc, files, shard_tokens)
    if report:
        try:
            with WorkerPool(num_proc, work) as pool:
                write_report(folder, pool, source, work, chosen, counts)
        except KeyboardInterrupt:
            raise UserError('interrupted: the data set is finished, and the same command makes '
                            'the report') from None


def print_comparison(source, work, folder):
    """Prints how tokenizers differ on a source, and saves the figures if a folder is named."""
    specs = [spec.strip() for spec in compare.split(',')]
    comparison = tokenizer_comparison.compare(specs, source, work, num_proc, sample_bytes)
    for line in tokenizer_comparison.lines_of(comparison):
        print0(line)
    if folder:
        path = os.path.join(folder, COMPARISON_FILE)
        content = json.dumps(comparison, indent=1).encode()
        with explained(OSError, prefix=f'{path} could not be written: '):
            os.makedirs(folder, exist_ok=True)
            write_atomically(path, content)


if __name__ == '__main__':  # worker processes import this file and must not run it
    configure(globals())
    main()
