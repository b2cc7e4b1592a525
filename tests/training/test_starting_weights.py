"""plaingpt/training/starting_weights.py: opening each source, and which keys of train.py fit."""
import os
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, tiny_gpt, tiny_ids
from fine_tuning import ABC, add_adapter, logits, refusal, save_gpt2, save_run

from plaingpt.formats import hugging_face
from plaingpt.formats.peft_adapter import CONFIG
from plaingpt.system.messages import UserError
from plaingpt.training import checkpoints, lora, starting_weights

# ---- opening a model ----


@pytest.mark.parametrize('name', ['ckpt', 'last'])
def test_a_run_is_opened_by_its_folder_and_by_its_file(tmp_path, name):
    gpt = tiny_gpt(position='rope', tied=False, dropout=0.1)
    folder = save_run(tmp_path, gpt, name)
    idx = tiny_ids(2, 16)
    for path in (folder, f'{folder}/{name}.pt'):
        opened, tokenizer = starting_weights.open_base(path, dropout=0.3)
        assert torch.equal(logits(opened.eval(), idx), logits(gpt, idx))
        assert tokenizer == ABC
        assert opened.config.dropout == opened.transformer.h[0].attn.resid_dropout.p == 0.3


def test_a_checkpoint_of_nanogpt_is_opened(tmp_path):
    gpt = tiny_gpt(gelu='exact')
    keys = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias', 'dropout')
    compiled = {f'_orig_mod.{name}': tensor for name, tensor in gpt.state_dict().items()}
    checkpoint = {
        'model': compiled, 'optimizer': {}, 'model_args': {key: getattr(gpt.config, key)
                                                           for key in keys},
        'iter_num': 3, 'best_val_loss': torch.tensor(2.0), 'config': {},
    }
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    opened, tokenizer = starting_weights.open_base(str(tmp_path))
    assert tokenizer is None
    assert opened.config == gpt.config
    assert torch.equal(logits(opened.eval(), tiny_ids(1, 8)), logits(gpt, tiny_ids(1, 8)))


def test_a_model_of_hugging_face_is_opened_with_its_tokenizer(tmp_path, monkeypatch):
    theirs = save_gpt2(tmp_path)
    monkeypatch.setattr(hugging_face, 'tokenizer_of', lambda path: ABC | {'path': path})
    opened, tokenizer = starting_weights.open_base(str(tmp_path), dropout=0.3)
    idx = tiny_ids(2, 16)
    assert torch.allclose(logits(opened.eval(), idx), logits(theirs, idx), atol=1e-5)
    assert tokenizer == ABC | {'path': str(tmp_path)}
    assert opened.config.dropout == 0.3


@pytest.mark.parametrize('save', [save_gpt2, lambda folder: save_run(folder, tiny_gpt(seed=3))])
def test_without_weights_only_the_shape_is_made(tmp_path, save):
    save(tmp_path)
    with torch.device('meta'):
        opened, _ = starting_weights.open_base(str(tmp_path), weights=False)
        lora.add_lora(opened, 2, 4, 0.1, 'c_attn')
    assert {parameter.device.type for parameter in opened.parameters()} == {'meta'}
    assert opened.transformer.h[1].attn.c_attn.base_layer.weight.shape == (48, 16)


def unknown_field(folder):
    save_run(folder, tiny_gpt(), model_args=asdict(tiny_gpt().config) | {'lights': 3})


def impossible_field(folder):
    save_run(folder, tiny_gpt(), model_args=asdict(tiny_gpt().config) | {'n_head': 3})


def no_checkpoint(folder):
    (folder / 'ckpt.pt').write_bytes(b'PK')


def only_an_adapter(folder):
    (folder / CONFIG).write_text('{}', encoding='utf-8')


def nothing(folder):
    pass


