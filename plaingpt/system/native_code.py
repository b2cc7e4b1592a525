"""
C++ in this repository: compiled for this CPU at its first use, and kept for the next one.

The compiled file lies in plaingpt/ of the user's cache folder, under a name that changes with the
source, the compiler and the CPU.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile

from plaingpt.system.devices import instruction_set

COMPILERS = ('c++', 'g++', 'clang++')
SECONDS = 120  # after which a compiler has failed; it takes 3 to 5


class CannotCompile(Exception):
    """There is no compiler, or it fails; the message says which in one sentence."""


def load(source):
    """The ctypes.CDLL of a C++ file. CannotCompile if this machine can't compile it."""
    command = [*compiler(), *flags()]
    code = b''.join(_files_of(source))
    described = repr((command, _version(command[0]), _cpu())).encode()
    digest = hashlib.sha256(code + described).hexdigest()[:16]
    name = os.path.splitext(os.path.basename(source))[0]
    path = os.path.join(cache_folder(), f'{name}-{digest}.so')
    if os.path.exists(path):
        # A file that was damaged is made anew.
        with contextlib.suppress(OSError):
            return ctypes.CDLL(path)
    _compile([*command, source], path)
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise CannotCompile(f'{path} does not load ({error})') from error


def _files_of(source):
    """The content of a C++ file, and of the files beside it that it includes, bytes each."""
    with open(source, 'rb') as file:
        content = file.read()
    found = [content]
    for name in re.findall(rb'#include "([^"]+)"', content):
        found += _files_of(os.path.join(os.path.dirname(source), name.decode()))
    return found


def compiler():
    """The command that compiles C++, a list: that in the variable CXX, or one of COMPILERS.

    CannotCompile if there is none, or if this is Windows, whose compilers lack what the code
    uses."""
    named = os.environ.get('CXX', '').split()
    if named:
        return named
    for name in COMPILERS:
        if sys.platform != 'win32' and shutil.which(name):
            return [name]
    raise CannotCompile('there is no C++ compiler')


def flags():
    """The compiler's flags: for the instructions that torch may use on this CPU, no more."""
    chosen = ['-O3', '-ffp-contract=off', '-shared', '-fPIC', '-pthread', '-std=c++17']
    if platform.machine() in ('x86_64', 'AMD64'):
        chosen.append('-march=native')
        if instruction_set() != 'AVX512':
            chosen.append('-mno-avx512f')
        if instruction_set() not in ('AVX512', 'AVX2'):
            chosen.append('-mno-avx2')
    return chosen


def cache_folder():
    """The folder for compiled files, which is made if it is missing.

    Where the user's cache can't be written, it is one in the folder for temporary files that no
    other user can write."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    folder = os.path.join(base, 'plaingpt')
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError:
        return _temporary_folder()
    return folder if os.access(folder, os.W_OK) else _temporary_folder()


@functools.cache
def _temporary_folder():
    """A new folder for this process."""
    return tempfile.mkdtemp(prefix='plaingpt-')


def _compile(command, path):
    """Runs a compiler; the file appears under its path when it is whole."""
    unfinished = f'{path}.{os.getpid()}'
    try:
        ended = subprocess.run([*command, '-o', unfinished], capture_output=True, text=True,
                               errors='replace', timeout=SECONDS)
        if ended.returncode != 0:
            first_line = (ended.stderr.strip().splitlines() or ['no message'])[0]
            raise CannotCompile(f'{command[0]} fails ({first_line[:200]})')
        os.replace(unfinished, path)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotCompile(f'{command[0]} fails ({str(error)[:200]})') from error
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def _version(name):
    """What a compiler says of itself."""
    try:
        ended = subprocess.run([name, '--version'], capture_output=True, text=True,
                               errors='replace', timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotCompile(f'{name} fails ({str(error)[:200]})') from error
    return ended.stdout


def _cpu():
    """What tells this CPU from others that share the cache folder, such as those of a cluster."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            lines = file.read().splitlines()
    except OSError:  # no Linux
        return platform.processor()
    wanted = ('model name', 'flags', 'Features')
    return sorted({line for line in lines if line.startswith(wanted)})
