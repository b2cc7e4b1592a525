"""Attention of tokens in slots of different lengths, one by one and padded."""
import pytest
import torch
from conftest import tiny_gpt

from plaingpt.inference.slot_attention import PaddedSlotDecode, Rows, SlotDecode, Stretch


@pytest.mark.parametrize('changes', [
    dict(), dict(n_kv_head=2), dict(position='alibi'), dict(position='alibi', n_kv_head=2),
    dict(n_head=1),
])
def test_attention_of_rows_is_the_same_with_padding_and_one_by_one(changes):
    config = tiny_gpt(**{'n_head': 4, 'n_embd': 32, **changes}).config
    generator = torch.Generator().manual_seed(0)
    shape = (5, 100, config.n_kv_head, config.head_size)
    keys = torch.randn(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    singles = [Stretch(3, 0, 1), Stretch(0, 70, 71), Stretch(4, 99, 100), Stretch(1, 12, 13)]
    rows = Rows(singles, keys.device)
    q = torch.randn(4, config.n_head, 1, config.head_size, generator=generator)

    found = {}
    for kind in (SlotDecode, PaddedSlotDecode):
        found[kind] = kind(keys, values, rows, kind.mask_for(config, rows)).attention(q, None, None)

    # Written out, row by row.
    heads = torch.arange(1, config.n_head + 1)
    slopes = 2 ** (-8 / config.n_head * heads)[:, None]
    for row, stretch in enumerate(singles):
        k = keys[stretch.slot, :stretch.end].repeat_interleave(
            config.n_head // config.n_kv_head, dim=1)  # (end, nh, hs)
        v = values[stretch.slot, :stretch.end].repeat_interleave(
            config.n_head // config.n_kv_head, dim=1)
        scores = torch.einsum('hc,phc->hp', q[row, :, 0], k) / config.head_size ** 0.5
        if config.position == 'alibi':
            scores -= slopes * (stretch.begin - torch.arange(stretch.end))
        expected = torch.einsum('hp,phc->hc', scores.softmax(dim=-1), v)
        for kind, y in found.items():
            torch.testing.assert_close(y[row, :, 0], expected, msg=lambda text, kind=kind: (
                f'{kind.__name__}: {text}'))
