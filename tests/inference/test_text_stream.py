"""Text from ids as they arrive: stops, half characters, and which tokens make up the text."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaingpt.inference.text_stream import TextStream


class PieceTokenizer:
    """Tokens are these byte strings; like tiktoken's, they may end within a character."""

    def __init__(self, *pieces):
        self.pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]

    def decode(self, ids):
        return b''.join(self.pieces[id] for id in ids).decode('utf-8', errors='replace')

    def decoder(self):
        import codecs
        utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda ids: utf8.decode(b''.join(self.pieces[id] for id in ids))


def stream_of(*pieces, stops=()):
    """A TextStream whose ids 0, 1, … are these pieces."""
    return TextStream(PieceTokenizer(*pieces), stops)


def pushed(*pieces, stops=()):
    """(texts, stream) of pushing these pieces up to a stop; the last text is the rest."""
    stream = stream_of(*pieces, stops=stops)
    texts = []
    for id in range(len(pieces)):
        texts.append(stream.push(id))
        if stream.has_stopped:
            break
    texts.append(stream.finish())
    return texts, stream


def test_without_stops_text_is_ready_at_once():
    texts, stream = pushed('The', ' cat', '', ' sat')
    assert texts == ['The', ' cat', '', ' sat', '']
    assert stream.ready_tokens == 4


def test_half_a_character_waits_for_the_rest_of_it():
    euro = '€'.encode()
    stream = stream_of('a', euro[:1], euro[1:2], euro[2:] + b'b')
    found = []
    for id in range(4):
        found.append((stream.push(id), stream.ready_tokens))
    # The tokens of one character count once it is complete.
    assert found == [('a', 1), ('', 1), ('', 1), ('€b', 4)]


def test_an_unfinished_character_at_the_end_is_replaced():
    texts, stream = pushed('a', '€'.encode()[:2])
    assert texts == ['a', '', '\N{REPLACEMENT CHARACTER}']
    assert stream.ready_tokens == 2


@pytest.mark.parametrize('pieces, stops, expected, tokens', [
    (['one', ' END', ' two'], ['END'], 'one ', 2),       # the cut is within a token
    (['one', 'E', 'N', 'D', 'two'], ['END'], 'one', 1),  # the stop consists of tokens
    (['oneE', 'N', 'Dtwo'], ['END'], 'one', 1),
    (['END'], ['END'], '', 0),
    (['a', 'b', 'abac'], ['abac', 'zz'], 'ab', 2),
    (['xyz'], ['z', 'yz'], 'x', 1),                      # the first one counts
    (['EN', 'EN', 'D'], ['END'], 'EN', 1),               # what looked like a beginning was none
    (['a', '€'.encode()[:1], '€'.encode()[1:], 'b'], ['€'], 'a', 1),
])
def test_text_ends_before_the_first_stop(pieces, stops, expected, tokens):
    texts, stream = pushed(*pieces, stops=stops)
    assert ''.join(texts) == expected
    assert stream.has_stopped
    assert stream.ready_tokens == tokens
    assert stream.finish() == ''


def test_only_what_may_begin_a_stop_is_held_back():
    texts, stream = pushed('a', 'bE', 'N', 'c', 'E', stops=['END', 'xyz'])
    assert texts == ['a', 'b', '', 'ENc', '', 'E']
    assert not stream.has_stopped


def test_tokens_count_once_their_text_was_returned():
    stream = stream_of('aE', 'N', 'x', stops=['END'])
    assert (stream.push(0), stream.ready_tokens) == ('a', 0)  # its E is held back
    assert (stream.push(1), stream.ready_tokens) == ('', 0)
    assert (stream.push(2), stream.ready_tokens) == ('ENx', 3)


@given(st.lists(st.sampled_from(['a', 'b', 'ab', 'ba', 'aab', 'é'.encode()[:1],
                                 'é'.encode()[1:]]), max_size=12),
       st.lists(st.text('abé', min_size=1, max_size=4), max_size=3))
def test_pieces_are_what_cutting_the_whole_text_gives(pieces, stops):
    texts, stream = pushed(*pieces, stops=stops)
    whole = PieceTokenizer(*pieces).decode(range(len(pieces)))
    begins = [whole.find(stop) for stop in stops if stop in whole]
    cut = min(begins, default=len(whole))
    text = ''.join(texts)
    if stream.has_stopped:
        # At the first token with a stop: one that begins earlier may have been unfinished then.
        assert whole.startswith(text)
        assert any(whole[len(text):].startswith(stop) for stop in stops)
        assert len(text) >= cut
    else:
        assert text == whole
        assert not begins
        assert stream.ready_tokens == len(pieces)
