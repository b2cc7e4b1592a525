"""finetuning.py: what a run goes on from, LoRA against peft's on Hugging Face's GPT-2, and what is frozen when."""
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, tiny_gpt, tiny_ids
from torch.nn import functional as F

from model import GPT
from plaingpt.formats import peft_adapter
from plaingpt.formats.peft_adapter import CONFIG, TENSORS
from plaingpt.system.messages import UserError
from plaingpt.training import checkpoints, lora, starting_weights

ABC = {'kind': 'char', 'chars': list('\nabcdefghijklmnopqrstuvwxyzABCD')}


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    """The folder of a random GPT-2 that Hugging Face's save_pretrained wrote, with random biases and norms too."""
    from transformers import GPT2Config, GPT2LMHeadModel
    folder = tmp_path_factory.mktemp('theirs') / 'gpt2'
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=31, bos_token_id=0,
                                       eos_token_id=0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapted(theirs, tmp_path):
    """(GPT with a trained adapter, its folder): with B no longer 0."""
    gpt, tokenizer = starting_weights.open_base(str(theirs))
    digest = lora.digest_of_base(gpt)
    add(gpt, targets='c_attn,mlp.c_proj,c_fc')
    peft_adapter.save_adapter(tmp_path / 'adapter', gpt, str(theirs), digest, ABC)
    return gpt, tmp_path / 'adapter'


def add(gpt, rank=3, alpha=12, dropout=0.0, targets='c_attn', trained=True):
    """Adds an adapter as after some training."""
    lora.add_lora(gpt, rank, alpha, dropout, targets)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in lora.adapter_state(gpt).items():
        if 'lora_B' in name and trained:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
    return gpt


def save_run(folder, gpt, name='ckpt', **entries):
    checkpoints.save(str(folder), {
        'model': gpt.state_dict(), 'optimizer': {}, 'model_args': asdict(gpt.config), 'iter_num': 7,
        'best_val_loss': 1.0, 'config': {}, 'tokenizer': ABC, **entries}, [name])
    return str(folder)


def logits(model, idx):
    with torch.no_grad():
        return model(idx, targets=idx)[0] if isinstance(model, GPT) else model(idx).logits


def loss(model, idx):
    if isinstance(model, GPT):
        return model(idx[:, :-1], idx[:, 1:])[1]
    return F.cross_entropy(model(idx[:, :-1]).logits.flatten(0, 1), idx[:, 1:].flatten())


def refusal(kind=UserError):
    return pytest.raises(kind, match=r'^[^\n]+$')


# ---- what to go on from ----

@pytest.mark.parametrize('name', ['ckpt', 'last'])
def test_a_run_is_opened_by_its_folder_and_by_its_file(tmp_path, name):
    gpt = tiny_gpt(position='rope', tied=False, dropout=0.1)
    folder, idx = save_run(tmp_path, gpt, name), tiny_ids(2, 16)
    for path in folder, f'{folder}/{name}.pt':
        opened, tokenizer = starting_weights.open_base(path, dropout=0.3)
        assert torch.equal(logits(opened.eval(), idx), logits(gpt, idx))
        assert tokenizer == ABC and opened.config.dropout == opened.transformer.h[0].attn.dropout == 0.3


def test_a_checkpoint_of_nanogpt_is_opened(tmp_path):
    gpt = tiny_gpt(gelu='exact')
    args = {key: getattr(gpt.config, key) for key in (*checkpoints.SHAPE, 'dropout')}
    torch.save({'model': {f'_orig_mod.{name}': tensor for name, tensor in gpt.state_dict().items()}, 'optimizer': {},
                'model_args': args, 'iter_num': 3, 'best_val_loss': torch.tensor(2.0), 'config': {}},
               tmp_path / 'ckpt.pt')
    opened, tokenizer = starting_weights.open_base(str(tmp_path))
    assert tokenizer is None and opened.config == gpt.config
    assert torch.equal(logits(opened.eval(), tiny_ids(1, 8)), logits(gpt, tiny_ids(1, 8)))


