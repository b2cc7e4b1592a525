"""plaingpt/formats/peft_adapter.py: peft and we read each other's folders; bad ones are refused."""
import contextlib
import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import tiny_gpt, tiny_ids
from fine_tuning import ABC, A, add_adapter, logits, refusal, save_gpt2

from plaingpt.formats import peft_adapter
from plaingpt.formats.hugging_face import load_pretrained
from plaingpt.formats.peft_adapter import CONFIG, TENSORS
from plaingpt.system.messages import UserError
from plaingpt.training import lora

TARGETS = 'c_attn,mlp.c_proj,c_fc'
SETTINGS = lora.LoraSettings(3, 12, 0.0, TARGETS, 'base', 'x' * 64)


@pytest.fixture
def adapted(tmp_path):
    """(GPT with a trained adapter, folder of the adapter)."""
    gpt = add_adapter(tiny_gpt(), targets=TARGETS)
    settings = replace(SETTINGS, base_digest=lora.digest_of_base(tiny_gpt()))
    peft_adapter.save_adapter(tmp_path / 'adapter', gpt, settings, ABC)
    return gpt, tmp_path / 'adapter'


def change_config(folder, **options):
    path = folder / CONFIG
    changed = json.loads(path.read_text(encoding='utf-8')) | options
    path.write_text(json.dumps(changed), encoding='utf-8')


# ---- saving and loading ----

def test_an_adapter_is_saved_and_loaded(adapted):
    gpt, folder = adapted
    assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
    adapter = peft_adapter.load_adapter(str(folder))
    assert adapter.tokenizer == ABC
    assert adapter.folder == str(folder)
    digest = lora.digest_of_base(tiny_gpt())
    assert adapter.lora == lora.LoraSettings(3, 12, 0.0, 'c_attn,c_fc,mlp.c_proj', 'base', digest)
    fresh = tiny_gpt()
    lora.apply_adapter(fresh, adapter, 'it')
    assert torch.equal(logits(fresh, tiny_ids(2, 16)), logits(gpt, tiny_ids(2, 16)))
    options = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    assert options['target_modules'] == ['c_attn', 'c_fc', 'mlp.c_proj']
    assert options['fan_in_fan_out'] is True


def test_an_adapter_that_peft_has_saved_is_read(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    base = save_gpt2(tmp_path / 'gpt2')
    base.config._name_or_path = base.name_or_path = str(tmp_path / 'gpt2')
    theirs = get_peft_model(base, LoraConfig(
        r=2, lora_alpha=5, lora_dropout=0.1, target_modules=['attn.c_proj', 'c_fc'],
        init_lora_weights=False, fan_in_fan_out=True)).eval()
    theirs.save_pretrained(tmp_path / 'adapter')

    adapter = peft_adapter.load_adapter(str(tmp_path / 'adapter'))
    expected = lora.LoraSettings(2, 5, 0.1, 'attn.c_proj,c_fc', str(tmp_path / 'gpt2'))
    assert adapter.lora == expected
    assert adapter.tokenizer is None
    gpt = load_pretrained(str(tmp_path / 'gpt2')).eval()
    lora.apply_adapter(gpt, adapter, adapter.lora.base)
    assert 'does not hold the digest of its base' in capsys.readouterr().err
    assert torch.allclose(logits(gpt, tiny_ids(2, 16)), logits(theirs, tiny_ids(2, 16)), atol=1e-5)


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    gpt = add_adapter(tiny_gpt())
    lora.adapter_state(gpt)[A][0, 0] = torch.nan
    with pytest.raises(ValueError, match='not finite'):
        peft_adapter.save_adapter(tmp_path / 'new', gpt, SETTINGS)
    assert not (tmp_path / 'new').exists()


# A save writes each of two files, renames it, and syncs the folder: six operations.
@pytest.mark.parametrize('kill_at', range(1, 8))
def test_a_kill_while_saving_leaves_a_whole_adapter_or_one_that_is_refused(
        adapted, monkeypatch, kill_at):
    _, folder = adapted
    before = peft_adapter.load_adapter(str(folder))
    newer = add_adapter(tiny_gpt(seed=3), rank=2, alpha=40)
    settings = lora.LoraSettings(2, 40, 0.0, 'c_attn', 'base', 'x' * 64)
    operations = []

    def killing(operation):
        def wrapper(*arguments):
            operations.append(operation)
            if len(operations) == kill_at:
                raise KeyboardInterrupt
            return operation(*arguments)
        return wrapper

    monkeypatch.setattr(os, 'replace', killing(os.replace))
    monkeypatch.setattr(os, 'fsync', killing(os.fsync))
    with contextlib.suppress(KeyboardInterrupt):
        peft_adapter.save_adapter(folder, newer, settings)
    monkeypatch.undo()
    if kill_at <= 2:
        found = peft_adapter.load_adapter(str(folder))
        assert found.lora == before.lora
        assert_equal_states(found.state, before.state)
    elif kill_at <= 5:
        with pytest.raises(UserError, match='its two files come from different saves'):
            peft_adapter.load_adapter(str(folder))
    else:
        found = peft_adapter.load_adapter(str(folder))
        assert found.lora == settings
        assert_equal_states(found.state, lora.adapter_state(newer))
    peft_adapter.save_adapter(folder, newer, settings)  # removes what the kill left
    assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- refusals ----

def assert_refused(folder, sentence):
    with refusal() as error:
        peft_adapter.load_adapter(str(folder))
    assert sentence in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize('options, sentence', [
    ({'peft_type': 'IA3'}, "its peft_type is 'IA3', not 'LORA'"),
    ({'use_dora': True}, 'it has use_dora, but only plain LoRA'),
    ({'bias': 'all'}, 'it has bias, but'),
    ({'use_rslora': True, 'exclude_modules': 'x'}, 'it has exclude_modules, use_rslora, but'),
    ({'rank_pattern': {'c_fc': 4}}, 'it has rank_pattern, but'),
    ({'init_lora_weights': 'pissa'}, 'it has init_lora_weights, but'),
    ({'of_the_future': 1}, 'it has of_the_future, but'),
    ({'target_modules': 'all-linear'}, 'its target_modules is no list of names'),
    ({'target_modules': [3]}, 'its target_modules is no list of names'),
    ({'target_modules': []}, "has targets='', which no LoRA adapter can have"),
    ({'r': 0}, 'has rank=0'),
    ({'r': True}, 'has rank=True'),
    ({'r': 2.0}, 'has rank=2.0'),
    ({'r': 10 ** 12}, 'has rank=1000000000000'),
    ({'r': 4}, 'its two files come from different saves'),
    ({'lora_alpha': 13}, 'its two files come from different saves'),
    ({'target_modules': ['c_attn']}, 'its two files come from different saves'),
    ({'lora_alpha': 0}, 'has alpha=0'),
    ({'lora_alpha': float('nan')}, 'has alpha=nan'),
    ({'lora_alpha': '8'}, "has alpha='8'"),
    ({'lora_dropout': 1}, 'has dropout=1'),
    ({'base_model_name_or_path': 7}, 'has base=7'),
    ({'base_model_name_or_path': 'a\0b'}, 'has base='),
])
def test_settings_beyond_ours_are_refused_by_name(adapted, options, sentence):
    _, folder = adapted
    change_config(folder, **options)
    assert_refused(folder, sentence)


def rewrite_tensors(path, changes=None, **metadata):
    """Replaces some tensors of a safetensors file, and all of its metadata."""
    from safetensors.torch import load, save
    tensors = load(path.read_bytes()) | (changes or {})
    path.write_bytes(save(tensors, metadata))


@pytest.mark.parametrize('name', [CONFIG, TENSORS])
def test_a_folder_without_one_of_the_files_is_refused(adapted, name):
    _, folder = adapted
    (folder / name).unlink()
    assert_refused(folder, f'{name} not found')


@pytest.mark.parametrize('content, sentence', [
    (b'{"r": 3', 'Expecting'),
    (b'[' * 100_000, 'recursion'),
    (b'\xff\xfe', 'codec'),
    (b'[]', 'holds no JSON object'),
    (b'{}', 'its peft_type is None'),
])
def test_a_damaged_config_is_refused(adapted, content, sentence):
    _, folder = adapted
    (folder / CONFIG).write_bytes(content)
    assert_refused(folder, sentence)


@pytest.mark.parametrize('length, sentence', [(0, 'header'), (99, 'header'), (-8, 'incomplete')])
def test_a_tensors_file_cut_short_is_refused(adapted, length, sentence):
    _, folder = adapted
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:length])
    assert_refused(folder, sentence)


