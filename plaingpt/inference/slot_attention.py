"""
Attention in a pass that reads tokens of many texts at a time, each text in its slot of the
key-value cache: one token of each while they are written, or stretches of their prompts.

As in cache.py, each block has an object of its own for the pass, which stores the new keys and
values. Here it also computes all attention. slots.py decides which text stands in which slot.
"""
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from model import alibi_bias, round_up
from plaingpt.inference.cache import (DecodeInCpp, alibi_slopes, attend, causal_mask,
                                      has_cpp_attention)

LENGTH_MULTIPLE = 64  # a GPU sees a multiple of it, so that its allocator meets few sizes


@dataclass(frozen=True)
class Stretch:
    """The tokens of a slot that a pass reads: those at positions begin to end - 1."""
    slot: int
    begin: int
    end: int

    @property
    def size(self):
        return self.end - self.begin

    @property
    def is_single(self):
        return self.size == 1


def slot_decodes(config, keys, values, stretches):
    """For each block a cache of a pass that reads these Stretches of one token.

    config: the model's GPTConfig. keys, values: a (slots, positions, n_kv_head, hs) for each
    block."""
    device = keys[0].device
    rows = Rows(stretches, device)
    if has_cpp_attention(device):
        slopes = alibi_slopes(config) if config.position == 'alibi' else None
        return [DecodeInCpp(keys_of_block, values_of_block, rows.slots, rows.positions, slopes)
                for keys_of_block, values_of_block in zip(keys, values, strict=True)]
    decode_class = PaddedSlotDecode if device.type == 'cuda' else SlotDecode
    mask = decode_class.mask_for(config, rows)  # the same for all blocks
    return [decode_class(keys_of_block, values_of_block, rows, mask)
            for keys_of_block, values_of_block in zip(keys, values, strict=True)]


def slot_prefills(config, keys, values, stretches):
    """For each block a SlotPrefill of these Stretches; the arguments as for slot_decodes()."""
    rows = Rows(stretches, keys[0].device)
    masks = [mask_of_stretch(config, stretch, keys[0].device, keys[0].dtype)
             for stretch in stretches]
    return [SlotPrefill(keys_of_block, values_of_block, rows, masks)
            for keys_of_block, values_of_block in zip(keys, values, strict=True)]


class Rows:
    """Where the tokens of a pass stand, each a row of its own.

    stretches: in order. slots, positions: int64 (R,), of each token."""

    def __init__(self, stretches, device):
        self.stretches = stretches
        slots = []
        positions = []
        for stretch in stretches:
            slots += [stretch.slot] * stretch.size
            positions += range(stretch.begin, stretch.end)
        self.slots = torch.tensor(slots, device=device)
        self.positions = torch.tensor(positions, device=device)


class SlotPass:
    """One block's cache in a pass of R tokens that stand in slots.

    keys, values: (slots, positions, n_kv_head, hs). rows: the Rows. mask: what is added to the
    scores, as the subclass wants it."""
    decoding = True  # attention is computed here, not by the block

    def __init__(self, keys, values, rows, mask):
        self.keys = keys
        self.values = values
        self.rows = rows
        self.mask = mask

    def update(self, k, v):
        """Stores k and v, (R, 1, n_kv_head, hs), and returns them."""
        slots = self.rows.slots
        positions = self.rows.positions
        self.keys[slots, positions] = k[:, 0].to(self.keys.dtype)
        self.values[slots, positions] = v[:, 0].to(self.values.dtype)
        return k, v


class SlotDecode(SlotPass):
    """The SlotPass in which R texts read one token each, which attends to all of its slot so far.

    Each row is computed by itself: its bits depend on no other row. mask: from mask_for()."""

    @staticmethod
    def mask_for(config, rows):
        """What is added to the scores in all blocks: a (1, nh, 1, end) for each row, or None."""
        if config.position != 'alibi':
            return None
        biases = []
        for row, stretch in enumerate(rows.stretches):
            biases.append(alibi_bias(config, rows.positions[None, row:row + 1], stretch.end))
        return biases

    def attention(self, q, k, v):
        """Attention of q, (R, nh, 1, hs), to the slots, as q's shape.

        k and v: those of update(), (R, nkv, 1, hs); the slots hold them as well."""
        q = q.to(self.keys.dtype)
        parts = []
        for row, stretch in enumerate(self.rows.stretches):
            keys, values = held(self.keys, self.values, stretch)
            mask = None
            if self.mask is not None:
                mask = self.mask[row].to(q.dtype)
            parts.append(attend(q[row:row + 1], keys, values, mask))
        return torch.cat(parts)


class PaddedSlotDecode(SlotDecode):
    """The same on a GPU, where one kernel for all rows is faster than one for each.

    Rows are as long as the longest, and a mask hides what they lack."""

    @staticmethod
    def mask_for(config, rows):
        """What is added to the scores in all blocks, (R, 1 or nh, 1, visible)."""
        longest = max(stretch.end for stretch in rows.stretches)
        visible = round_up(longest, LENGTH_MULTIPLE)
        if config.position == 'alibi':
            return alibi_bias(config, rows.positions[:, None], visible)
        return causal_mask(rows.positions[:, None], visible)

    def attention(self, q, k, v):
        q = q.to(self.keys.dtype)
        visible = min(self.mask.size(-1), self.keys.size(1))
        keys = self.keys[:, :visible].index_select(0, self.rows.slots)
        values = self.values[:, :visible].index_select(0, self.rows.slots)
        mask = self.mask[..., :visible].to(q.dtype)
        return attend(q, keys.transpose(1, 2), values.transpose(1, 2), mask)


class SlotPrefill(SlotPass):
    """The SlotPass in which stretches of prompts are read.

    Each stretch attends to what its slot holds before it, and to itself. mask: a list, for each of
    them what mask_of_stretch() returns."""

    def attention(self, q, k, v):
        """Attention of q, (R, nh, 1, hs), to the slots, as q's shape; k and v as in SlotDecode."""
        q = q.to(self.keys.dtype)
        parts = []
        begin = 0
        for stretch, mask in zip(self.rows.stretches, self.mask, strict=True):
            end = begin + stretch.size
            keys, values = held(self.keys, self.values, stretch)
            q_of_stretch = q[begin:end].transpose(0, 2)  # (1, nh, T, hs)
            grouped = keys.size(1) < q.size(1)
            y = F.scaled_dot_product_attention(q_of_stretch, keys, values, attn_mask=mask,
                                               is_causal=mask is None, enable_gqa=grouped)
            parts.append(y.transpose(0, 2))  # (T, nh, 1, hs)
            begin = end
        return torch.cat(parts)


def mask_of_stretch(config, stretch, device, dtype):
    """What is added to the scores of a stretch of T tokens, (1, 1 or nh, T, end).

    None for the beginning of a text, which attention masks by itself."""
    positions = torch.arange(stretch.begin, stretch.end, device=device)[None]
    if config.position == 'alibi':
        return alibi_bias(config, positions, stretch.end).to(dtype)
    if stretch.begin == 0:
        return None
    return causal_mask(positions, stretch.end).to(dtype)


def held(keys, values, stretch):
    """Keys and values of a slot up to the end of a stretch, each (1, n_kv_head, end, hs)."""
    keys = keys[stretch.slot, :stretch.end].transpose(0, 1)
    values = values[stretch.slot, :stretch.end].transpose(0, 1)
    return keys[None], values[None]
