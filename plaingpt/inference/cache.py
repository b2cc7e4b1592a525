"""
The key-value cache: the keys and values of all positions so far, so that each new token needs the
forward pass of one position only.

For a forward pass the cache gives each block an object of its own. Attention calls its update(),
which stores the keys and values of the pass and returns those that its queries attend to. Where one
new position attends to the cache, the object also computes the attention.
"""
import math

import torch
from torch.nn import functional as F

from model import alibi_bias
from plaingpt.inference import decoding_kernels
from plaingpt.system import large_pages


class KVCache:
    """Keys and values of every block, for the rows of a batch.

    Each tensor is (rows, positions, n_kv_head, head size)."""

    def __init__(self, config, rows, positions, dtype, device):
        """config: the model's GPTConfig; rows, positions: how many the cache has room for."""
        self.config = config
        shape = (rows, positions, config.n_kv_head, config.head_size)
        # Positions that are not written yet hold zeros: a mask hides them, but the attention
        # weight 0 times a NaN would still be NaN.
        self.keys = []
        self.values = []
        for _ in range(config.n_layer):
            self.keys.append(large_pages.zeros(shape, dtype, device))
            self.values.append(large_pages.zeros(shape, dtype, device))
        self.rows = torch.arange(rows, device=device)[:, None]  # (rows, 1)

    def prefill(self, rows, positions):
        """For each block a Prefill; rows and positions as there."""
        return [Prefill(keys, values, rows, positions)
                for keys, values in zip(self.keys, self.values, strict=True)]

    def decode(self, positions, visible, hides_some):
        """For each block a Decode of all rows; positions and visible as there.

        hides_some: whether rows may lack some of the visible positions."""
        # One mask, in the precision of the cache, serves all blocks.
        mask = None
        if self.config.position == 'alibi':
            mask = alibi_bias(self.config, positions, visible)
        elif hides_some:
            mask = causal_mask(positions, visible)
        if mask is not None:
            mask = mask.to(self.keys[0].dtype)
        return [Decode(keys, values, self.rows, positions, visible, mask)
                for keys, values in zip(self.keys, self.values, strict=True)]

    def decode_in_cpp(self, positions):
        """As decode(), where has_cpp_attention(): each row sees what it has, and no more."""
        slopes = alibi_slopes(self.config) if self.config.position == 'alibi' else None
        return [DecodeInCpp(keys, values, self.rows, positions, slopes)
                for keys, values in zip(self.keys, self.values, strict=True)]


class Prefill:
    """One block's cache while it reads prompts, which attend to themselves alone.

    rows: int64 (R, samples), the rows of the cache in which each of R prompts is stored, once for
    each sample that will continue it. positions: int64 (T,)."""
    decoding = False

    def __init__(self, keys, values, rows, positions):
        self.keys = keys
        self.values = values
        self.rows = rows[:, :, None]  # (R, samples, 1)
        self.positions = positions

    def update(self, k, v):
        """Stores k and v, (R, T, n_kv_head, hs), and returns them."""
        self.keys[self.rows, self.positions] = k[:, None].to(self.keys.dtype)
        self.values[self.rows, self.positions] = v[:, None].to(self.values.dtype)
        return k, v


class Decode:
    """One block's cache while every row reads one new token, which attends to all before it.

    rows: int64 (rows, 1), the numbers of all rows.
    positions: int64 (rows, 1), where the token of each row stands.
    visible: how many positions from the first on are returned.
    mask: added to the scores, (rows, 1 or nh, 1, visible): -inf for positions that a row does not
    have yet; None: it has all."""
    decoding = True

    def __init__(self, keys, values, rows, positions, visible, mask):
        self.keys = keys
        self.values = values
        self.rows = rows
        self.positions = positions
        self.visible = visible
        self.mask = mask

    def update(self, k, v):
        """Stores k and v, (rows, 1, n_kv_head, hs); returns (rows, visible, n_kv_head, hs) each."""
        self.keys[self.rows, self.positions] = k.to(self.keys.dtype)
        self.values[self.rows, self.positions] = v.to(self.values.dtype)
        return self.keys[:, :self.visible], self.values[:, :self.visible]

    def attention(self, q, k, v):
        """Attention of q, (rows, nh, 1, hs), to k and v, (rows, nkv, visible, hs); as q's shape."""
        return attend(q.to(k.dtype), k, v, self.mask)


def attend(q, k, v, mask):
    """Attention of one position, q (R, nh, 1, hs), to k and v, (R, nkv, visible, hs); as q's shape.

    mask: added to the scores, (R, 1 or nh, 1, visible), or None."""
    R, nh, _, hs = q.shape
    nkv = k.size(1)
    # Queries that share a head of keys become positions of one head, so grouped heads need no
    # kernel of their own.
    q = q.reshape(R, nkv, nh // nkv, hs)
    if mask is not None and mask.size(1) == nh:
        mask = mask.reshape(R, nkv, nh // nkv, -1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.reshape(R, nh, 1, hs)


class DecodeInCpp:
    """Decode on a CPU, by decoding_kernels.attention().

    keys, values: float32 (slots, positions, n_kv_head, hs).
    slots, positions: int64 (rows, 1), where the new key and value of each row stand.
    slopes: ALiBi's, (nh,), or None."""
    decoding = True

    def __init__(self, keys, values, slots, positions, slopes):
        self.keys = keys
        self.values = values
        self.slots = slots
        self.positions = positions
        self.slopes = slopes

    def update(self, k, v):
        """Returns k and v, (rows, 1, n_kv_head, hs): attention() stores them."""
        return k, v

    def attention(self, q, k, v):
        """As Decode.attention(), but k and v are those of the new position, (rows, nkv, 1, hs)."""
        return decoding_kernels.attention(q.float(), k.float(), v.float(), self.keys, self.values,
                                          self.slots, self.positions, self.slopes)


def has_cpp_attention(device):
    """Whether the C++ of decoding_kernels computes attention on a torch.device."""
    return device.type == 'cpu' and decoding_kernels.library() is not None


def alibi_slopes(config):
    """By how much ALiBi lowers the scores of each head for a distance of 1, float32 (nh,)."""
    position = torch.ones(1, 1, dtype=torch.int64)
    bias_of_the_one_before = alibi_bias(config, position, visible=1)  # (1, nh, 1, 1)
    return -bias_of_the_one_before.flatten()


def causal_mask(positions, visible):
    """What is added to the scores of the first `visible` positions, (rows, 1, 1, visible).

    0 for those that queries at these positions see, -inf for later ones."""
    is_later = torch.arange(visible, device=positions.device) > positions[..., None]
    return torch.where(is_later[:, None], -math.inf, 0.0)