@pytest.mark.parametrize('metadata, sentence', [
    ({'lora': '{'}, 'Expecting'),
    ({'lora': '[' * 99_999}, 'recursion'),
    ({'lora': '[]'}, 'has an unknown form'),
    ({'tokenizer': '3'}, 'has an unknown form'),
])
def test_damaged_metadata_is_refused(adapted, metadata, sentence):
    _, folder = adapted
    rewrite_tensors(folder / TENSORS, **metadata)
    assert_refused(folder, sentence)


def test_tensors_that_are_not_finite_are_refused(adapted):
    _, folder = adapted
    name = peft_adapter.PREFIX + A
    rewrite_tensors(folder / TENSORS, {name: torch.full((3, 16), torch.nan)})
    assert_refused(folder, 'not finite')


@pytest.mark.parametrize('dtype, size', [
    ('F64', 8), ('F16', 2), ('BF16', 2), ('I64', 8), ('U64', 8), ('U32', 4), ('U16', 2), ('I8', 1),
    ('BOOL', 1), ('F8_E5M2', 1), ('F8_E4M3', 1), ('F8_E8M0', 1), ('C64', 8), ('F4', 1),
    ('NONE', 4)])
def test_tensors_of_any_type_are_read_as_float32_or_refused(adapted, dtype, size):
    _, folder = adapted
    header = json.dumps({'t': {'dtype': dtype, 'shape': [8 // size], 'data_offsets': [0, 8]}})
    content = len(header).to_bytes(8, 'little') + header.encode() + bytes(8)
    (folder / TENSORS).write_bytes(content)
    try:
        adapter = peft_adapter.load_adapter(str(folder))
    except UserError as error:
        assert str(folder) in str(error)
    else:
        assert adapter.state['t'].dtype == torch.float32


def test_a_bug_while_an_adapter_is_loaded_keeps_its_traceback(adapted, monkeypatch):
    _, folder = adapted

    def slip(*arguments):
        raise TypeError('a slip')

    monkeypatch.setattr(peft_adapter, '_read_options', slip)
    with pytest.raises(TypeError, match='^a slip$'):
        peft_adapter.load_adapter(str(folder))


def test_a_settings_file_without_ours_can_not_claim_memory(adapted):
    _, folder = adapted
    rewrite_tensors(folder / TENSORS)  # without our metadata, as peft writes it
    change_config(folder, r=2 ** 30)
    adapter = peft_adapter.load_adapter(str(folder))
    sentence = r'c_attn.lora_A.weight is \(3, 16\), expected \(1073741824, 16\)'
    with pytest.raises(UserError, match=sentence):
        lora.apply_adapter(tiny_gpt(), adapter, 'it')