@pytest.mark.parametrize('prepare, sentence', [
    (unknown_field, 'lights'),
    (impossible_field, 'multiple of'),
    (no_checkpoint, 'is not a checkpoint'),
    (only_an_adapter, 'is an adapter: python sample.py --adapter='),
    (nothing, 'has neither the ckpt.pt or last.pt of a run nor the config.json of a Hugging Face'),
])
def test_a_broken_base_is_refused_in_one_sentence(tmp_path, prepare, sentence):
    prepare(tmp_path)
    with refusal() as error:
        starting_weights.open_base(str(tmp_path))
    assert sentence in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize('name, sentence', [
    ('no/ckpt.pt', 'no/ckpt.pt not found'),
    (__file__, 'is not a checkpoint'),
    ('gtp2', 'cannot be loaded'),
    ('./no/folder', 'cannot be loaded'),
])
def test_a_missing_base_is_refused_in_one_sentence(name, sentence, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with refusal((UserError, hugging_face.CannotLoad)) as error:
        starting_weights.open_base(name)
    assert sentence in str(error.value)


def test_a_bug_while_a_model_is_built_keeps_its_traceback(tmp_path, monkeypatch):
    save_run(tmp_path, tiny_gpt())

    def slip(config):
        raise TypeError('a slip')

    monkeypatch.setattr(starting_weights, 'GPT', slip)
    with pytest.raises(TypeError, match='^a slip$'):
        starting_weights.open_base(str(tmp_path))


# ---- LoRA runs ----

@pytest.fixture
def lora_run(tmp_path):
    """(GPT with an adapter, folder of its run), whose context is shorter than its base's."""
    base = save_run(tmp_path / 'base', tiny_gpt())
    gpt = tiny_gpt()
    settings = lora.LoraSettings(3, 12, 0.0, 'c_attn', base, lora.digest_of_base(gpt))
    gpt.crop_block_size(8)
    add_adapter(gpt)
    folder = save_run(tmp_path / 'run', gpt, model=lora.adapter_state(gpt), lora=asdict(settings))
    return gpt, folder


def trainable(gpt):
    return {name for name, parameter in gpt.named_parameters() if parameter.requires_grad}


def test_a_lora_run_is_built_from_its_base(lora_run):
    gpt, folder = lora_run
    saved, path = checkpoints.load_to_resume(folder)
    built = starting_weights.build(saved, path, dropout=0.2)
    assert built.config.block_size == 8
    assert built.config.dropout == 0.2
    assert torch.equal(logits(built.eval(), tiny_ids(2, 8)), logits(gpt, tiny_ids(2, 8)))
    assert trainable(built) == trainable(gpt)
    with torch.device('meta'):
        shape = starting_weights.build(saved, path, weights=False)
    assert shape.state_dict().keys() == gpt.state_dict().keys()


def test_a_run_does_not_start_from_an_adapter_alone(lora_run):
    _, folder = lora_run
    with pytest.raises(UserError, match=f'--init_from={folder} --merge=FOLDER makes a model'):
        starting_weights.open_base(folder)


def test_a_base_of_another_architecture_is_refused(lora_run, tmp_path):
    _, folder = lora_run
    saved, path = checkpoints.load_to_resume(folder)
    saved['model_args']['n_layer'] = 3
    with pytest.raises(UserError, match='has another n_layer than .*/base, which therefore is not'):
        starting_weights.build(saved, path)


# ---- the model of a training run ----

RUN = TINY | {
    'init_from': 'scratch', 'resume': 'never', 'plan': False, 'bias': True,
    'lora_rank': 0, 'lora_alpha': 16.0, 'lora_dropout': 0.0, 'lora_targets': 'c_attn',
}
META = {'vocab_size': 31, 'tokenizer': {'kind': 'char'}}


def test_a_new_model_has_the_shape_of_the_config_and_the_vocabulary_of_the_data():
    gpt, tokenizer, settings = starting_weights.model_for_run(RUN, {}, None, META)
    assert (gpt.config.n_layer, gpt.config.n_embd, gpt.config.block_size) == (2, 16, 16)
    assert gpt.config.vocab_size == 31
    assert tokenizer is None
    assert settings is None


def test_a_shape_that_is_impossible_is_refused_in_one_sentence():
    with refusal() as error:
        starting_weights.model_for_run(RUN | {'n_head': 3}, {}, None, META)
    assert 'n_embd=16 must be a multiple of n_head=3' in str(error.value)


@pytest.mark.parametrize('resume', ['never', 'auto', 'always'])
def test_random_weights_are_not_adapted(resume):
    with pytest.raises(UserError, match='adapts existing weights'):
        starting_weights.model_for_run(RUN | {'lora_rank': 2, 'resume': resume}, {}, None, META)


def test_a_fine_tuning_run_takes_the_weights_and_crops_the_context(tmp_path):
    base = tiny_gpt()
    folder = save_run(tmp_path, base)
    run = RUN | {'init_from': folder, 'block_size': 8, 'n_layer': 9}
    gpt, tokenizer, settings = starting_weights.model_for_run(run, {}, None, META)
    assert torch.equal(logits(gpt.eval(), tiny_ids(2, 8)), logits(base, tiny_ids(2, 8)))
    assert gpt.config.block_size == 8
    assert tokenizer == ABC
    assert settings is None


def test_an_adapter_records_its_base_by_its_absolute_path_and_digest(tmp_path, monkeypatch):
    base = tiny_gpt()
    save_run(tmp_path / 'base', base)
    monkeypatch.chdir(tmp_path)
    run = RUN | {'init_from': 'base', 'block_size': 8, 'lora_rank': 2, 'lora_dropout': 0.1}
    gpt, _, settings = starting_weights.model_for_run(run, {}, None, META)
    digest = lora.digest_of_base(base)
    assert settings == lora.LoraSettings(2, 16.0, 0.1, 'c_attn', str(tmp_path / 'base'), digest)
    assert all('.lora_' in name for name in trainable(gpt))


def test_a_resumed_run_has_the_model_and_the_adapter_of_its_checkpoint(lora_run):
    gpt, folder = lora_run
    saved, path = checkpoints.load_to_resume(folder)
    run = RUN | {'init_from': 'resume'}
    resumed, tokenizer, settings = starting_weights.model_for_run(run, saved, path, META)
    assert torch.equal(logits(resumed.eval(), tiny_ids(2, 8)), logits(gpt, tiny_ids(2, 8)))
    assert tokenizer == ABC
    assert asdict(settings) == saved['lora']


def test_a_checkpoint_decides_the_shape_and_the_adapter_of_its_run(lora_run, tmp_path):
    _, folder = lora_run
    decided = starting_weights.settings_decided_by(*checkpoints.load_to_resume(folder))
    assert decided['block_size'] == 8
    assert (decided['lora_rank'], decided['lora_alpha']) == (3, 12)
    assert (decided['trainable'], decided['unfreeze']) == ('all', None)
    assert not {'dropout', 'vocab_size'} & decided.keys()
    assert decided['gelu'] == 'tanh'

    plain = save_run(tmp_path / 'plain', tiny_gpt(position='rope'))
    decided = starting_weights.settings_decided_by(*checkpoints.load_to_resume(plain))
    assert decided['position'] == 'rope'
    assert decided['lora_rank'] == 0
    assert 'trainable' not in decided


# ---- the keys of train.py ----

KEYS = {
    'init_from': 'gpt2', 'resume': 'never', 'out_dir': 'out',
    'eval_only': False, 'plan': False, 'find_lr': False,
    'lora_rank': 0, 'lora_alpha': 16.0, 'lora_targets': 'c_attn',
    'trainable': 'all', 'unfreeze': None,
}


@pytest.mark.parametrize('changes, sentences', [
    ({}, []),
    ({'lora_rank': 8}, []),
    ({'init_from': 'scratch', 'trainable': 'head'}, []),
    ({'lora_rank': 8, 'init_from': 'resume'}, []),
    ({'lora_rank': 8, 'init_from': 'scratch'}, ['lora_rank adapts existing weights']),
    ({'lora_rank': 8, 'init_from': 'scratch', 'resume': 'auto'}, []),
    ({'lora_rank': 8, 'init_from': 'scratch', 'resume': 'always'}, []),
    ({'init_from': 'auto'}, ["init_from='auto' is now --resume=auto"]),
    ({'init_from': 'auto', 'lora_rank': 8, 'trainable': 'head'},
     ["init_from='auto' is now --resume=auto", 'trains nothing but the adapter']),
    ({'init_from': 'a\0b'}, ['init_from contains a NUL character']),
    ({'init_from': '.', 'out_dir': 'a\0b'}, []),
])
def test_keys_that_do_not_fit_are_named(changes, sentences):
    found = list(starting_weights.problems(KEYS | changes))
    assert len(found) == len(sentences)
    for line, sentence in zip(found, sentences, strict=True):
        assert sentence in line


@pytest.mark.parametrize('changes, refused', [
    ({}, True),
    ({'resume': 'auto'}, True),
    ({'resume': 'always'}, False),
    ({'plan': True}, False),
    ({'eval_only': True}, False),
    ({'find_lr': True}, False),
])
@pytest.mark.parametrize('name', ['', 'ckpt.pt'])
def test_a_run_may_not_write_into_the_folder_it_starts_from(tmp_path, name, changes, refused):
    run = KEYS | {'init_from': os.path.join(tmp_path, name), 'out_dir': str(tmp_path)} | changes
    found = list(starting_weights.problems(run))
    assert len(found) == refused
    if refused:
        assert 'is out_dir, whose run a new one would move aside' in found[0]
        assert '--resume=always' in found[0]
