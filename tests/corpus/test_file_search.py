"""Finding the files of a corpus."""
import os
import types

import pytest

from plaingpt.corpus import file_search
from plaingpt.corpus.file_search import find, kind_of
from plaingpt.corpus.ignore_rules import IgnoreRules
from plaingpt.system.messages import UserError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('x\n', encoding='utf-8')


def names_in(found, folder):
    return [os.path.relpath(path, folder) for path in found.paths]


def test_the_kind_of_a_file_is_told_by_its_name():
    assert kind_of('a.jsonl') == kind_of('A.NDJSON.gz') == 'JSON Lines'
    assert kind_of('a.json.zst') == 'JSON'
    assert kind_of('a.csv') == kind_of('a.tsv') == 'CSV'
    assert kind_of('a.parquet') == 'Parquet'
    assert kind_of('a.py') == kind_of('a') == kind_of('notes.txt.gz') == 'text'


def test_a_folder_is_walked_without_what_is_hidden_or_ignored(tmp_path):
    make(tmp_path, 'b.py', 'a/c.md', 'a/deep/d.txt', '.hidden', '.git/config', 'build/out.py',
         'a/secret.py', 'a/deep/secret.py')
    (tmp_path / '.gitignore').write_text('build/\nsecret.py\n')
    (tmp_path / 'a' / 'deep' / '.gitignore').write_text('!secret.py\n')
    found = find(str(tmp_path))
    assert names_in(found, tmp_path) == ['b.py', 'a/c.md', 'a/deep/d.txt', 'a/deep/secret.py']
    assert found.walked and found.kind == 'text'
    assert found.skipped.counts == {'in .gitignore': 1, 'a folder in .gitignore': 1}


def test_rules_above_the_folder_hold_within_a_repository(tmp_path):
    make(tmp_path, '.git/config', 'sub/a.py', 'sub/b.log')
    (tmp_path / '.gitignore').write_text('*.log\n')
    assert names_in(find(str(tmp_path / 'sub')), tmp_path) == ['sub/a.py']
    # Whoever names a folder that is itself ignored wants it.
    (tmp_path / '.gitignore').write_text('sub/\n')
    assert names_in(find(str(tmp_path / 'sub')), tmp_path) == ['sub/a.py', 'sub/b.log']


def test_include_names_files_or_paths(tmp_path):
    make(tmp_path, 'a.py', 'a.md', 'lib/b.py', 'lib/c.txt')
    assert names_in(find(str(tmp_path), '*.py, *.md'), tmp_path) == ['a.md', 'a.py', 'lib/b.py']
    assert names_in(find(str(tmp_path), 'lib/*'), tmp_path) == ['lib/b.py', 'lib/c.txt']
    with pytest.raises(UserError, match=r"no file matches .* with include='\*.rs'"):
        find(str(tmp_path), '*.rs')


def test_patterns_are_globs_or_names_and_no_file_comes_twice(tmp_path, monkeypatch):
    make(tmp_path, 'a.txt', 'b.txt', 'with,comma.txt', 'brackets[1].txt', 'deep/er/c.txt')
    monkeypatch.chdir(tmp_path)
    assert find('*.txt').paths == ['a.txt', 'b.txt', 'brackets[1].txt', 'with,comma.txt']
    assert find('a.txt,*a.txt').paths == ['a.txt', 'with,comma.txt']
    assert find('with,comma.txt').paths == ['with,comma.txt']
    assert find('brackets[1].txt').paths == ['brackets[1].txt']
    assert find('**/c.txt').paths == ['deep/er/c.txt']
    assert not find('a.txt').walked
    with pytest.raises(UserError, match="no file matches files='none.txt'"):
        find('none.txt')


def test_a_folder_with_text_and_records_gives_one_of_them(tmp_path):
    make(tmp_path, 'a.py', 'b.json', 'c.json')
    found = find(str(tmp_path))
    assert names_in(found, tmp_path) == ['a.py']
    assert list(found.skipped.counts.values()) == [2]
    assert names_in(find(str(tmp_path), wants_records=True), tmp_path) == ['b.json', 'c.json']
    assert find(str(tmp_path), '*.json').kind == 'JSON'


