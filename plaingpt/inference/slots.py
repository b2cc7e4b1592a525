"""
Slots: the rows of a key-value cache in which texts of different lengths stand side by side, and
the beginnings that these texts share.

cache.py's rows begin and end together. Here each slot is filled at its own pace, and keeps its keys
and values after its text has ended, for the next text that begins like it.
"""
from dataclasses import dataclass, field

import torch

from plaingpt.inference.slot_attention import slot_decodes, slot_prefills
from plaingpt.system import large_pages
from plaingpt.system.messages import sentence_for, warn

SMALLEST_ROOM = 256  # positions of a slot, before texts need more


@dataclass(eq=False)
class Slot:
    """A row of the cache."""
    number: int
    tokens: list = field(default_factory=list)  # those whose keys and values are stored, in order
    in_use: bool = False
    last_use: int = 0  # what Slots counts up; the lowest was used longest ago


class Slots:
    """Keys and values of many texts.

    Each tensor is (slots, positions, n_kv_head, head size). Both numbers start small and double
    when texts need more, which copies the cache: its memory is that of the most texts at a time so
    far, each as long as the longest so far.

    max_slots: most slots; fewer from when memory is too short for more."""

    def __init__(self, config, max_slots, context_size, dtype, device):
        """config: the model's GPTConfig; max_slots, context_size: most slots, and positions."""
        self.config = config
        self.max_slots = max_slots
        self.context_size = context_size
        self.slots = []
        self.room = 0  # positions of each slot
        self._uses = 0
        # Positions that are not written yet hold zeros: on a GPU a mask hides them, but the
        # attention weight 0 times a NaN would still be NaN.
        nothing = torch.zeros(0, 0, config.n_kv_head, config.head_size, dtype=dtype, device=device)
        self.keys = [nothing] * config.n_layer
        self.values = [nothing] * config.n_layer

    # ---- which text stands where ----

    def take(self, prompt, most_shared):
        """A slot for a text with this prompt, or None while all are in use.

        Its tokens are the beginning of the prompt, at most `most_shared` of them, as far as some
        slot has them; they need not be read again."""
        source, shared = self.closest(prompt, most_shared)
        slot = self._free_slot(source, shared)
        if slot is None:
            return None
        if source is not None and slot is not source:
            for tensors in (self.keys, self.values):
                for tensor in tensors:
                    tensor[slot.number, :shared] = tensor[source.number, :shared]
        slot.tokens = list(prompt[:shared])
        slot.in_use = True
        self._touch(slot)
        return slot

    def release(self, slot):
        """Lets the next text take the slot; until then it keeps what it holds."""
        slot.in_use = False
        self._touch(slot)

    def forget(self, slot):
        """Drops what a slot holds, where it may not be finite."""
        slot.tokens = []
        for tensor in (*self.keys, *self.values):
            tensor[slot.number].zero_()

    def closest(self, prompt, most_shared):
        """The slot that has most of the first tokens of a prompt, and how many, at most so many.

        (None, 0) if no slot begins like it. Of slots that have as many, a free one is best."""
        best = None
        most = 0
        for slot in self.slots:
            shared = min(shared_beginning(prompt, slot.tokens), most_shared)
            is_free_instead = shared == most > 0 and best.in_use and not slot.in_use
            if shared > most or is_free_instead:
                best = slot
                most = shared
        return best, most

    def _free_slot(self, source, shared):
        """The free slot that a text takes which has its first tokens from `source`, or None."""
        free = [slot for slot in self.slots if not slot.in_use]
        # Staying in place saves a copy. If the text shares little of what the slot holds, it is
        # another conversation, which may be continued too: it keeps its slot while others are free.
        if source is not None and not source.in_use and 2 * shared >= len(source.tokens):
            return source
        empty = [slot for slot in free if not slot.tokens]
        if not empty and len(self.slots) < self.max_slots:
            empty = self._add_slots()
        if empty:
            return empty[0]
        return min(free, key=lambda slot: slot.last_use, default=None)

    def _touch(self, slot):
        self._uses += 1
        slot.last_use = self._uses

    # ---- memory ----

    def make_room(self, positions):
        """Gives each slot room for so many positions, at most context_size."""
        if positions <= self.room:
            return
        room = max(self.room, SMALLEST_ROOM)
        while room < positions:
            room *= 2
        room = min(room, self.context_size)
        self._resize(len(self.slots), room)
        self.room = room

    def _add_slots(self):
        """Doubles the number of slots; returns the new ones, none if memory is too short."""
        number = min(max(1, 2 * len(self.slots)), self.max_slots)
        try:
            self._resize(number, self.room)
        except Exception as error:
            if sentence_for(error) is None or not self.slots:
                raise
            self.max_slots = len(self.slots)
            warn(f'from now on, texts beyond {self.max_slots} at a time wait: '
                 f'{sentence_for(error)}')
            return []
        added = [Slot(number) for number in range(len(self.slots), number)]
        self.slots += added
        return added

    def _resize(self, slots, room):
        """Makes all tensors at least so large.

        One after another, so that there are never two of each. If memory ends on the way, some
        stay larger than they need be, and keep that size when the others grow."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                old_slots, old_room, *rest = tensor.shape
                if old_slots < slots or old_room < room:
                    shape = (max(old_slots, slots), max(old_room, room), *rest)
                    larger = large_pages.zeros(shape, tensor.dtype, tensor.device)
                    larger[:old_slots, :old_room] = tensor
                    tensors[layer] = larger

    @property
    def positions_in_use(self):
        return sum(len(slot.tokens) for slot in self.slots)

    @property
    def positions_in_all(self):
        return len(self.slots) * self.room

    # ---- reading tokens ----

    def caches(self, stretches):
        """For each block the cache of a pass that reads the tokens of these Stretches.

        Either all have one token, or all have several. The slots must have room for them."""
        make_caches = slot_decodes if stretches[0].is_single else slot_prefills
        return make_caches(self.config, self.keys, self.values, stretches)


def bytes_at_most(config, max_slots, context_size, dtype):
    """Bytes of the keys and values once all slots are in use, one of them up to its end.

    While the cache grows, it takes one layer's tensor more. The arguments as for Slots."""
    numbers = 2 * config.n_layer * config.n_kv_head * config.head_size  # of a position
    return max_slots * context_size * numbers * dtype.itemsize


def shared_beginning(tokens, others):
    """How many tokens two sequences begin with in common; one may be a tuple and one a list."""
    length = min(len(tokens), len(others))
    for begin in range(0, length, 64):  # comparing slices is faster than one by one
        end = min(begin + 64, length)
        if tuple(tokens[begin:end]) != tuple(others[begin:end]):
            while tokens[begin] == others[begin]:
                begin += 1
            return begin
    return length
