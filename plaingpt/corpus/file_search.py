"""
Finding the files of a corpus: a folder that is walked, or patterns of names.
"""
import fnmatch
import functools
import glob
import os
import re
from dataclasses import dataclass
from typing import NamedTuple

from plaingpt.corpus.documents import Skipped, shown
from plaingpt.corpus.ignore_rules import IgnoreRules
from plaingpt.corpus.journal import PROGRESS_FILE, TOKENIZER_FILE
from plaingpt.corpus.utf8 import HEAD_BYTES, is_binary
from plaingpt.system.messages import UserError
from plaingpt.text.publishing import REPORT_FILES, TIKTOKEN_FILE
from plaingpt.text.tokenizer_folder import TOKENIZER_JSON

TEXT = 'text'
FILE_KINDS = {'.jsonl': 'JSON Lines', '.ndjson': 'JSON Lines', '.json': 'JSON', '.csv': 'CSV',
              '.tsv': 'CSV', '.parquet': 'Parquet'}  # all other files are text
COMPRESSIONS = {'.gz': 'gzip', '.zst': 'zstd'}
# What a preparation writes into the folder of its data set.
COMPARISON_FILE = 'compare.json'  # of --compare
WRITTEN = ('train*.bin', 'val*.bin', 'meta.json', TOKENIZER_JSON, TIKTOKEN_FILE, '*.part',
           PROGRESS_FILE, TOKENIZER_FILE, *REPORT_FILES, COMPARISON_FILE)


@dataclass(frozen=True)
class Found:
    """The files of a corpus, in the order in which they are read."""
    paths: list
    kind: str        # TEXT or a value of FILE_KINDS
    walked: bool     # whether a folder was walked, where not every file need be text
    skipped: Skipped


def suffix_of(path):
    """The end of a file's name, without that of a compression: '.tsv'."""
    name, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(name)[1]
    return suffix


def kind_of(path):
    """What a file holds, by the end of its name: TEXT or a value of FILE_KINDS."""
    return FILE_KINDS.get(suffix_of(path), TEXT)


def find(files, include='', wants_records=False, output=None):
    """The Found files of `files`: a folder, a file or a glob, or several with commas between them.

    include: only files of a folder whose names match one of these patterns, with commas between.
    wants_records: of a folder with text and records, take the records; False: the text.
    output: the folder of the data set; what a preparation has written there is not read. Or None.

    UserError if there are none, or if they hold several kinds of records."""
    matches = []
    skipped = Skipped()
    walked = False
    for pattern in _patterns(files):
        if os.path.isdir(pattern):
            walked = True
            matches += [_Match(path, False) for path in _walk(pattern, include, skipped)]
        else:
            matches += [_Match(path, True) for path in _matches(pattern)]
    matches = _used(matches, output and os.path.realpath(output), skipped)
    if not matches:
        among = f' with include={include!r}' if include else ''
        if skipped.counts:
            left_out = ', '.join(f'{reason}: {count:,}'
                                 for reason, count in skipped.counts.items())
            raise UserError(f'of the files in files={files!r}{among}, none can be used '
                            f'({left_out}): name other files')
        raise UserError(f'no file matches files={files!r}{among}: check the pattern, which is '
                        f'relative to {shown(os.getcwd())}')

    if walked and not include:
        matches = _of_chosen_kinds(matches, wants_records, skipped)
    first_of_kind = {}
    for match in matches:
        first_of_kind.setdefault(kind_of(match.path), match.path)
    if len(first_of_kind) > 1:
        kinds = ' and '.join(f'{kind} ({shown(os.path.basename(path))})'
                             for kind, path in sorted(first_of_kind.items()))
        remedy = 'name files of one kind'
        if walked:
            remedy += ", or choose those of a folder with --include='*.jsonl'"
        raise UserError(f'files={files!r} matches {kinds}: {remedy}')
    kind, = first_of_kind
    return Found([match.path for match in matches], kind, walked, skipped)


class _Match(NamedTuple):
    """A file that was found."""
    path: str
    is_named: bool  # by a pattern; False: it lies in a folder that was walked


def _used(matches, output, skipped):
    """The matches that are read: each file once, and no binaries in a folder that was walked."""
    by_file = {}  # the real path of a file: the best of its matches
    real_path_of_folder = functools.cache(os.path.realpath)  # which takes long
    for match in matches:
        path = os.path.realpath(match.path) if os.path.islink(match.path) else match.path
        folder, name = os.path.split(path)
        folder = real_path_of_folder(folder)
        real = os.path.join(folder, name)
        if folder == output and any(fnmatch.fnmatch(name, pattern) for pattern in WRITTEN):
            continue
        other = by_file.get(real, match)
        best = min(other, match, key=_rank_among_links)
        by_file[real] = _Match(best.path, match.is_named or other.is_named)

    used = []
    for match in by_file.values():
        reason = None if match.is_named else _reason_against(match.path)
        if reason is None:
            used.append(match)
        else:
            skipped.add(reason, shown(match.path))
    return used


