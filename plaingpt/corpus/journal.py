"""
The journal of a preparation: how far it is, so that an interrupted one can resume.
"""
import hashlib
import json
import os

from plaingpt.system.files import remove, write_atomically
from plaingpt.system.folder_lock import lock_folder
from plaingpt.system.messages import explained
from plaingpt.text.publishing import remove_parts

PROGRESS_FILE = 'progress.json'
TOKENIZER_FILE = 'progress_tokenizer.json'  # see vocabulary.py
FINGERPRINTS_FILE = 'fingerprints.part'     # see preparation.py

_locks = {}  # for each folder that this process prepares; held until the process ends


def claim(folder):
    """Makes a data set's folder, if missing, and locks it, so that no other process prepares it.

    UserError if another one does, or if the folder can't be written."""
    with explained(OSError, prefix="the data set's folder could not be written: "):
        os.makedirs(folder, exist_ok=True)
        if folder not in _locks:
            _locks[folder] = lock_folder(folder, 'preparation', 'dataset')


class Journal:
    """Keeps how far the preparation of certain inputs is, in a folder."""

    def __init__(self, folder, inputs):
        self.folder = folder
        self.path = os.path.join(folder, PROGRESS_FILE)
        self.digest = digest_of(inputs)
        self.state = {}  # of an earlier run; {} if there is none
        try:
            with open(self.path, encoding='utf-8') as file:
                found = json.load(file)
        except (OSError, ValueError):
            return  # no earlier run, or nothing that can be trusted
        if isinstance(found, dict) and found.get('inputs') == self.digest:
            self.state = found

    def save(self, state):
        """Saves the state of a run, a dict for JSON."""
        write_atomically(self.path, json.dumps({'inputs': self.digest, **state}).encode())

    def clear(self):
        """Removes what other preparations have left unfinished in the folder."""
        self.state = {}
        remove([self.path, os.path.join(self.folder, FINGERPRINTS_FILE)])
        remove_parts(self.folder)

    def close(self):
        """Removes all traces of a preparation that is finished."""
        self.clear()
        remove([os.path.join(self.folder, TOKENIZER_FILE)])


def digest_of(inputs):
    """sha256 of a value for JSON, as text."""
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
