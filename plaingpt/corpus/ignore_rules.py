"""
The rules of .gitignore files: which files of a folder git would not track.
"""
import os

from plaingpt.corpus.documents import shown
from plaingpt.system.messages import UserError, explained


class IgnoreRules:
    """The .gitignore files that hold for a folder: its own, and those above it in a repository."""

    def __init__(self, root):
        self.specs = {}  # folder: its rules, for all folders entered so far
        folder = os.path.abspath(root)
        above = []
        while not os.path.exists(os.path.join(folder, '.git')):
            parent = os.path.dirname(folder)
            if parent == folder:
                return  # no repository
            folder = parent
            above.append(folder)
        for folder in above:
            self.enter(folder)
        if self.excludes(os.path.abspath(root) + '/'):
            self.specs.clear()  # whoever names an ignored folder wants it

    def enter(self, folder):
        """Reads the .gitignore of a folder, if it has one."""
        path = os.path.join(folder, '.gitignore')
        if not os.path.isfile(path):
            return
        try:
            from pathspec import GitIgnoreSpec
        except ImportError:
            raise UserError(f'respecting {shown(path)} needs the package pathspec: '
                            'pip install pathspec') from None
        valid = []
        with explained(OSError), open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                try:
                    GitIgnoreSpec.from_lines([line])
                except ValueError:
                    continue  # git ignores an invalid line, such as '!', too
                valid.append(line)
        self.specs[os.path.abspath(folder)] = GitIgnoreSpec.from_lines(valid)

    def excludes(self, path):
        """Whether a path is excluded; that of a folder ends with '/'. The deepest rule wins."""
        ending = '/' if path.endswith('/') else ''
        path = os.path.abspath(path)
        folder = os.path.dirname(path)
        while True:
            if folder in self.specs:
                inside = os.path.relpath(path, folder).replace(os.sep, '/')
                verdict = self.specs[folder].check_file(inside + ending).include
                if verdict is not None:
                    return verdict
            parent = os.path.dirname(folder)
            if parent == folder:
                return False
            folder = parent
