"""
Prepares a data set on all cores: workers make tokens of a corpus, and the parent writes them.

A preparation that was interrupted in any way resumes where it stopped, and ends with the same bytes
as one that was not.
"""
import os
import shutil
import time
from dataclasses import replace

import numpy as np

from plaingpt.corpus.chunks import START, Place
from plaingpt.corpus.counts import Counts
from plaingpt.corpus.duplicates import FirstOccurrences, check_kind, fingerprint_width
from plaingpt.corpus.journal import FINGERPRINTS_FILE, Journal, claim
from plaingpt.corpus.part_files import PartFiles
from plaingpt.corpus.progress import Progress
from plaingpt.corpus.tokenization import tokenize
from plaingpt.corpus.worker_pool import WorkerPool
from plaingpt.system.messages import UserError, counted, explained, print0, warn
from plaingpt.text.data_sets import SPLITS, mask_path, open_data_set
from plaingpt.text.publishing import publish
from plaingpt.text.token_files import DTYPES, dtype_for

SAVE_SECONDS = 1  # between saves of the progress


def prepare(folder, source, work, tokenizer, num_proc, name, shard_tokens=0):
    """Makes a source the data set of a folder, which is created if need be. Returns the Counts.

    work: the Work without a tokenizer. name: of the source, for meta.json.
    num_proc: number of worker processes. shard_tokens: see PartFiles.

    UserError if the disk is full, a worker dies, Ctrl-C is pressed, or a split has no text."""
    check_kind(work.dedup)
    claim(folder)
    work = replace(work, tokenizer_meta=tokenizer.to_meta())
    preparation = Preparation(folder, source, work, tokenizer, shard_tokens)
    counts = preparation.published()
    if counts is not None:
        preparation.close()
        print0(f'{folder} has been prepared from the same files, so nothing is left to do')
        return counts
    with WorkerPool(num_proc, work) as pool:
        counts = preparation.run(pool)
    names_flags = not source.splits_itself
    problem = _problem_of_splits(counts, work, names_flags)
    if problem is None:
        publish(folder, tokenizer, counts.tokens, name,
                preparation={'inputs': preparation.journal.digest, 'counts': counts.to_json()})
        preparation.close()
    # The data set is finished first, because printing ends the process once nobody reads it.
    for line in counts.describe(work.dedup, names_flags):
        print0(line)
    if problem is not None:
        raise UserError(problem)
    return counts


def _problem_of_splits(counts, work, names_flags):
    """Why the splits make no data set, and what to do, or None if they do.

    names_flags: whether the advice names flags of data/prepare.py."""
    documents = counts.lengths.documents
    if documents == 0:
        if not names_flags:
            return 'the source has no documents: check where they come from'
        return ('no document was found in the files: check --files, and why documents were left '
                'out')
    for split, tokens in counts.tokens.items():
        if tokens > 0:
            continue
        other = 'val' if split == 'train' else 'train'
        remedy = 'use another --test_size, or more text'
        if work.splitting.by == 'tail':
            return (f'{split}.bin would be empty: all text of {counted(documents, "document")} '
                    f'went to {other}; {remedy}')
        # A chat can't be cut.
        if names_flags and not work.reading.chat:
            remedy = ('use --split=tail, which cuts each document in two, another --test_size, or '
                      'more documents')
        return (f'{split}.bin would be empty: all documents ({documents:,}) went to {other}; '
                f'{remedy}')
    if work.reading.chat and counts.learned == 0:
        return ("the tokenizer's chat template writes no replies, so there is nothing to learn: "
                'choose another --tokenizer')
    return None


