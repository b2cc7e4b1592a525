"""
Tokenizes OpenWebText with GPT-2's byte-pair encoding, and splits it as nanoGPT does. Each document
ends with <|endoftext|>.

    python data/openwebtext/prepare.py

If it is interrupted in any way, the same command resumes where it stopped. For your own
documents, use data/prepare.py.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(__file__, '..', '..', '..')))
from configurator import configure
from plaingpt.corpus.dataset_source import DatasetSource
from plaingpt.corpus.documents import Reading
from plaingpt.corpus.preparation import prepare
from plaingpt.corpus.splitting import Splitting
from plaingpt.corpus.tokenization import Work
from plaingpt.system.messages import UserError, explained, warn
from plaingpt.text.data_sets import folder_of
from plaingpt.text.tokenizers import GPT2Tokenizer

# ---- configuration ----
# Files
dataset = 'openwebtext'     # folder under data/ to write, or an absolute path
# Split
test_size = 0.0005          # {(0, 1)} share of the documents that goes to val.bin
seed = 2357                 # {[0, 4294967295]} seed of the shuffle before the split
# Machine
num_proc = os.cpu_count()   # {>= 1} worker processes

HUB_NAME = 'Skylion007/openwebtext'
HUB_DOCUMENTS = 8_013_769


def main():
    documents = load().select_columns(['text'])
    if len(documents) != HUB_DOCUMENTS:
        warn(f'{HUB_NAME} has {len(documents):,} documents, but the published losses belong to '
             f'{HUB_DOCUMENTS:,}')
    with explained(ValueError):  # test_size leaves one of the splits empty
        splits = documents.train_test_split(test_size=test_size, seed=seed, shuffle=True)
    source = DatasetSource({'train': splits['train'], 'val': splits['test']}, 'text',
                           [HUB_NAME, len(documents), test_size, seed])
    work = Work(Reading(), Splitting(test_size, 'document'))
    prepare(folder_of(dataset), source, work, GPT2Tokenizer(), num_proc, HUB_NAME)


def load():
    """The documents of OpenWebText, a datasets.Dataset.

    UserError, with the first cause of the failure, if it can't be loaded."""
    try:
        import datasets
    except ImportError:
        raise UserError('preparing OpenWebText needs the package datasets: '
                        'pip install datasets') from None
    import httpx
    import pyarrow
    from huggingface_hub.errors import EntryNotFoundError

    # What the network, the disk, a damaged file or a data set that has moved may raise.
    load_errors = (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException,
                   httpx.HTTPError, EntryNotFoundError)
    try:
        return datasets.load_dataset(HUB_NAME, split='train')
    except load_errors as error:
        while error.__cause__:
            error = error.__cause__
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]  # one line
        raise UserError(f'{HUB_NAME} could not be loaded ({reason}): check the disk space and the '
                        'connection to huggingface.co, or prepare other documents with python '
                        "data/prepare.py --files='texts/*.parquet'") from error


if __name__ == '__main__':  # worker processes import this file and must not run it
    configure(globals())
    main()