def test_a_published_model_is_opened_and_its_size_tells_its_tokenizer(theirs, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    opened, tokenizer = starting_weights.open_base(str(theirs), dropout=0.3)
    model = GPT2LMHeadModel.from_pretrained(theirs).eval()
    assert torch.allclose(logits(opened.eval(), tiny_ids(2, 16)), logits(model, tiny_ids(2, 16)), atol=1e-5)
    assert tokenizer is None and opened.config.dropout == 0.3  # it is not GPT-2's with 31 tokens
    GPT2Config(n_layer=1, n_head=1, n_embd=2, n_positions=4).save_pretrained(tmp_path)
    assert starting_weights.open_base(str(tmp_path), weights=False)[1] == {'kind': 'gpt2'}


def test_without_weights_only_the_shape_is_made(theirs, tmp_path):
    for path in str(theirs), save_run(tmp_path, tiny_gpt(seed=3)):
        with torch.device('meta'):
            opened, _ = starting_weights.open_base(path, weights=False)
            lora.add_lora(opened, 2, 4, 0.1, 'c_attn')
        assert {parameter.device.type for parameter in opened.parameters()} == {'meta'}
        assert opened.transformer.h[1].attn.c_attn.base_layer.weight.shape == (48, 16)


@pytest.mark.parametrize('prepare, sentence', [
    (lambda folder: save_run(folder, tiny_gpt(), model_args=asdict(tiny_gpt().config) | {'lights': 3}), 'lights'),
    (lambda folder: save_run(folder, tiny_gpt(), model_args=asdict(tiny_gpt().config) | {'n_head': 3}), 'multiple of'),
    (lambda folder: (folder / 'ckpt.pt').write_bytes(b'PK'), 'is not a checkpoint'),
    (lambda folder: (folder / CONFIG).write_text('{}', encoding='utf-8'), 'is an adapter: python sample.py --adapter='),
    (lambda folder: None, 'has neither the ckpt.pt or last.pt of a run nor the config.json of a Hugging Face model'),
])
def test_a_broken_base_is_refused_in_one_sentence(tmp_path, prepare, sentence):
    prepare(tmp_path)
    with refusal() as error:
        starting_weights.open_base(str(tmp_path))
    assert sentence in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize('name, sentence', [
    ('no/ckpt.pt', 'no/ckpt.pt not found'), (__file__, 'is not a checkpoint'), ('gtp2', 'cannot be loaded as a GPT-2'),
    ('./no/folder', 'cannot be loaded as a GPT-2')])
def test_a_missing_base_is_refused_in_one_sentence(name, sentence, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with refusal((UserError, ValueError)) as error:
        starting_weights.open_base(name)
    assert sentence in str(error.value)


@pytest.mark.parametrize('tied', [True, False])
def test_the_digest_is_that_of_the_weights(tied):
    gpt, same, other = tiny_gpt(tied=tied), tiny_gpt(tied=tied), tiny_gpt(tied=tied)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.bias[3] += 1e-6
    digest = lora.digest_of_base(gpt)
    assert digest == lora.digest_of_base(same) != lora.digest_of_base(other)
    assert len(digest) == 64
    same.crop_block_size(8)
    assert lora.digest_of_base(same) != digest


def test_importing_it_is_light():
    heavy = "{'peft', 'transformers', 'safetensors'} & set(sys.modules)"
    code = f'import sys; from plaingpt.formats import peft_adapter; from plaingpt.training import lora, starting_weights; sys.exit(bool({heavy}))'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0


# ---- LoRA ----

def test_an_adapter_computes_and_learns_what_pefts_does_on_hugging_faces_model(adapted, theirs):
    from peft import PeftModel
    from transformers import GPT2LMHeadModel
    gpt, folder = adapted
    base = GPT2LMHeadModel.from_pretrained(theirs).eval()
    plain = logits(base, tiny_ids(2, 16))
    model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    assert torch.allclose(logits(gpt, tiny_ids(2, 16)), logits(model, tiny_ids(2, 16)), atol=1e-5)
    assert not torch.allclose(plain, logits(model, tiny_ids(2, 16)), atol=1e-1)
    for each in gpt, model:
        loss(each, tiny_ids(4, 16)).backward()
    grads = {name.removeprefix(peft_adapter.PREFIX): parameter.grad for name, parameter in model.named_parameters()
             if parameter.grad is not None}
    ours = {name: parameter.grad for name, parameter in gpt.named_parameters() if parameter.grad is not None}
    assert ours.keys() == grads.keys() and len(ours) == 2 * 2 * 3
    for name, grad in ours.items():
        assert grad.abs().max() > 1e-4 and torch.allclose(grad, grads[name], atol=1e-6, rtol=1e-4), name


def test_an_adapter_that_peft_has_saved_is_read(theirs, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(theirs), LoraConfig(
        r=2, lora_alpha=5, lora_dropout=0.1, target_modules=['attn.c_proj', 'c_fc'], init_lora_weights=False,
        fan_in_fan_out=True)).eval()
    model.save_pretrained(tmp_path)
    adapter = peft_adapter.load_adapter(str(tmp_path))
    assert adapter.lora == {'rank': 2, 'alpha': 5, 'dropout': 0.1, 'targets': 'attn.c_proj,c_fc', 'base_digest': None,
                            'base': str(theirs)}
    gpt, _ = starting_weights.open_base(str(theirs))
    lora.apply_adapter(gpt.eval(), adapter, str(theirs))
    assert 'does not tell the digest of its base' in capsys.readouterr().err
    assert torch.allclose(logits(gpt, tiny_ids(2, 16)), logits(model, tiny_ids(2, 16)), atol=1e-5)


@pytest.mark.parametrize('shape, targets', [
    ({}, 'c_attn,c_proj'), (dict(tied=False, n_kv_head=1, mlp='swiglu', position='rope', norm='rmsnorm', bias=False),
                            'attn.c_attn, mlp.c_fc,lm_head')])
def test_merging_leaves_a_plain_model_with_the_same_logits(shape, targets):
    plain = tiny_gpt(**shape)
    gpt = add(tiny_gpt(**shape), targets=targets)
    expected = logits(gpt, tiny_ids(2, 16))
    assert not torch.allclose(expected, logits(plain, tiny_ids(2, 16)), atol=1e-3)
    assert lora.merge_adapter(gpt) is None
    assert torch.allclose(logits(gpt, tiny_ids(2, 16)), expected, atol=1e-5)
    assert gpt.state_dict().keys() == plain.state_dict().keys() and vars(gpt).keys() == vars(plain).keys()
    assert all(parameter.requires_grad for parameter in gpt.parameters())
    plain.load_state_dict(gpt.state_dict())
    assert torch.equal(logits(plain, tiny_ids(2, 16)), logits(gpt, tiny_ids(2, 16)))
    lora.merge_adapter(plain)  # has none
    assert torch.equal(logits(plain, tiny_ids(2, 16)), logits(gpt, tiny_ids(2, 16)))


def test_an_adapter_changes_nothing_at_first_and_it_alone_learns():
    plain, gpt = tiny_gpt(), add(tiny_gpt(), targets='c_attn,c_fc', trained=False)
    assert torch.equal(logits(gpt, tiny_ids(2, 16)), logits(plain, tiny_ids(2, 16)))
    loss(gpt, tiny_ids(2, 16)).backward()
    learning = {name for name, parameter in gpt.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, parameter in gpt.named_parameters() if parameter.grad is not None}
    assert learning == {f'transformer.h.{i}.{layer}.lora_{matrix}.default.weight' for i in range(2)
                        for layer in ('attn.c_attn', 'mlp.c_fc') for matrix in 'AB'}
    decayed, others = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    assert len(decayed['params']) == 8 and not others['params']


def test_bfloat16_autocast_leaves_the_adapter_in_float32():
    gpt = add(tiny_gpt(), targets='c_attn,c_proj,c_fc')
    expected = loss(gpt, tiny_ids(2, 16))
    with torch.autocast('cpu', torch.bfloat16):
        found = loss(gpt, tiny_ids(2, 16))
    found.backward()
    assert found != expected and torch.allclose(found, expected, atol=0.05)
    matrices = [parameter for parameter in gpt.parameters() if parameter.requires_grad]
    assert {matrix.dtype for matrix in matrices} == {matrix.grad.dtype for matrix in matrices} == {torch.float32}


def test_an_adapter_begins_the_same_for_the_same_seed_whatever_has_been_drawn():
    def begin(seed, draws):
        gpt = tiny_gpt()
        torch.manual_seed(seed)
        torch.rand(draws)
        before = torch.get_rng_state()
        add(gpt, dropout=0.1, trained=False)
        assert torch.equal(torch.get_rng_state(), before)
        return lora.adapter_state(gpt)['transformer.h.0.attn.c_attn.lora_A.weight']

    assert torch.equal(begin(1, 0), begin(1, 100)) and not torch.equal(begin(1, 0), begin(2, 0))


@pytest.mark.parametrize('training', [True, False])
def test_dropout_of_an_adapter_is_as_the_model(training):
    gpt = add(tiny_gpt().train(training), dropout=0.5)
    assert torch.equal(logits(gpt, tiny_ids(2, 16)), logits(gpt, tiny_ids(2, 16))) is not training


@pytest.mark.parametrize('name', ['c_porj', 'wte', 'lm_head', 'attn', 'proj', ''])
def test_a_target_that_is_no_linear_layer_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is no layer that can be adapted; there are c_attn, c_fc, c_proj$"):
        lora.add_lora(tiny_gpt(), 2, 4, 0.0, f'c_attn,{name}')


def test_without_peft_lora_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(UserError, match='pip install peft'):
        lora.add_lora(tiny_gpt(), 2, 4, 0.0, 'c_attn')


# ---- state and folder of an adapter ----

def test_the_state_is_named_as_pefts_and_goes_back_where_it_was():
    from peft import get_peft_model_state_dict
    gpt, fresh = add(tiny_gpt(), targets='c_attn,c_fc'), add(tiny_gpt(), targets='c_attn,c_fc', trained=False)
    state = lora.adapter_state(gpt)
    assert state.keys() == get_peft_model_state_dict(gpt).keys()
    lora.restore_adapter(fresh, state)
    assert torch.equal(logits(fresh, tiny_ids(2, 16)), logits(gpt, tiny_ids(2, 16)))
    assert not torch.equal(logits(fresh, tiny_ids(2, 16)), logits(tiny_gpt(), tiny_ids(2, 16)))


A, B = (f'transformer.h.1.attn.c_attn.lora_{matrix}.weight' for matrix in 'AB')


@pytest.mark.parametrize('change, sentence', [
    (lambda state: state.pop(A), f'{A} is missing, not '),
    (lambda state: state.update(c=torch.ones(3, 3)), r'c is \(3, 3\), not known'),
    (lambda state: state.update({A: torch.ones(3, 3)}), rf'{A} is \(3, 3\), not \(3, 16\)'),
    (lambda state: state.update({B: state[B].T}), rf'{B} is \(3, 48\), not \(48, 3\)')])
def test_tensors_of_another_adapter_are_refused(change, sentence):
    state = dict(lora.adapter_state(add(tiny_gpt())))
    change(state)
    with pytest.raises(ValueError, match=sentence):
        lora.restore_adapter(add(tiny_gpt()), state)


def test_an_adapter_is_saved_and_loaded(adapted, theirs, tmp_path):
    gpt, folder = adapted
    assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
    fresh, _ = starting_weights.open_base(str(theirs))
    adapter = peft_adapter.load_adapter(str(folder))
    assert adapter.tokenizer == ABC and adapter.folder == str(folder)
    assert adapter.lora == {'rank': 3, 'alpha': 12, 'dropout': 0.0, 'targets': 'c_attn,c_fc,mlp.c_proj',
                            'base': str(theirs), 'base_digest': lora.digest_of_base(fresh)}
    lora.apply_adapter(fresh.eval(), adapter, 'it')
    assert torch.equal(logits(fresh, tiny_ids(2, 16)), logits(gpt.eval(), tiny_ids(2, 16)))
    options = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    assert options['target_modules'] == ['c_attn', 'c_fc', 'mlp.c_proj'] and options['fan_in_fan_out'] is True


def kill(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize('at', range(7))
def test_a_kill_while_saving_leaves_a_pair_that_fits_or_a_sentence(adapted, tmp_path, monkeypatch, at):
    _, folder = adapted
    before = peft_adapter.load_adapter(str(folder))
    newer = add(tiny_gpt(seed=3), rank=2, alpha=40)
    calls = []

    def counted(call):
        return lambda *arguments: calls.append(1) or (kill() if len(calls) == at + 1 else call(*arguments))

    for module, name in (os, 'replace'), (peft_adapter, 'sync'), (peft_adapter, 'remove'):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    with contextlib.suppress(KeyboardInterrupt):
        peft_adapter.save_adapter(folder, newer, 'base', 'x' * 64)
    monkeypatch.undo()
    if at == 3:
        with pytest.raises(UserError, match='its two files are not of one save'):
            peft_adapter.load_adapter(str(folder))
    else:
        found = peft_adapter.load_adapter(str(folder))
        expected = before.state if at < 3 else lora.adapter_state(newer)
        assert found.lora['rank'] == (3 if at < 3 else 2) and found.state.keys() == expected.keys()
        assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.items())
    assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    gpt = add(tiny_gpt())
    lora.adapter_state(gpt)[A][0, 0] = torch.nan
    with pytest.raises(ValueError, match='not finite'):
        peft_adapter.save_adapter(str(tmp_path / 'new'), gpt, 'base', 'x' * 64)
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('options, sentence', [
    ({'peft_type': 'IA3'}, "its peft_type is 'IA3'"), ({'use_dora': True}, 'it has use_dora, and only plain LoRA'),
    ({'bias': 'all'}, 'it has bias, and'), ({'use_rslora': True, 'exclude_modules': 'x'}, 'exclude_modules, use_rs'),
    ({'rank_pattern': {'c_fc': 4}}, 'it has rank_pattern'), ({'init_lora_weights': 'pissa'}, 'has init_lora_weights'),
    ({'what_is_to_come': 1}, 'it has what_is_to_come'), ({'target_modules': 'all-linear'}, 'are no list of names'),
    ({'target_modules': [3]}, 'are no list of names'), ({'target_modules': []}, "has targets='', which no LoRA"),
    ({'r': 0}, 'has rank=0'), ({'r': True}, 'has rank=True'), ({'r': 2.0}, 'has rank=2.0'),
    ({'r': 10 ** 12}, 'has rank=1000000000000'), ({'r': 4}, 'its two files are not of one save'),
    ({'lora_alpha': 13}, 'not of one save'), ({'target_modules': ['c_attn']}, 'not of one save'),
    ({'lora_alpha': 0}, 'has alpha=0'), ({'lora_alpha': float('nan')}, 'has alpha=nan'),
    ({'lora_alpha': '8'}, "has alpha='8'"), ({'lora_dropout': 1}, 'has dropout=1'),
    ({'base_model_name_or_path': 7}, 'has base=7'), ({'base_model_name_or_path': 'a\0b'}, 'has base=')])
def test_settings_that_are_not_ours_are_refused_by_name(adapted, options, sentence):
    path = adapted[1] / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | options), encoding='utf-8')
    with refusal() as error:
        peft_adapter.load_adapter(str(adapted[1]))
    assert sentence in str(error.value) and str(adapted[1]) in str(error.value)


