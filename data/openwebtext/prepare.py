"""
Tokenizes OpenWebText, or documents of your own, with GPT-2's byte-pair encoding. Each document ends
with <|endoftext|>.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --dataset=mine --data_files='texts/*.parquet'

If it is interrupted in any way, the same command resumes where it stopped.
"""
import glob
import os
import shutil
import sys

sys.path.insert(0, os.path.abspath(os.path.join(__file__, '..', '..', '..')))
from configurator import configure
from plaingpt.system.messages import UserError, explained, warn
from plaingpt.text.data_sets import folder_of
from plaingpt.text.parallel_tokenization import tokenize_splits
from plaingpt.text.publishing import publish
from plaingpt.text.tokenizers import GPT2Tokenizer

# ---- configuration ----
# Files
dataset = 'openwebtext'     # folder under data/ to write, or an absolute path
data_files = ''             # glob of local .parquet, .jsonl, .json or .txt files; '': the hub's
text_column = 'text'        # column (Parquet) or field (JSON) that holds a document's text
# Split
test_size = 0.0005          # {(0, 1)} share of the documents that goes to val.bin
seed = 2357                 # {[0, 4294967295]} seed of the shuffle before the split
# Machine
num_proc = os.cpu_count()   # {>= 1} worker processes

HUB_NAME = 'Skylion007/openwebtext'
HUB_DOCUMENTS = 8_013_769
READERS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text'}  # of datasets
TASK_BYTES = 2**20  # of text that a worker takes at a time


def main():
    if data_files:
        documents, inputs = load_files()
        source = data_files
    else:
        documents, inputs = load_from_hub()
        source = HUB_NAME
    check_documents(source, documents)
    documents = documents.select_columns([text_column])
    size = documents.data.nbytes

    folder = folder_of(dataset)
    with explained(OSError, prefix="the data set's folder could not be created: "):
        os.makedirs(folder, exist_ok=True)
    check_disk_space(folder, size)

    tokenizer = GPT2Tokenizer()
    with explained(ValueError):  # test_size leaves one of the splits empty
        splits = documents.train_test_split(test_size=test_size, seed=seed, shuffle=True)
    documents_per_task = max(1, TASK_BYTES * len(documents) // (size + 1))
    tokens = tokenize_splits(folder, {'train': splits['train'], 'val': splits['test']},
                             text_column, tokenizer,
                             [inputs, len(documents), size, text_column, test_size, seed],
                             num_proc, documents_per_task)
    publish(folder, tokenizer, tokens, source)
    os.remove(os.path.join(folder, 'progress.json'))


# ---- loading the documents ----

def load_files():
    """The documents of data_files, and what identifies these files.

    UserError if no file matches, or the files are of several kinds or can't be read."""
    files = []
    for path in sorted(glob.glob(os.path.expanduser(data_files), recursive=True)):
        if os.path.isfile(path):
            files.append(path)
    if not files:
        raise UserError(f'no file matches data_files={data_files!r}: check the pattern')
    suffixes = sorted({os.path.splitext(path)[1].lower() for path in files})
    readers = {READERS.get(suffix) for suffix in suffixes}
    if len(readers) > 1 or None in readers:
        raise UserError(f'data_files={data_files!r} matches files that end in '
                        f'{", ".join(suffixes)}: choose one kind of {", ".join(READERS)}')
    reader = readers.pop()

    options = {}
    if reader == 'text':
        options['sample_by'] = 'document'  # a file is one document, not one for each line
    documents = load(data_files, reader, data_files=files, **options)
    inputs = []
    for path in files:
        status = os.stat(path)
        inputs.append([os.path.abspath(path), status.st_size, status.st_mtime_ns])
    return documents, inputs


def load_from_hub():
    """The documents of OpenWebText, and what identifies them."""
    documents = load(HUB_NAME, HUB_NAME)
    if len(documents) != HUB_DOCUMENTS:
        warn(f'{HUB_NAME} has {len(documents):,} documents, but the published losses belong to '
             f'{HUB_DOCUMENTS:,}')
    return documents, HUB_NAME


def load(name, *args, **options):
    """Calls datasets.load_dataset for its train split.

    UserError, with the first cause of the failure, if it can't be loaded."""
    try:
        import datasets
    except ImportError:
        raise UserError('preparing a corpus needs the package datasets: '
                        'pip install datasets') from None
    import httpx
    import pyarrow
    from huggingface_hub.errors import EntryNotFoundError

    # What the network, the disk, a damaged file or a data set that has moved may raise.
    load_errors = (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException,
                   httpx.HTTPError, EntryNotFoundError)
    try:
        return datasets.load_dataset(*args, split='train', **options)
    except load_errors as error:
        while error.__cause__:
            error = error.__cause__
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]  # one line
        raise UserError(f'{name} could not be loaded ({reason}): check the files, the disk space '
                        'and, for the hub, the connection to huggingface.co, or use other files '
                        "with --data_files='texts/*.parquet'") from error


# ---- checks before the long work ----

def check_documents(name, documents):
    """UserError if a Dataset has no texts in text_column, or fewer than two documents."""
    columns = ', '.join(documents.column_names)
    if text_column not in documents.column_names:
        raise UserError(f'{name} has no column {text_column!r}: choose one of {columns} with '
                        '--text_column')
    kind = getattr(documents.features[text_column], 'dtype', 'lists')
    if kind not in ('string', 'large_string'):
        raise UserError(f'the column {text_column!r} of {name} holds {kind}, not text: choose '
                        f'another of {columns} with --text_column')
    if len(documents) < 2:
        raise UserError(f'{name} has fewer than 2 documents, which is too few to split: use more '
                        'files')


def check_disk_space(folder, text_bytes):
    """UserError if the disk has no room for the tokens of so many bytes of text."""
    needed = 0.4 * text_bytes  # English has about 5 bytes a token, and a token takes 2
    for path in glob.glob(os.path.join(glob.escape(folder), '*.part')):
        needed -= os.path.getsize(path)  # written before an interruption
    missing = needed - shutil.disk_usage(folder).free
    if missing > 0:
        raise UserError(f'{folder} needs about {missing / 1e9:.1f} GB more than the disk has free: '
                        'free some space, or choose another disk with --dataset=/path')


if __name__ == '__main__':  # worker processes import this file and must not run it
    configure(globals())
    main()
