"""plaingpt/inference/cache.py: what the cache of a block stores and returns."""
import torch
from conftest import TINY_GPT

from model import GPTConfig
from plaingpt.inference.cache import KVCache

CONFIG = GPTConfig(**TINY_GPT, n_kv_head=1)  # two blocks, a head size of 8


def empty_cache(rows, positions, dtype=torch.float32):
    return KVCache(CONFIG, rows, positions, dtype, torch.device('cpu'))


def random_keys_and_values(rows, positions, dtype=torch.float32):
    keys = torch.randn(rows, positions, 1, 8, dtype=dtype)
    values = torch.randn(rows, positions, 1, 8, dtype=dtype)
    return keys, values


def test_each_block_has_a_cache_of_its_own():
    cache = empty_cache(rows=1, positions=3)
    caches = cache.prefill(torch.tensor([[0]]), torch.arange(3))
    assert len(caches) == CONFIG.n_layer == 2
    keys, values = random_keys_and_values(1, 3)
    caches[1].update(keys, values)
    assert torch.equal(cache.keys[1], keys)
    assert torch.equal(cache.values[1], values)
    assert not cache.keys[0].any()
    assert not cache.values[0].any()


def test_prefill_stores_each_prompt_for_all_its_samples_and_leaves_other_rows_alone():
    cache = empty_cache(rows=5, positions=4)
    rows = torch.tensor([[0, 1], [3, 4]])
    block = cache.prefill(rows, torch.arange(3))[0]
    keys, values = random_keys_and_values(2, 3)
    returned_keys, returned_values = block.update(keys, values)
    # The prompts attend to themselves alone, so they get their own keys and values back.
    assert not block.decoding
    assert returned_keys is keys
    assert returned_values is values
    for prompt, samples in enumerate(rows.tolist()):
        for row in samples:
            assert torch.equal(cache.keys[0][row, :3], keys[prompt])
            assert torch.equal(cache.values[0][row, :3], values[prompt])
    assert not cache.keys[0][2].any()
    assert not cache.keys[0][:, 3].any()


def test_decode_stores_one_position_of_each_row_and_returns_the_visible_ones():
    cache = empty_cache(rows=2, positions=6)
    keys, values = random_keys_and_values(2, 4)
    cache.prefill(torch.tensor([[0], [1]]), torch.arange(4))[0].update(keys, values)
    # The first row has two tokens, and its padding behind them is written over.
    block = cache.decode(torch.tensor([[2], [4]]), visible=5, hides_some=True)[0]
    new_keys, new_values = random_keys_and_values(2, 1)
    returned_keys, returned_values = block.update(new_keys, new_values)
    assert block.decoding
    assert block.visible == returned_keys.size(1) == returned_values.size(1) == 5
    assert torch.equal(returned_keys[0, :2], keys[0, :2])
    assert torch.equal(returned_keys[0, 2], new_keys[0, 0])
    assert torch.equal(returned_keys[1, :4], keys[1])
    assert torch.equal(returned_keys[1, 4], new_keys[1, 0])
    assert torch.equal(returned_values[0, 2], new_values[0, 0])
    assert torch.equal(returned_values[1, 4], new_values[1, 0])


def test_a_float32_cache_takes_the_keys_of_a_bfloat16_model():
    cache = empty_cache(rows=1, positions=3)
    keys, values = random_keys_and_values(1, 2, torch.bfloat16)
    returned_keys, _ = cache.prefill(torch.tensor([[0]]), torch.arange(2))[0].update(keys, values)
    assert returned_keys.dtype == torch.bfloat16
    new_keys, new_values = random_keys_and_values(1, 1, torch.bfloat16)
    block = cache.decode(torch.tensor([[2]]), visible=3, hides_some=False)[0]
    returned_keys, returned_values = block.update(new_keys, new_values)
    assert returned_keys.dtype == returned_values.dtype == torch.float32
    assert torch.equal(returned_keys, torch.cat([keys, new_keys], dim=1).float())
    assert torch.equal(returned_values, torch.cat([values, new_values], dim=1).float())