def write_tensors(path, state=None, **metadata):
    from safetensors.torch import load, save
    path.write_bytes(save({**load(path.read_bytes()), **(state or {})}, metadata))


NAN = {f'base_model.model.{A}': torch.full((3, 16), torch.nan)}


@pytest.mark.parametrize('change, sentence', [
    (lambda config, tensors: config.unlink(), f'{CONFIG} not found'),
    (lambda config, tensors: tensors.unlink(), f'{TENSORS} not found'),
    (lambda config, tensors: config.write_bytes(b'{"r": 3'), 'Expecting'),
    (lambda config, tensors: config.write_bytes(b'[' * 100_000), 'recursion'),
    (lambda config, tensors: config.write_bytes(b'\xff\xfe'), 'codec'),
    (lambda config, tensors: config.write_bytes(b'[]'), 'of no known form'),
    (lambda config, tensors: config.write_bytes(b'{}'), 'its peft_type is None'),
    (lambda config, tensors: tensors.write_bytes(b'x' * 100), 'header'),
    (lambda config, tensors: tensors.write_bytes(tensors.read_bytes()[:-8]), 'incomplete'),
    (lambda config, tensors: write_tensors(tensors, NAN), 'not finite'),
    (lambda config, tensors: write_tensors(tensors, lora='{'), 'Expecting'),
    (lambda config, tensors: write_tensors(tensors, lora='[]'), 'of no known form'),
    (lambda config, tensors: write_tensors(tensors, tokenizer='3'), 'of no known form')])
