"""
What the prepare.py scripts share: fetching a text from one of two sources, tokens on their way to disk, and putting a
finished data set (train.bin, val.bin, meta.json) into its folder; and how a run starts them.
"""
import contextlib
import errno
import os

from plaingpt.system.messages import explained


def replace_file(path, content):
    """Writes bytes to path, whose folder is made if missing: path has all of them or stays as it was. UserError if the
    disk is full or the folder is read-only."""
    part = f'{path}.{os.getpid()}.part'  # of this process alone: several may fetch the same file
    with explained(OSError, prefix=f'{path} could not be written: '):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        try:
            with open(part, 'wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)


def remove(paths):
    """Deletes those of the files that are there."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def sync(path):
    """Forces what has been written to a file, or done in a folder, to the disk."""
    folder = os.path.isdir(path)
    if folder and os.name != 'posix':
        return  # there a folder can't be opened, and a rename is durable by itself
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network disks sync no folders
            raise
    finally:
        os.close(descriptor)
