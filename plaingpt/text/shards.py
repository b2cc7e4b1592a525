"""
The files that hold a split: one file, such as train.bin, or its shards train_000.bin,
train_001.bin, and so on, which are read as one stream of tokens.

Shards are numbered from 0 with at least three digits, and may differ in size.
"""
import bisect
import collections
import os
import re
from typing import NamedTuple

from plaingpt.system.messages import UserError
from plaingpt.text.token_formats import recognise_format, recognise_uint32

# Shards of a split that are open at a time: few enough for a mixture of several data sets where a
# process may open 256 files.
MOST_OPEN = 32


# ---- where they are ----

def shard_path(path, number):
    """Where shard `number` of the split at path lies: train_007.bin for train.bin.

    The same with train.bin.part, which becomes train_007.bin.part."""
    stem, extension, rest = path.rpartition('.bin')
    return f'{stem}_{number:03d}{extension}{rest}'


def shards_of(path):
    """{number: path} of the shards of the split at path, in order; {} if there is none.

    UserError if two files have the same number."""
    folder, name = os.path.split(path)
    stem, extension, rest = name.rpartition('.bin')
    ending = extension + rest
    shard_name = re.compile(rf'{re.escape(stem)}_(\d{{3,}}){re.escape(ending)}', re.ASCII)
    try:
        names = os.listdir(folder or '.')
    except (OSError, ValueError):  # ValueError: a NUL character
        return {}  # opening path itself will say what is wrong with the folder
    shards = {}
    for name in sorted(names):
        match = shard_name.fullmatch(name)
        if not match:
            continue
        number = int(match[1])
        if number in shards:
            raise UserError(f'{folder} has two shards of number {number}, '
                            f'{os.path.basename(shards[number])} and {name}: remove one of them')
        shards[number] = os.path.join(folder, name)
    return dict(sorted(shards.items()))


def has_split(path):
    """Whether the split at path has its file, or its first shard, which is published last."""
    return os.path.exists(path) or 0 in shards_of(path)


def files_of(path):
    """The files of the split at path in order: [path], or its shards; [] if it has neither.

    UserError if it has both, or if a shard is missing before the last one."""
    shards = shards_of(path)
    if os.path.exists(path):
        if 0 in shards:
            raise UserError(f'{path} and {shards[0]} both exist, so it is unclear which of them '
                            'is the data set: remove the older one with its other shards, or '
                            'prepare the data set again')
        return [path]
    for place, number in enumerate(shards):
        if number != place:
            next_shard = os.path.basename(shards[number])
            raise UserError(f'{shard_path(path, place)} is missing, although there is '
                            f'{next_shard}: restore it, or prepare the data set again')
    return list(shards.values())


def how_to_prepare(path):
    """The end of an error message: how to get the split at path."""
    folder = os.path.dirname(path)
    script = os.path.join(folder, 'prepare.py')
    if not os.path.exists(script):
        return (f'put train.bin, val.bin and meta.json into {folder}, or make them of your own '
                'text with python data/prepare.py')
    if os.path.basename(folder) == 'openwebtext':
        return (f'run python {script} (54 GB), or start with python train.py '
                'config/train_shakespeare_char.py')
    return f'run python {script}'


# ---- reading them ----

class Stamp(NamedTuple):
    """By what a file is recognised when it is opened again."""
    bytes: int
    modified: int  # nanoseconds