def test_two_kinds_are_refused(tmp_path):
    make(tmp_path, 'a.jsonl', 'b.csv')
    with pytest.raises(UserError, match=r'matches CSV \(b.csv\) and JSON Lines \(a.jsonl\).*--inc'):
        find(str(tmp_path))
    make(tmp_path, 'c.txt')
    with pytest.raises(UserError, match=r'Lines \(a.jsonl\) and text \(c.txt\): .*of one kind$'):
        find(f'{tmp_path}/*.jsonl,{tmp_path}/*.txt')


def test_an_explicit_file_of_another_kind_does_not_vanish(tmp_path):
    make(tmp_path, 'folder/a.txt', 'folder/b.jsonl', 'extra.jsonl')
    files = f'{tmp_path}/folder,{tmp_path}/extra.jsonl'
    with pytest.raises(UserError, match=r'JSON Lines \(extra.jsonl\) and text \(a.txt\)'):
        find(files)
    found = find(files, wants_records=True)
    assert names_in(found, tmp_path) == ['folder/b.jsonl', 'extra.jsonl']
    # A file that a walk finds, too, is still an explicit one.
    with pytest.raises(UserError, match=r'JSON Lines \(b.jsonl\) and text \(a.txt\)'):
        find(f'{tmp_path}/folder,{tmp_path}/folder/b.jsonl')


@pytest.mark.parametrize('pattern', ['', '/mine', '/**', '/mine/*.*', '/mine/input.txt'])
def test_what_a_preparation_has_written_is_not_read(tmp_path, pattern):
    make(tmp_path, 'mine/input.txt', 'mine/train.bin', 'mine/val_mask.bin', 'mine/train_000.bin',
         'mine/meta.json', 'mine/tokenizer.json', 'mine/tokenizer.tiktoken', 'mine/progress.json',
         'mine/train.bin.part', 'mine/report.html', 'mine/report.json', 'mine/compare.json')
    os.symlink(tmp_path / 'mine', tmp_path / 'link')
    for output in ('mine', 'link'):
        found = find(f'{tmp_path}{pattern}', output=str(tmp_path / output))
        assert names_in(found, tmp_path) == ['mine/input.txt']
        assert 'binary' not in found.skipped.counts


# ---- a folder, where not all can be read ----

def test_binary_files_of_a_folder_are_not_found(tmp_path):
    make(tmp_path, 'a.txt', 'b.jsonl')
    (tmp_path / 'film').write_bytes(b'\0' * 10_000)
    (tmp_path / 'table.parquet').write_bytes(b'PAR1\0')
    assert names_in(find(str(tmp_path)), tmp_path) == ['a.txt']
    assert find(str(tmp_path)).skipped.counts['binary'] == 1
    (tmp_path / 'a.txt').unlink()
    (tmp_path / 'table.parquet').unlink()
    # A picture among records makes no text of the folder.
    assert names_in(find(str(tmp_path)), tmp_path) == ['b.jsonl']
    (tmp_path / 'b.jsonl').unlink()
    with pytest.raises(UserError, match=r'none can be used \(binary: 1\)'):
        find(str(tmp_path))
    assert find(f'{tmp_path}/film').paths == [f'{tmp_path}/film']