class Preparation:
    """Writes the tokens of a source into the .part files of a folder.

    source: has chunks(first), size, identity, skipped and splits_itself, as Source in readers.py.
    work: the Work, with a tokenizer. shard_tokens: see PartFiles."""

    def __init__(self, folder, source, work, tokenizer, shard_tokens=0):
        self.folder = folder
        self.source = source
        self.journal = Journal(folder, [source.identity, work.identity(), work.tokenizer_meta,
                                        shard_tokens])
        self.counts = Counts()
        self.ids = {}
        self.masks = {}
        dtype = DTYPES[dtype_for(tokenizer.vocab_size)]
        for split in SPLITS:
            path = os.path.join(folder, f'{split}.bin.part')
            self.ids[split] = PartFiles(path, dtype, shard_tokens)
            if work.reading.chat:
                path = mask_path(folder, split, '.part')
                self.masks[split] = PartFiles(path, np.uint8, shard_tokens)
        # What has occurred is read again on a resume.
        self.occurrences = FirstOccurrences(work.fingerprint)
        self.fingerprints = PartFiles(os.path.join(folder, FINGERPRINTS_FILE), np.uint64)
        self.drops = work.dedup != 'none'  # repeated documents, of which the first one is kept
        # Whether the last document that was read is dropped, so that its later pieces are, too.
        self.drops_pieces = False

    def run(self, pool):
        """Completes the .part files with a WorkerPool. Returns the Counts.

        UserError if the disk is full, a worker dies, or Ctrl-C is pressed."""
        try:
            self._run(pool)
        except KeyboardInterrupt:
            raise UserError('interrupted: run the same command again to resume') from None
        return self.counts

    def _run(self, pool):
        with self._explaining_full_disk():
            place, done = self._resume()
        if place != START:
            print0(f'resuming after {done / 1e6:,.1f} of {self.source.size / 1e6:,.1f} MB')
        saved = time.monotonic()
        room_checked = False
        with Progress('tokenizing', self.source.size, done) as progress:
            for chunk, tokenized in pool.map(tokenize, self.source.chunks(place)):
                with self._explaining_full_disk():
                    self._write(tokenized)
                place, done = chunk.next_place, chunk.bytes_read
                progress.show(done, len(tokenized.ids))
                if not room_checked:
                    self._check_room(done)
                    room_checked = True
                if time.monotonic() - saved >= SAVE_SECONDS:
                    self._save(place, done)
                    saved = time.monotonic()
            self._save(place, done)
        for file in self._files():
            file.close()

    def _explaining_full_disk(self):
        return explained(OSError, prefix=f'{self.folder} could not be written (the same command '
                                         'resumes from here): ')

    def _files(self):
        return [*self.ids.values(), *self.masks.values(), self.fingerprints]

    def _write(self, tokenized):
        """Writes the parts of those documents that are new."""
        is_kept = self._kept(tokenized)
        self.counts.add(tokenized, is_kept)
        for split in SPLITS:
            chosen = is_kept[tokenized.part_document] & (tokenized.part_in_val == (split == 'val'))
            if not chosen.any():
                continue
            of_tokens = np.repeat(chosen, tokenized.part_tokens)
            self.ids[split].write(tokenized.ids[of_tokens])
            if tokenized.mask is not None:
                self.masks[split].write(tokenized.mask[of_tokens])

    def _kept(self, tokenized):
        """Which documents of a chunk are used: bool (documents,)."""
        is_kept = np.ones(len(tokenized.begins), dtype=bool)
        if len(is_kept) == 0:
            return is_kept
        self.fingerprints.write(tokenized.fingerprints.reshape(-1))
        is_new = self.occurrences.add(tokenized.fingerprints)
        self.counts.duplicates += int(np.count_nonzero(~is_new))
        if not self.drops:
            return is_kept
        is_kept[tokenized.begins] = is_new
        # The later pieces of a large document share the fate of its first one.
        is_kept[~tokenized.begins] = not self.drops_pieces
        self.drops_pieces = not bool(is_kept[-1])
        return is_kept

    # ---- resuming ----

    def _resume(self):
        """Opens the files where an earlier run left them. Returns the Place, and bytes read."""
        state = self.journal.state
        written = state.get('written', {})
        is_intact = all(file.holds(written.get(file.name, 0)) for file in self._files())
        if not state or not is_intact:
            self.journal.clear()
            state, written = {}, {}
        for file in self._files():
            file.begin(written.get(file.name, 0))
        if not state:
            self.counts.skipped.merge(self.source.skipped)
            return START, 0
        self.counts = Counts.from_json(state['counts'])
        self.drops_pieces = state['drops_pieces']
        if self.fingerprints.tokens > 0:
            self.occurrences.add(self._stored_fingerprints())
        return Place(*state['place']), state['done']

    def _stored_fingerprints(self):
        values = np.fromfile(self.fingerprints.path(0), np.uint64, self.fingerprints.tokens)
        return values.reshape(-1, fingerprint_width(self.occurrences.kind))

    def _save(self, place, done):
        with self._explaining_full_disk():
            # The files reach the disk first, so that the journal is never ahead of them.
            for file in self._files():
                file.sync()
            self.journal.save({
                'place': place,
                'done': done,
                'written': {file.name: file.tokens for file in self._files()},
                'drops_pieces': self.drops_pieces,
                'counts': self.counts.to_json()})

    def _check_room(self, done):
        """Warns if the disk seems too small, judged by what the first `done` bytes became."""
        written = sum(file.tokens * file.dtype.itemsize for file in self._files())
        needed = written / max(done, 1) * (self.source.size - done)
        missing = needed - shutil.disk_usage(self.folder).free
        if missing > 0:
            warn(f'{self.folder} will need about {missing / 1e6:,.0f} MB more than the disk has '
                 'free, if all is like the beginning: free some space meanwhile, or stop and '
                 'choose another disk with --dataset=/path')

    # ---- finished ----

    def close(self):
        """Removes what only an unfinished preparation needs."""
        with explained(OSError, prefix=f'{self.folder} could not be cleaned up: '):
            self.journal.close()

    def published(self):
        """The Counts of the data set that the folder has, if it was made of the same inputs.

        None if it has another one, or none that is complete."""
        if not os.path.exists(os.path.join(self.folder, 'meta.json')):
            return None
        try:
            meta, _, _ = open_data_set(self.folder, block_size=1)
        except UserError:
            return None  # it will be replaced
        made = meta.get('preparation', {})
        if made.get('inputs') != self.journal.digest:
            return None
        return Counts.from_json(made['counts'])