class Shards:
    """The files of a split as one stream of tokens. A split of one file is one shard.

    At most MOST_OPEN files are open at a time; the least recently used one is closed for the next.

    path: the split, such as folder/train.bin.
    dtype: the np.dtype of its tokens.
    is_counted: whether its number of tokens is known, which tells uint16 from uint32 better than a
    guess from the first bytes.

    UserError if a file is missing, empty, unreadable, or not of this format."""

    def __init__(self, path, dtype, is_counted):
        self.dtype = dtype
        self.itemsize = dtype.itemsize
        self.paths = files_of(path)
        if not self.paths:
            raise UserError(f'{path} not found: {how_to_prepare(path)}')
        self.open_files = collections.OrderedDict()  # by number, the least recently used one first
        self.stamps = {}  # by number
        self.begins = []  # where each shard begins in the stream, in bytes
        self.ends = []    # and where it ends
        size = 0
        for number, path in enumerate(self.paths):
            self._check(number, path, is_counted)
            self.begins.append(size)
            size += self.stamps[number].bytes
            self.ends.append(size)
        self.tokens = size // self.itemsize

    def _check(self, number, path, is_counted):
        """Opens a shard for the first time, and refuses what can't hold tokens of this type."""
        try:
            head = self._file(number).read(1024)
        except OSError as error:
            raise UserError(f'{path} cannot be read ({error.strerror}): '
                            f'{how_to_prepare(path)}') from None
        size = self.stamps[number].bytes
        if size == 0:
            raise UserError(f'{path} is empty: {how_to_prepare(path)}')

        other_format = recognise_format(head)
        if other_format is None and self.itemsize == 2 and not is_counted:
            other_format = recognise_uint32(head)
        if other_format is not None:
            raise UserError(f'{path} does not hold {self.dtype.name} tokens from its first byte '
                            f'on, but looks like {other_format}')
        if size % self.itemsize != 0:
            raise UserError(f'{path} has {size} bytes, which is not a whole number of '
                            f'{self.dtype.name} tokens: it was cut short or has another format; '
                            f'{how_to_prepare(path)}')

    def describe(self):
        """How an error message names the whole split."""
        if len(self.paths) == 1:
            return self.paths[0]
        return f'{self.paths[0]} to {os.path.basename(self.paths[-1])}'

    def place_of(self, token):
        """(path of the file, place in it) of a token of the stream."""
        position = token * self.itemsize
        number = bisect.bisect_right(self.ends, position)
        return self.paths[number], (position - self.begins[number]) // self.itemsize

    def read_into(self, row, start):
        """Fills row, a memoryview of bytes, with the tokens from token `start` on.

        UserError if a file can't be read, or has been cut short."""
        position = start * self.itemsize
        number = bisect.bisect_right(self.ends, position)
        while True:
            offset = position - self.begins[number]
            piece = row[:self.ends[number] - position]  # the rest is in the next shard
            try:
                file = self._file(number)
                file.seek(offset)
                bytes_read = file.readinto(piece)
            except OSError as error:
                raise UserError(f'{self.paths[number]} cannot be read at token '
                                f'{offset // self.itemsize} ({error.strerror})') from error
            if bytes_read != len(piece):
                self._refuse_cut_file(number, offset + len(piece))
            if bytes_read == len(row):
                return
            row = row[bytes_read:]
            position = self.ends[number]
            number += 1

    def _refuse_cut_file(self, number, offset):
        size = self.stamps[number].bytes
        raise UserError(f'{self.paths[number]} ends before token {offset // self.itemsize}, '
                        f'although it had {size // self.itemsize} tokens when it was opened: '
                        'something has cut it short')

    def _file(self, number):
        """The open file of a shard. UserError if it is missing, or another one than before."""
        file = self.open_files.get(number)
        if file is None:
            if len(self.open_files) == MOST_OPEN:
                _, least_recent = self.open_files.popitem(last=False)
                least_recent.close()
            file = self.open_files[number] = self._open(number)
        elif len(self.paths) > MOST_OPEN:
            self.open_files.move_to_end(number)
        return file

    def _open(self, number):
        """Opens the file of a shard. UserError if it has changed since it was first opened."""
        file = _open_file(self.paths[number])
        status = os.fstat(file.fileno())
        stamp = Stamp(status.st_size, status.st_mtime_ns)
        if self.stamps.setdefault(number, stamp) != stamp:
            file.close()
            raise UserError(f'{self.paths[number]} has changed while it was in use: start again, '
                            'so that all files are of one data set')
        return file


def _open_file(path):
    """The file at path, unbuffered. UserError if it is missing or not a file, else OSError."""
    if not os.path.exists(path):
        raise UserError(f'{path} not found: {how_to_prepare(path)}')
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise UserError(f'{path} is not a file: {how_to_prepare(path)}')
    return open(path, 'rb', buffering=0)
