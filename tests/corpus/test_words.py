"""Tests of which characters make words."""
import subprocess
import sys

from conftest import ROOT

from plaingpt.corpus.words import IN_WORD, WORD, code_points, word_table


def test_words_are_letters_with_their_marks_and_each_han_character():
    def kinds(text):
        return word_table()[code_points(text)].tolist()
    assert kinds('a_1é') == [IN_WORD] * 4
    assert kinds('की') == [IN_WORD] * 2  # the vowel is a mark
    assert kinds('狐狸กา') == [WORD] * 4
    assert kinds(' .-🦊') == [0] * 4


def test_code_points_also_of_halves_of_characters():
    assert code_points('a\ud800𠀀').tolist() == [0x61, 0xD800, 0x20000]


def test_a_corpus_is_prepared_without_the_modules_that_inspect_it():
    program = ('import sys\n'
               'from plaingpt.corpus import duplicates, preparation, readers, vocabulary\n'
               'sys.exit("plaingpt.inspection" in sys.modules)')
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT).returncode == 0
