"""sample.py with LoRA adapters and LoRA runs, and the plain checkpoints that it makes of them."""
import json
import os
from dataclasses import asdict

import pytest
import torch
from conftest import refused, succeeded
from fine_tuning import add_adapter, save_gpt2, save_run
from generating import CHARS, SHAPE, TOKENIZER, lively_gpt, sample, samples

from plaingpt.formats import peft_adapter
from plaingpt.training import lora, starting_weights

TARGETS = 'c_attn,c_proj'


def save_base(folder, **changes):
    """Saves a run of a lively model in a folder."""
    gpt = lively_gpt(**SHAPE, **changes)
    return save_run(folder, gpt, config={'dataset': 'gone'}, tokenizer=TOKENIZER)


def save_gpt2_base(folder):
    """Saves a model of the same size as Hugging Face does."""
    save_gpt2(folder, std=0.5, n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=30)
    return str(folder)


def adapted(base):
    """(the GPT in a folder with a trained adapter, the adapter's LoraSettings)."""
    gpt, _ = starting_weights.open_base(str(base))
    settings = lora.LoraSettings(rank=2, alpha=20, dropout=0.1, targets=TARGETS, base=str(base),
                                 base_digest=lora.digest_of_base(gpt))
    add_adapter(gpt, settings.rank, settings.alpha, settings.dropout, settings.targets)
    return gpt.eval(), settings


# ---- the folder of an adapter ----

