"""
The key-value cache: the keys and values of all positions so far, so that each new token needs the
forward pass of one position only.

For a forward pass the cache gives each block an object of its own. Attention calls its update(),
which stores the keys and values of the pass and returns those that its queries attend to.
"""
import torch


class KVCache:
    """Keys and values of every block, for the rows of a batch.

    Each tensor is (rows, positions, n_kv_head, head size)."""

    def __init__(self, config, rows, positions, dtype, device):
        """config: the model's GPTConfig; rows, positions: how many the cache has room for."""
        shape = (rows, positions, config.n_kv_head, config.head_size)
        # Positions that are not written yet hold zeros: a mask hides them, but the attention
        # weight 0 times a NaN would still be NaN.
        self.keys = []
        self.values = []
        for _ in range(config.n_layer):
            self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
            self.values.append(torch.zeros(shape, dtype=dtype, device=device))
        self.rows = torch.arange(rows, device=device)[:, None]  # (rows, 1)

    def prefill(self, rows, positions):
        """For each block a Prefill; rows and positions as there."""
        return [Prefill(keys, values, rows, positions)
                for keys, values in zip(self.keys, self.values, strict=True)]

    def decode(self, positions, visible, hides_some):
        """For each block a Decode of all rows; the arguments as there."""
        return [Decode(keys, values, self.rows, positions, visible, hides_some)
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
    hides_some: whether a mask must hide some of these, which a row does not have yet."""
    decoding = True

    def __init__(self, keys, values, rows, positions, visible, hides_some):
        self.keys = keys
        self.values = values
        self.rows = rows
        self.positions = positions
        self.visible = visible
        self.hides_some = hides_some

    def update(self, k, v):
        """Stores k and v, (rows, 1, n_kv_head, hs); returns (rows, visible, n_kv_head, hs) each."""
        self.keys[self.rows, self.positions] = k.to(self.keys.dtype)
        self.values[self.rows, self.positions] = v.to(self.values.dtype)
        return self.keys[:, :self.visible], self.values[:, :self.visible]