def _rank_among_links(match):
    """The smallest for the best of the matches that are links to the same file.

    One may lack the end of the name, which tells the kind; else the shortest is best."""
    lacks_kind = suffix_of(match.path) == ''
    return lacks_kind, len(match.path)


def _reason_against(path):
    """Why a file in a folder is not read, as far as its first bytes tell, or None if it is."""
    try:
        with open(path, 'rb', buffering=0) as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return 'unreadable'
    is_compressed = os.path.splitext(path.lower())[1] in COMPRESSIONS
    if kind_of(path) == TEXT and not is_compressed and is_binary(head):
        return 'binary'
    return None


def _of_chosen_kinds(matches, wants_records, skipped):
    """The matches without the files of a folder that are text among records, or the reverse."""
    kinds = {kind_of(match.path) for match in matches if not match.is_named}
    has_both = TEXT in kinds and len(kinds) > 1
    chosen = []
    for match in matches:
        kind = kind_of(match.path)
        is_wanted = (kind != TEXT) == wants_records
        if match.is_named or is_wanted or not has_both:
            chosen.append(match)
        else:
            among = 'records' if wants_records else 'text'
            skipped.add(f'{kind} among {among} (choose files with --include)', shown(match.path))
    return chosen


# ---- patterns ----

def _patterns(files):
    """The patterns in files. A comma may also be part of a name."""
    if os.path.exists(os.path.expanduser(files)):
        return [os.path.expanduser(files)]
    patterns = []
    for part in files.split(','):
        patterns.append(os.path.expanduser(part.strip()))
    return [pattern for pattern in patterns if pattern]


def _matches(pattern):
    """The files that a glob matches, sorted by name."""
    if os.path.isfile(pattern):  # its name may have brackets, which mean something in a glob
        return [pattern]
    return [path for path in sorted(_expanded(pattern)) if os.path.isfile(path)]


def _expanded(pattern):
    """Yields what a glob matches, where ** stands for folders at any depth, or none.

    The package glob follows links from folder to folder, even in circles."""
    stars = re.search(r'(^|/)\*\*(/|$)', pattern)
    if stars is None:
        yield from glob.glob(pattern)
        return
    before = pattern[:stars.end(1)]
    after = pattern[stars.end():] or '*'
    for root in glob.glob(before) if before else ['.']:
        for folder in _folders_below(root):
            if not before:
                folder = folder.removeprefix('.').removeprefix('/')
            yield from _expanded(os.path.join(glob.escape(folder), after))


def _folders_below(root):
    """Yields a folder and those below it, also through links, but each only once."""
    seen = set()
    waiting = [root]  # folders without links between them come first
    for top in waiting:
        for folder, folders, _ in os.walk(top):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith('.'))
            paths = [os.path.join(folder, name) for name in folders]
            waiting += [path for path in paths if os.path.islink(path)]
            yield folder


# ---- walking a folder ----

def _walk(root, include, skipped):
    """Yields the files under a folder, sorted, as git would track them.

    Hidden files and folders are left out, and what a .gitignore excludes."""
    def note_unreadable(error):
        if error.filename == root:
            raise UserError(f'{shown(root)} cannot be read ({error.strerror}): check its '
                            'permissions') from None
        skipped.add('unreadable', shown(error.filename))

    patterns = [pattern.strip() for pattern in include.split(',') if pattern.strip()]
    ignored = IgnoreRules(root)
    for folder, folders, names in os.walk(root, onerror=note_unreadable):
        ignored.enter(folder)
        folders[:] = _entered(folder, sorted(folders), ignored, skipped)
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.startswith('.'):
                continue
            if patterns and not _is_included(os.path.relpath(path, root), patterns):
                continue
            if ignored.excludes(path):
                skipped.add('in .gitignore', shown(path))
            elif os.path.isfile(path):
                yield path
            elif not os.path.exists(path):  # a link to a file that is missing
                skipped.add('unreadable', shown(path))


def _entered(folder, names, ignored, skipped):
    """The names of those folders in a folder that are walked, too."""
    entered = []
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith('.'):
            continue
        if ignored.excludes(path + '/'):
            skipped.add('a folder in .gitignore', shown(path))
        elif os.path.islink(path):
            skipped.add('a link to a folder', shown(path))
        else:
            entered.append(name)
    return entered


def _is_included(path, patterns):
    """Whether a path, relative to the folder, or its last part matches one of the patterns."""
    path = path.replace(os.sep, '/')
    name = path.rsplit('/', 1)[-1]
    return any(fnmatch.fnmatch(path if '/' in pattern else name, pattern) for pattern in patterns)