def test_a_damaged_folder_is_refused(adapted, change, sentence):
    change(adapted[1] / CONFIG, adapted[1] / TENSORS)
    with refusal() as error:
        peft_adapter.load_adapter(str(adapted[1]))
    assert sentence in str(error.value) and str(adapted[1]) in str(error.value)


def test_nothing_is_as_large_as_a_settings_file_says(adapted, theirs):
    write_tensors(adapted[1] / TENSORS)  # with no settings in it, as peft's
    path = adapted[1] / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | {'r': 2 ** 30}), encoding='utf-8')
    gpt, _ = starting_weights.open_base(str(theirs))
    with pytest.raises(UserError, match=r'c_attn.lora_A.weight is \(3, 16\), not \(1073741824, 16\)'):
        lora.apply_adapter(gpt, peft_adapter.load_adapter(str(adapted[1])), 'it')


def test_a_lora_run_is_built_from_its_base(tmp_path):
    gpt, base = tiny_gpt(), save_run(tmp_path / 'base', tiny_gpt())
    settings = {'rank': 3, 'alpha': 12, 'dropout': 0.0, 'targets': 'c_attn', 'base': base,
            'base_digest': lora.digest_of_base(gpt)}
    gpt.crop_block_size(8)
    folder = save_run(tmp_path / 'run', add(gpt), model=lora.adapter_state(gpt), lora=settings)
    saved, path = checkpoints.load_to_resume(folder)
    built = starting_weights.build(saved, path, dropout=0.2)
    assert built.config.block_size == 8 and built.config.dropout == 0.2
    assert torch.equal(logits(built.eval(), tiny_ids(2, 8)), logits(gpt, tiny_ids(2, 8)))
    assert [name for name, parameter in built.named_parameters() if parameter.requires_grad] == [
        name for name, parameter in gpt.named_parameters() if parameter.requires_grad]
    with torch.device('meta'):
        assert starting_weights.build(saved, path, weights=False).state_dict().keys() == gpt.state_dict().keys()
    with pytest.raises(UserError, match=f'--init_from={folder} --merge=FOLDER makes a model'):
        starting_weights.open_base(folder)
