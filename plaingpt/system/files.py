"""
Atomic files: the one way in which this project replaces a file on disk.

A reader never sees half of a file, whenever the writer is killed and however full the disk is. The
content goes to a temporary file in the same folder, is forced to the disk, and takes the place of
the old file in one rename.
"""
import contextlib
import errno
import glob
import os
import shutil


@contextlib.contextmanager
def durable_file(path):
    """A binary file to write at path, whose content is on the disk at the end of the block.

    If the block raises, the file is removed. OSError if the disk is full or the folder can't be
    written."""
    try:
        with open(path, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path)
        raise


@contextlib.contextmanager
def replacing(path):
    """A binary file whose content replaces path at the end of the block, all at once.

    If the block raises, path stays as it was. OSError as from durable_file()."""
    temporary = temporary_path(path)
    with durable_file(temporary) as file:
        yield file
    try:
        os.replace(temporary, path)
    except OSError:
        remove([temporary])
        raise
    sync(os.path.dirname(path) or '.')


def write_atomically(path, content):
    """Writes bytes to path, all or nothing. OSError as from durable_file()."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def creating(path):
    """A temporary path, where the block makes a file or a folder that becomes path at its end.

    If the block raises, nothing of it remains. OSError if the disk is full, if the folder around it
    can't be written, or if path exists by then."""
    temporary = temporary_path(path)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync(os.path.join(folder, name))
            sync(folder)
        if os.path.isfile(temporary):
            sync(temporary)
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        os.rename(temporary, path)
    except BaseException:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary)
        else:
            remove([temporary])
        raise
    sync(os.path.dirname(path) or '.')


def temporary_path(path):
    """Where the next content of path is written: beside it, and in no other process's way."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f'.{name}.{os.getpid()}.tmp')


def remove_unfinished(folder, names):
    """Deletes the temporary files of these names that killed processes have left in a folder."""
    for name in names:
        # .last.pt.PID.tmp, and the .last.pt.tmp of earlier versions.
        remove(glob.glob(os.path.join(glob.escape(folder), f'.{glob.escape(name)}.*tmp')))


def remove(paths):
    """Deletes those of the files that exist."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def sync(path):
    """Forces the content of a file, or the names in a folder, to the disk."""
    is_folder = os.path.isdir(path)
    if is_folder and os.name != 'posix':
        return  # Windows can't open a folder, and makes renames durable by itself
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        network_folder = is_folder and error.errno in (errno.EINVAL, errno.EOPNOTSUPP)
        if not network_folder:  # some network file systems can't sync a folder
            raise
    finally:
        os.close(descriptor)
