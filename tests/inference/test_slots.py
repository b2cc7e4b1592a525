"""Slots of the key-value cache: which text takes which, what they share, and their memory."""
import contextlib

import pytest
import torch
from conftest import tiny_gpt

from plaingpt.inference import slots as slots_module
from plaingpt.inference.slots import Slots, bytes_at_most, shared_beginning
from plaingpt.system import large_pages

CONFIG = tiny_gpt().config
CPU = torch.device('cpu')
NO_LIMIT = 10 ** 9


def make_slots(max_slots=3, context_size=64, config=CONFIG):
    return Slots(config, max_slots, context_size, torch.float32, CPU)


def fill(slots, slot, tokens):
    """Gives a slot these tokens, with keys and values that tell them apart."""
    slot.tokens = list(tokens)
    slots.make_room(len(tokens))
    for number, tensor in enumerate((*slots.keys, *slots.values)):
        tensor[slot.number, :len(tokens)] = torch.tensor(tokens)[:, None, None] + 1000.0 * number


def take(slots, tokens, most_shared=NO_LIMIT):
    """(slot, tokens that it had already) for a text with these tokens, which it then holds."""
    slot = slots.take(tuple(tokens), most_shared)
    shared = len(slot.tokens)
    assert slot.tokens == tokens[:shared]
    kept = list(range(shared))
    for number, tensor in enumerate((*slots.keys, *slots.values)):
        expected = torch.tensor(tokens)[kept] + 1000.0 * number
        assert torch.equal(tensor[slot.number, kept, 0, 0], expected)
    fill(slots, slot, tokens)
    return slot, shared


def test_a_slot_is_free_again_after_its_release():
    slots = make_slots(max_slots=2)
    first, _ = take(slots, [1, 2])
    second, _ = take(slots, [3, 4])
    assert first is not second
    assert slots.take((5, 6), NO_LIMIT) is None
    slots.release(first)
    assert slots.take((5, 6), NO_LIMIT) is first


def test_a_text_that_continues_another_takes_its_slot():
    slots = make_slots()
    first, _ = take(slots, [1, 2, 3])
    other, _ = take(slots, [9, 8, 7])
    slots.release(first)
    slots.release(other)
    assert take(slots, [9, 8, 7, 6]) == (other, 3)
    assert take(slots, [1, 2, 3, 4, 5]) == (first, 3)


def test_a_beginning_is_copied_from_a_slot_in_use():
    slots = make_slots()
    first, _ = take(slots, [1, 2, 3, 4])
    second, shared = take(slots, [1, 2, 3, 9])
    assert second is not first
    assert shared == 3
    assert first.tokens == [1, 2, 3, 4]


def test_no_more_is_shared_than_asked_for():
    slots = make_slots()
    take(slots, [1, 2, 3, 4])
    assert take(slots, [1, 2, 3, 4], most_shared=3)[1] == 3
    assert take(slots, [1, 2, 3, 4], most_shared=0)[1] == 0


def test_another_conversation_with_the_same_first_words_keeps_its_slot_while_others_are_free():
    slots = make_slots(max_slots=2)
    talk = list(range(20))
    first, _ = take(slots, talk)
    slots.release(first)
    other = [0, 1, 2, 99, 98]
    second, shared = take(slots, other)
    assert second is not first
    assert shared == 3
    assert first.tokens == talk
    # With half of it in common, the text is rather the same one, with another end.
    assert take(slots, talk[:10] + [50])[0] is first


def test_the_slot_used_longest_ago_is_taken_when_none_is_empty():
    slots = make_slots(max_slots=3)
    used = [take(slots, [10 * number, 1])[0] for number in (1, 2, 3)]
    for number in (1, 0, 2):
        slots.release(used[number])
    assert take(slots, [77])[0] is used[1]
    assert take(slots, [78])[0] is used[0]