def test_what_is_unreadable_in_a_folder_is_counted(tmp_path, monkeypatch):
    make(tmp_path, 'a.txt', 'closed/b.txt', 'c.txt.gz')
    os.symlink(tmp_path / 'none', tmp_path / 'broken')
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith('closed'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    def refusing_to_open(path, *rest, **named):
        if str(path).endswith('.gz'):
            raise PermissionError(13, 'Permission denied', str(path))
        return open(path, *rest, **named)

    monkeypatch.setattr(os, 'scandir', refusing)
    monkeypatch.setattr(file_search, 'open', refusing_to_open, raising=False)
    found = find(str(tmp_path))
    assert names_in(found, tmp_path) == ['a.txt']
    assert found.skipped.counts == {'unreadable': 3}
    with pytest.raises(UserError, match='closed cannot be read .Permission denied'):
        find(str(tmp_path / 'closed'))


def test_lines_that_are_no_patterns_are_ignored_as_git_does(tmp_path):
    make(tmp_path, 'a.txt', 'b.log')
    (tmp_path / '.gitignore').write_text('!\n\\\n*.log\n')
    assert names_in(find(str(tmp_path)), tmp_path) == ['a.txt']


def test_a_path_is_compared_with_the_rules_above_it_alone(tmp_path, monkeypatch):
    for number in range(30):
        make(tmp_path, f'{number}/a.txt', f'{number}/b.log')
        (tmp_path / f'{number}' / '.gitignore').write_text('*.log\n')
    rules = IgnoreRules(str(tmp_path))
    compared = []

    class Spec:
        def check_file(self, path):
            compared.append(path)
            return types.SimpleNamespace(include=None)

    monkeypatch.setattr(IgnoreRules, 'enter', lambda rules, folder: None)
    rules.specs = {str(tmp_path / f'{number}'): Spec() for number in range(30)}
    assert not rules.excludes(str(tmp_path / '7' / 'a.txt'))
    assert compared == ['a.txt']


# ---- links ----

def test_each_file_is_found_once_whatever_links_to_it(tmp_path, monkeypatch):
    make(tmp_path, 'data/deep/a.txt', 'data/b.txt', 'other/c.txt')
    os.symlink('..', tmp_path / 'data' / 'deep' / 'up')
    os.symlink('..', tmp_path / 'data' / 'deep' / 'up_again')
    os.symlink('b.txt', tmp_path / 'data' / 'a_long_name.txt')
    os.symlink('../other', tmp_path / 'data' / 'other')
    found = find(str(tmp_path / 'data'))
    assert names_in(found, tmp_path) == ['data/b.txt', 'data/deep/a.txt']
    assert found.skipped.counts == {'a link to a folder': 3}
    # A glob follows links.
    expected = ['data/b.txt', 'data/deep/a.txt', 'data/other/c.txt']
    assert names_in(find(f'{tmp_path}/data/**/*.txt'), tmp_path) == expected
    assert names_in(find(f'{tmp_path}/data/**'), tmp_path) == expected
    monkeypatch.chdir(tmp_path / 'data')
    assert find('**/*.txt').paths == ['b.txt', 'deep/a.txt', 'other/c.txt']
    assert find('./**/deep/**/a.*').paths == ['./deep/a.txt']


def test_a_snapshot_of_hugging_face_consists_of_links(tmp_path):
    make(tmp_path, 'blobs/0a1b', 'blobs/2c3d')
    snapshot = tmp_path / 'snapshots' / 'main'
    snapshot.mkdir(parents=True)
    os.symlink('../../blobs/0a1b', snapshot / 'train-00000-of-00001.jsonl')
    os.symlink('../../blobs/2c3d', snapshot / 'train-00001-of-00001.jsonl')
    names = ['train-00000-of-00001.jsonl', 'train-00001-of-00001.jsonl']
    assert names_in(find(str(snapshot)), snapshot) == names
    found = find(str(tmp_path))
    assert names_in(found, snapshot) == names
    assert found.kind == 'JSON Lines'


def test_odd_names_are_escaped_where_they_are_shown(tmp_path):
    make(tmp_path, 'a\nb.jsonl', 'a.csv')
    with pytest.raises(UserError, match=r'CSV \(a.csv\) and JSON Lines \(a\\nb.jsonl\)'):
        find(f'{tmp_path}/*')
    make(tmp_path, 'c.txt')
    (tmp_path / 'a\nb.bin').write_bytes(b'\0')
    assert find(str(tmp_path)).skipped.examples['binary'] == f'{tmp_path}/a\\nb.bin'
