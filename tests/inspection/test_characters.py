"""Tests of what kinds of characters there are."""
import pytest

from plaingpt.inspection.characters import (FIRST_ODD, FIRST_SCRIPT, MOJIBAKE_PATTERN, ODD,
                                            SCRIPT_NAMES, class_table)


def script_of(char):
    number = int(class_table()[ord(char)]) - FIRST_SCRIPT
    return SCRIPT_NAMES[number] if 0 <= number < len(SCRIPT_NAMES) else None


def odd_kind_of(char):
    number = int(class_table()[ord(char)]) - FIRST_ODD
    return list(ODD)[number] if number >= 0 else None


@pytest.mark.parametrize('script, letters', [
    ('Latin', 'aZéßộ'), ('Greek', 'αΩ'), ('Cyrillic', 'яЖѣ'), ('Hebrew', 'א'),
    ('Arabic', 'بپ'), ('Devanagari', 'क'), ('Thai', 'ก'), ('Hangul', '한'), ('kana', 'あカ'),
    ('Han', '狐𠀀'), ('Georgian', 'ა'), ('other', 'ꓐ')])
def test_letters_have_a_script(script, letters):
    assert [script_of(letter) for letter in letters] == [script] * len(letters)


def test_digits_spaces_and_signs_have_neither_script_nor_oddity():
    for char in '0 \t\n\r.,;“—€🦊\u200d\u200e':
        assert script_of(char) is None and odd_kind_of(char) is None


@pytest.mark.parametrize('kind, chars', [
    ('control characters', '\0\x08\x0b\x1b\x7f\x85'), ('replacement characters', '\ufffd'),
    ('private use', '\ue000\uf8ff\U000f0000'), ('zero-width spaces', '\u200b'),
    ('bidirectional controls', '\u202e\u2066'), ('byte order marks inside', '\ufeff'),
    ('surrogates', '\ud800\udfff')])
def test_odd_characters(kind, chars):
    assert [odd_kind_of(char) for char in chars] == [kind] * len(chars)


@pytest.mark.parametrize('text', ['é', 'ü', 'ß', '’', '“quoted”', '—', '…', 'и', 'я', '\u00a0',
                                  '\ufffd', '\ufeff'])
def test_mojibake_of_each_wrong_encoding_is_found(text):
    assert MOJIBAKE_PATTERN.search(text.encode('utf-8').decode('latin-1'))
    as_windows = text.encode('utf-8').decode('cp1252', errors='replace')
    if '\ufffd' not in as_windows:  # some bytes have no character in Windows-1252
        assert MOJIBAKE_PATTERN.search(as_windows)


@pytest.mark.parametrize('text', [
    'Là\u00a0», dit-il, l’été à Paris…', 'NÃO É ASSIM, A MANHÃ', 'El Niño — ESPAÑA', 'ÂGE d’or',
    'Það er gott', 'Il a «\u00a0compris\u00a0»', '“Übung”', 'naïve café', 'Привет', '狐狸', 'x²'])
def test_text_in_order_is_no_mojibake(text):
    assert not MOJIBAKE_PATTERN.search(text)