def test_memory_grows_with_texts_and_keeps_what_it_holds(monkeypatch):
    monkeypatch.setattr(slots_module, 'SMALLEST_ROOM', 8)
    slots = make_slots(max_slots=5, context_size=50)
    assert slots.positions_in_all == 0
    sizes = []
    for number in range(5):
        take(slots, [number])
        sizes.append(len(slots.slots))
    assert sizes == [1, 2, 4, 4, 5]
    assert slots.room == 8
    assert slots.positions_in_use == 5

    rooms = []
    for positions in (3, 9, 17, 40, 50):
        slots.make_room(positions)
        rooms.append(slots.room)
    assert rooms == [8, 16, 32, 50, 50]
    assert slots.positions_in_all == 5 * 50
    for number in range(5):
        assert slots.values[1][number, 0, 0, 0] == number + 3000


# ---- memory that is short ----

@pytest.fixture
def memory_is_short(monkeypatch):
    """A context in which so many tensors can be made, and then no more."""
    zeros = large_pages.zeros

    @contextlib.contextmanager
    def after(tensors):
        made = []

        def limited(shape, dtype, device):
            if len(made) == tensors:
                raise torch.OutOfMemoryError
            made.append(shape)
            return zeros(shape, dtype, device)

        with monkeypatch.context() as patched:
            patched.setattr(large_pages, 'zeros', limited)
            yield
        assert len(made) == tensors

    return after


@pytest.mark.parametrize('tensors', [0, 2])
def test_texts_wait_where_memory_is_too_short_for_more_slots(memory_is_short, capsys, tensors):
    slots = make_slots()
    first, _ = take(slots, [1, 2, 3])
    with memory_is_short(tensors):
        assert slots.take((7, 8), NO_LIMIT) is None
        assert slots.take((7, 8), NO_LIMIT) is None
    assert slots.max_slots == 1
    assert capsys.readouterr().err.count('warning: from now on, texts beyond 1 at a time wait') == 1
    slots.release(first)
    assert take(slots, [1, 2, 3, 4]) == (first, 3)


def test_a_free_slot_is_used_where_memory_is_too_short_for_more(memory_is_short):
    slots = make_slots()
    first, _ = take(slots, [1, 2, 3])
    slots.release(first)
    with memory_is_short(1):
        assert slots.take((7, 8), NO_LIMIT) is first


def test_room_that_was_made_for_some_layers_only_can_be_made_for_all(memory_is_short):
    slots = make_slots(context_size=1000)
    first, _ = take(slots, [1, 2, 3])
    with memory_is_short(3), pytest.raises(torch.OutOfMemoryError):
        slots.make_room(300)  # of four tensors, three get it
    take(slots, [7, 8, 9])  # another slot, with the room that all have
    slots.release(first)
    assert take(slots, [1, 2, 3, 4]) == (first, 3)
    slots.make_room(300)
    slots.release(first)
    assert take(slots, [1, 2, 3, 4, *range(300)]) == (first, 4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('changes', [dict(), dict(n_head=4, n_kv_head=2, n_embd=64, n_layer=3)])
def test_bytes_at_most_are_those_of_a_full_cache(changes, dtype):
    config = tiny_gpt(**changes).config
    slots = Slots(config, 3, 700, dtype, CPU)
    for number in range(3):
        slots.take((number,), NO_LIMIT)
    slots.make_room(700)
    total = sum(tensor.nbytes for tensor in (*slots.keys, *slots.values))
    assert total == bytes_at_most(config, 3, 700, dtype)


def test_a_forgotten_slot_holds_nothing():
    slots = make_slots()
    slot, _ = take(slots, [1, 2])
    slots.keys[0][slot.number] = torch.nan
    slots.forget(slot)
    assert slot.tokens == []
    for tensor in (*slots.keys, *slots.values):
        assert not tensor[slot.number].any()


@pytest.mark.parametrize('length', [0, 1, 63, 64, 65, 200])
def test_shared_beginnings(length):
    tokens = list(range(length))
    assert shared_beginning(tokens, tuple(tokens)) == length
    assert shared_beginning(tokens + [1], tokens + [2, 3]) == length
    assert shared_beginning(tokens, tokens + [2]) == length