@pytest.fixture(params=[save_base, save_gpt2_base], ids=['run', 'gpt2'])
def base(request, tmp_path):
    """The folder of a model that is adapted."""
    request.param(tmp_path / 'base')
    return tmp_path / 'base'


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter of that model."""
    gpt, settings = adapted(base)
    peft_adapter.save_adapter(tmp_path / 'adapter', gpt, settings, TOKENIZER)
    return tmp_path / 'adapter'


def greedy_text(gpt, start):
    """The text that sample.py writes with the keys GREEDY."""
    idx = torch.tensor([[CHARS.index(char) for char in start]])
    ids = gpt.generate(idx, 40, temperature=0, vocab_size=len(CHARS), repetition_penalty=3)
    return ''.join(CHARS[i] for i in ids[0])


GREEDY = dict(temperature=0, num_samples=1, start='abc', dtype='float32', repetition_penalty=3)


def test_an_adapter_changes_the_text_and_so_does_the_model_it_is_merged_into(
        adapter, base, tmp_path):
    adapted_gpt, _ = adapted(base)
    plain_gpt, _ = starting_weights.open_base(str(base))
    expected = greedy_text(adapted_gpt, 'abc')
    assert expected != greedy_text(plain_gpt.eval(), 'abc')
    assert len(set(expected)) > 3
    assert samples(tmp_path, adapter=adapter, **GREEDY) == [expected]

    merged = tmp_path / 'merged'
    stdout = succeeded(sample(tmp_path, adapter=adapter, merge=merged))
    assert f'python sample.py --out_dir={merged}' in stdout
    assert samples(merged, **GREEDY) == [expected]
    assert samples(tmp_path, init_from=merged, **GREEDY) == [expected]

    checkpoint = torch.load(merged / 'ckpt.pt')
    assert checkpoint['model'].keys() == plain_gpt.state_dict().keys()
    assert checkpoint['iter_num'] == 0
    assert checkpoint['optimizer'] == {}
    assert checkpoint['tokenizer'] == TOKENIZER
    assert 'lora' not in checkpoint


def test_the_base_of_an_adapter_may_have_moved(adapter, base, tmp_path):
    found = samples(tmp_path, adapter=adapter)
    base.rename(tmp_path / 'moved')
    assert str(base) in refused(sample(tmp_path, adapter=adapter))
    assert samples(tmp_path, adapter=adapter, init_from=tmp_path / 'moved') == found


def test_an_adapter_of_other_weights_is_refused(adapter, tmp_path):
    other = save_base(tmp_path / 'other', bias=False)
    sentence = refused(sample(tmp_path, adapter=adapter, init_from=other))
    assert 'belongs to other weights than' in sentence
    assert other in sentence
    sentence = refused(sample(other, adapter=adapter, init_from='resume'))
    assert 'belongs to other weights than' in sentence


def test_an_adapter_that_names_no_base_needs_init_from(adapter, base, tmp_path):
    path = adapter / 'adapter_config.json'
    options = json.loads(path.read_text(encoding='utf-8'))
    options['base_model_name_or_path'] = None
    path.write_text(json.dumps(options), encoding='utf-8')
    sentence = refused(sample(tmp_path, adapter=adapter))
    assert 'does not name its base: give it with --init_from' in sentence
    samples(tmp_path, adapter=adapter, init_from=base)


def test_a_damaged_adapter_is_refused(adapter, tmp_path):
    (adapter / 'adapter_config.json').write_text('{', encoding='utf-8')
    sentence = refused(sample(tmp_path, adapter=adapter))
    assert 'is not the folder of a LoRA adapter that can be used' in sentence


# ---- a LoRA run ----

@pytest.fixture
def lora_run(tmp_path):
    """save(args, key=value) -> the folder of a LoRA run, as train.py leaves it.

    args: changes of its model_args; the others: changes of its settings. Its base and its adapter
    are in tmp_path, too."""
    save_base(tmp_path / 'base')
    gpt, settings = adapted(tmp_path / 'base')
    peft_adapter.save_adapter(tmp_path / 'adapter', gpt, settings)

    def save(args=None, **changes):
        save_run(tmp_path / 'run', gpt, model=lora.adapter_state(gpt), tokenizer=TOKENIZER,
                 lora=asdict(settings) | changes, model_args=asdict(gpt.config) | (args or {}))
        return tmp_path / 'run'

    return save


def test_a_lora_run_writes_the_text_of_its_adapter(lora_run, tmp_path):
    folder = lora_run()
    texts = samples(folder)
    assert texts == samples(tmp_path, init_from=folder)
    assert texts == samples(tmp_path, adapter=tmp_path / 'adapter')
    assert texts != samples(tmp_path / 'base')


def test_a_lora_run_can_be_merged_in_its_own_folder(lora_run, tmp_path):
    folder = lora_run()
    texts = samples(folder)
    merged = sample(folder, merge=folder)
    succeeded(merged)
    assert f'which is now in {folder}{os.sep}replaced' in merged.stderr
    assert samples(folder) == texts
    assert 'lora' not in torch.load(folder / 'ckpt.pt')
    # The merged model no longer needs its base, but the run that was moved aside does.
    (tmp_path / 'base' / 'ckpt.pt').unlink()
    assert samples(folder) == texts
    assert 'has neither the ckpt.pt' in refused(sample(folder / 'replaced' / '1'))


@pytest.mark.parametrize('changes, sentence', [
    (dict(rank=0), 'has rank=0'),
    (dict(rank=3), 'is (2, 8), expected (3, 8)'),
    (dict(alpha=None), 'has alpha=None'),
    (dict(targets='c_fc'), 'do not belong to this adapter'),
    (dict(targets='no'), "'no' is no layer"),
    (dict(base=None), 'has base=None'),
    (dict(base='gtp2'), 'gtp2 cannot be loaded'),
    (dict(base_digest='x'), 'belongs to other weights than'),
    (dict(args={'n_head': 2}), 'has another n_head than'),
    (dict(args={'block_size': 9}), 'block_size=9: this model takes at most 8 positions'),
])
def test_a_lora_run_with_wrong_settings_is_refused_by_its_name(lora_run, changes, sentence):
    folder = lora_run(**changes)
    refusal = refused(sample(folder))
    assert sentence in refusal
    assert str(folder) in refusal


# ---- a plain model ----

def test_a_plain_model_is_copied_to_a_checkpoint(tmp_path):
    out_dir = tmp_path / 'out'
    save_base(out_dir)
    copy = tmp_path / 'copy'
    succeeded(sample(out_dir, merge=copy))
    assert samples(copy) == samples(out_dir)
    before = torch.load(out_dir / 'ckpt.pt')
    after = torch.load(copy / 'ckpt.pt')
    assert set(before) == set(after)
    assert after['config'] == {'dataset': 'gone'}
    for name, tensor in after['model'].items():
        assert torch.equal(before['model'][name], tensor)


@pytest.mark.parametrize('name', ['last.pt', 'ckpt.pt'])
def test_a_model_is_read_from_a_single_file(tmp_path, name):
    save_base(tmp_path / 'out')
    expected = samples(tmp_path / 'out')
    path = tmp_path / name
    (tmp_path / 'out' / 'ckpt.pt').rename(path)
    assert samples(tmp_path / 'nowhere', init_from=path) == expected
