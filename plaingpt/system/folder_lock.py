"""
Locks a folder for one process, so that no second one writes into it at the same time.
"""
import errno
import os

from filelock import FileLock, Timeout

from plaingpt.system.messages import UserError, warn

NAME = '.lock'  # of the file in the folder; it stays there


def lock_folder(folder, kind, key):
    """Locks a folder until this process ends, however it ends. Returns the lock, to be kept.

    kind: of the work that locks it, such as 'run'. key: the flag that names another folder.
    UserError if another process holds the lock; OSError if the folder can't be written."""
    # Without filelock's fall-back to a lock file that outlives a kill and shuts out the next start.
    lock = FileLock(os.path.join(folder, NAME), fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f'another {kind} is writing into {folder}: wait for its end, stop it, or '
                        f'choose another --{key}') from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warn(f'the file system of {folder} does not support locks: make sure that no other {kind} '
             'writes there')
    return lock
