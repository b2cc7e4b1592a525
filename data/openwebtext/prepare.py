"""
OpenWebText, or documents of your own, in GPT-2's byte-pair encoding, each followed by <|endoftext|>:

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --dataset=mine --data_files='texts/*.parquet' --test_size=0.01

A run that was stopped, in whatever way, goes on where it was when the same command is given again.
"""
import glob
import os
import shutil
import sys

sys.path.insert(0, os.path.abspath(os.path.join(__file__, '..', '..', '..')))
from configurator import configure
from plaingpt.system.messages import UserError, explained, warn
from plaingpt.text.parallel import write_parts
from plaingpt.text.publishing import publish
from plaingpt.text.tokenizers import GPT2Tokenizer

# ---- configuration ----
# Files
dataset = 'openwebtext'     # folder under data/ to write, or an absolute path
data_files = ''             # local .parquet, .jsonl, .json or .txt (one document each) files, as a glob; '': the hub's
text_column = 'text'        # column (Parquet) or field (JSON) that holds a document's text
# Split
test_size = 0.0005          # (0, 1) share of the documents that goes to val.bin
seed = 2357                 # [0, 4294967295] of the shuffle before the split
# Machine
num_proc = os.cpu_count()   # >= 1 processes that tokenize

HUB_NAME, HUB_DOCUMENTS = 'Skylion007/openwebtext', 8_013_769
KINDS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text'}
TASK_BYTES = 2 ** 20  # of text that a worker takes at a time


def find_files():
    """(files, kind) for data_files, kind being the name of datasets' reader of them. UserError if there are none."""
    files = sorted(path for path in glob.glob(os.path.expanduser(data_files), recursive=True) if os.path.isfile(path))
    if not files:
        raise UserError(f'no file matches data_files={data_files!r}')
    suffixes = sorted({os.path.splitext(path)[1].lower() for path in files})
    kinds = {KINDS.get(suffix) for suffix in suffixes}
    if len(kinds) > 1 or None in kinds:
        raise UserError(f'data_files={data_files!r} matches files that end in {", ".join(suffixes)}: '
                        f'choose one kind of {", ".join(KINDS)}')
    return files, kinds.pop()


def load(name, *args, **options):
    """datasets.load_dataset's train split. UserError, with the first cause in it, if there is none."""
    import datasets
    try:
        return datasets.load_dataset(*args, split='train', **options)
    except Exception as error:  # of any library below it, for the network, the disk or a broken file
        while error.__cause__:
            error = error.__cause__
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
        raise UserError(f'{name} could not be loaded ({reason}): check the files, the disk space and, for the hub, the '
                        "way to huggingface.co, or give other files, --data_files='texts/*.parquet'") from error


def check(name, documents):
    """UserError if a Dataset has no texts in text_column, or too few."""
    columns = ', '.join(documents.column_names)
    if text_column not in documents.column_names:
        raise UserError(f'{name} has no column {text_column!r}: choose one of {columns} with --text_column')
    kind = getattr(documents.features[text_column], 'dtype', 'lists')
    if kind not in ('string', 'large_string'):
        raise UserError(f'the column {text_column!r} of {name} holds {kind}, not text: choose another of {columns} '
                        'with --text_column')
    if len(documents) < 2:
        raise UserError(f'{name} has fewer than 2 documents, too few to split: give more files')


def main():
    if data_files:
        files, kind = find_files()
        options = {'sample_by': 'document'} if kind == 'text' else {}
        documents = load(data_files, kind, data_files=files, **options)
        inputs = [[os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in files]
    else:
        documents = load(HUB_NAME, HUB_NAME)
        inputs = HUB_NAME
        if len(documents) != HUB_DOCUMENTS:
            warn(f'{HUB_NAME} has {len(documents):,} documents, not the {HUB_DOCUMENTS:,} of the published losses')
    source = data_files or HUB_NAME
    check(source, documents)
    documents = documents.select_columns([text_column])
    size = documents.data.nbytes

    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), dataset)
    with explained(OSError, prefix='the folder of the data set could not be made: '):
        os.makedirs(folder, exist_ok=True)
    there = sum(os.path.getsize(path) for path in glob.glob(os.path.join(glob.escape(folder), '*.part')))
    missing = 0.4 * size - there - shutil.disk_usage(folder).free  # English: 2 bytes for a token of about 5 characters
    if missing > 0:
        raise UserError(f'{folder} needs about {missing / 1e9:.1f} GB more than the disk has free: free them, or '
                        'choose another disk with --dataset=/path')

    tokenizer = GPT2Tokenizer()
    with explained(ValueError):  # a test_size that leaves one split empty
        splits = documents.train_test_split(test_size=test_size, seed=seed, shuffle=True)
    tokens = write_parts(folder, {'train': splits['train'], 'val': splits['test']}, text_column, tokenizer,
                         [inputs, len(documents), size, text_column, test_size, seed], num_proc,
                         step=max(1, TASK_BYTES * len(documents) // (size + 1)))
    publish(folder, tokenizer, tokens, source)
    os.remove(os.path.join(folder, 'progress.json'))


if __name__ == '__main__':  # not in the worker processes, which import this file
    configure(globals())
    main()
