"""
What a run reads: one data set, or a mixture of several, such as 'owt:0.7,code:0.3', of which each
gives a share of the windows.
"""
import math
import os
from typing import NamedTuple

import numpy as np

from plaingpt.system.messages import UserError, complaints
from plaingpt.text.data_sets import check_fit, folder_of, open_data_set
from plaingpt.text.publishing import prepare_if_missing
from plaingpt.text.token_files import STREAMS, TokenFile, inputs_and_targets
from plaingpt.text.tokenizers import same_vocabulary

EXAMPLE = "'owt:0.7,code:0.3'"
SMALLEST_SHARE, LARGEST_SHARE = 1e-12, 1e12  # before they are made to add up to 1


# ---- names and shares ----

def is_mixture(dataset):
    """Whether the key `dataset` gives names with shares, and is not a folder of such a name."""
    return ':' in dataset and not os.path.isdir(folder_of(dataset))


def shares_of(dataset):
    """{name: share} of the data sets that the key `dataset` names, in this order.

    The shares add up to 1; that of a data set alone is 1. UserError if the key can't be read."""
    if not is_mixture(dataset):
        if ',' in dataset and not os.path.isdir(folder_of(dataset)):
            raise UserError(f'dataset={dataset} names several data sets without their shares: '
                            f'write them as in {EXAMPLE}')
        return {dataset: 1.0}
    shares = {}
    folders = set()
    for entry in dataset.split(','):
        name, _, share = entry.rpartition(':')
        name = name.strip()
        if not name:
            raise UserError(f'dataset={dataset}: {entry.strip()!r} is not a data set with its '
                            f'share: write each as in {EXAMPLE}')
        folder = os.path.realpath(folder_of(name))
        if folder in folders:
            raise UserError(f'dataset={dataset} names {name} twice: give it one share')
        folders.add(folder)
        shares[name] = _share_of(dataset, name, share)
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _share_of(dataset, name, text):
    """The number that a share is written as. UserError if it is none."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not SMALLEST_SHARE <= share <= LARGEST_SHARE:
        raise UserError(f'dataset={dataset}: the share of {name} is {text.strip()!r}, but must be '
                        f'a number above 0, as in {EXAMPLE}')
    return share


def problems(run):
    """Yields what is wrong with the key `dataset` of train.py."""
    yield from complaints(shares_of, run['dataset'])


def prepare_missing(dataset):
    """Runs the prepare.py of each data set that is missing, but openwebtext's, which is 54 GB.

    UserError if one of them fails."""
    for name in shares_of(dataset):
        if name != 'openwebtext':
            prepare_if_missing(folder_of(name))


# ---- what a run reads ----

class Part(NamedTuple):
    """One of the data sets of a run."""
    name: str                # as the key `dataset` has it
    share: float             # of the windows that training reads
    meta: dict               # see read_meta()
    train: TokenFile | None  # None: it is missing
    val: TokenFile | None

    @property
    def folder(self):
        return folder_of(self.name)

    @property
    def tokens(self):
        """Tokens of the training split; None: unknown."""
        return None if self.train is None else len(self.train)


def open_run_data(dataset, block_size, may_be_missing=False):
    """The RunData of the key `dataset`, for sequences of up to block_size tokens.

    may_be_missing: as in open_data_set(). UserError if a data set is missing or can't be used, or
    if two have different vocabularies."""
    parts = []
    for name, share in shares_of(dataset).items():
        opened = open_data_set(folder_of(name), block_size, may_be_missing)
        parts.append(Part(name, share, *opened))
    present = [part for part in parts if part.train is not None]
    for part in present[1:]:
        if not same_vocabulary(present[0].meta['tokenizer'], part.meta['tokenizer']):
            raise UserError(f'{present[0].folder} and {part.folder} have different vocabularies, '
                            'so one model cannot read both: prepare them with the same tokenizer')
    return RunData(parts)


class RunData:
    """The data sets of a run, which have one vocabulary.

    parts: a list of Part.
    train: what training batches are drawn from, a TokenFile or a Mixture; None if a data set is
    missing."""

    def __init__(self, parts):
        self.parts = parts
        self.train = None
        if len(parts) == 1:
            self.train = parts[0].train
        elif all(part.train is not None for part in parts):
            self.train = Mixture([part.train for part in parts], [part.share for part in parts])

    @property
    def meta(self):
        """That of a data set that is present, if there is one."""
        for part in self.parts:
            if part.train is not None:
                return part.meta
        return self.parts[0].meta

    @property
    def val_files(self):
        """The TokenFile of each validation split, in the order of the parts."""
        return [part.val for part in self.parts]

    def check_fit(self, vocab_size, tokenizer):
        """Checks that those that are present can be used with a model, see check_fit()."""
        for part in self.parts:
            if part.train is not None:
                check_fit(part.folder, part.meta, (part.train, part.val), vocab_size, tokenizer)

    def describe(self):
        """The data sets and their sizes in a line; all must be present."""
        if len(self.parts) == 1:
            [part] = self.parts
            return (f'{part.meta.get("source", part.name)}: {len(part.train):,} training and '
                    f'{len(part.val):,} validation tokens')
        sizes = []
        for part in self.parts:
            sizes.append(f'{part.share:.3g} from {part.name} ({len(part.train):,} training and '
                         f'{len(part.val):,} validation tokens)')
        return ', '.join(sizes)

    def losses(self, train_loss, val_losses):
        """What metrics.jsonl says of an evaluation.

        train_loss: the mean over batches as training draws them. val_losses: the mean over each
        validation split, in the order of the parts."""
        mean = sum(part.share * loss for part, loss in zip(self.parts, val_losses, strict=True))
        entries = {'train_loss': train_loss, 'val_loss': mean}
        if len(self.parts) > 1:
            entries['val_loss_by_data'] = dict(zip(self._labels(), val_losses, strict=True))
        return entries

    def _labels(self):
        """Short names of the parts: those of their folders, or the whole names if these repeat."""
        labels = [os.path.basename(os.path.normpath(part.name)) for part in self.parts]
        if len(set(labels)) < len(labels):
            return [part.name for part in self.parts]
        return labels


class Mixture:
    """Several TokenFiles from which each row of a batch draws one by its share, and then a window.

    shares: one for each TokenFile; they add up to 1."""

    def __init__(self, token_files, shares):
        self.token_files = token_files
        self.bounds = np.cumsum(shares)[:-1]  # a number in [0, 1) below the first means file 0

    def __len__(self):
        return sum(len(token_file) for token_file in self.token_files)

    def batch(self, seed, stream, step, micro_batch, batch_size, block_size, device, part=0,
              parts=1):
        """Random windows for one micro-batch, as TokenFile.batch() returns them."""
        random = np.random.default_rng([seed, STREAMS[stream], step, micro_batch])
        # All parts draw the whole micro-batch, and each keeps its own rows.
        files = np.searchsorted(self.bounds, random.random(batch_size), side='right')
        sizes = np.array([len(token_file) for token_file in self.token_files])
        starts = random.integers(0, sizes[files] - block_size)
        files = files[part::parts]
        starts = starts[part::parts]

        windows = np.empty((len(starts), block_size + 1), np.int64)
        for number, token_file in enumerate(self.token_files):
            rows = np.flatnonzero(files == number)
            if len(rows) > 0:
                windows[rows] = token_file.rows(starts[rows], block_size + 1)
        return inputs_and_targets(windows, device)
