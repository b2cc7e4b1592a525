"""plaingpt/formats/hugging_face.py: models of Hugging Face compute the same, and run no code."""
import json
import os
import sys
import types

import pytest
import torch
from conftest import TINY, refused, run_here, succeeded, tiny_ids
from fine_tuning import ABC, refusal, save_gpt2
from forgery import one_sentence, saved_by_torch

from model import GPT
from plaingpt.formats import hugging_face
from plaingpt.formats.hugging_face import CannotLoad, load_gpt2, tokenizer_of
from plaingpt.system.messages import UserError
from plaingpt.text.publishing import write_data_set
from plaingpt.text.tokenizer_json import describe_tokenizer_json
from plaingpt.text.tokenizers import GPT2_VOCAB_SIZE, load_tokenizer

# ---- equal to Hugging Face ----

SHAPES = [
    {'n_layer': 1, 'n_head': 1, 'n_embd': 8, 'vocab_size': 13, 'n_positions': 7},
    {'n_layer': 3, 'n_head': 4, 'n_embd': 32, 'vocab_size': 101, 'n_positions': 24},
    {'n_layer': 2, 'n_head': 2, 'n_embd': 24, 'vocab_size': 64, 'n_positions': 9,
     'activation_function': 'gelu'},
]


@pytest.fixture(params=SHAPES)
def their_model(request, tmp_path):
    """(a random GPT-2 of Hugging Face, the directory that save_pretrained wrote of it)."""
    return save_gpt2(tmp_path, std=0.3, **request.param), str(tmp_path)


def test_logits_loss_and_gradients_equal_hugging_faces(their_model):
    theirs, directory = their_model
    ours = load_gpt2(directory).eval()
    ids = tiny_ids(3, theirs.config.n_positions, vocab_size=theirs.config.vocab_size)
    logits, loss = ours(ids[:, :-1], ids[:, 1:])
    expected = theirs(ids, labels=ids)
    torch.testing.assert_close(logits, expected.logits[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, expected.loss, atol=1e-4, rtol=1e-4)

    loss.backward()
    expected.loss.backward()
    their_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = their_parameters[name].grad
        if name.endswith(hugging_face.CONV1D_WEIGHTS):
            gradient = gradient.t()
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


def test_a_model_keeps_its_activation_and_only_dropout_can_be_overridden(their_model):
    theirs, directory = their_model
    ours = GPT.from_pretrained(directory, {'dropout': 0.25})
    exact = theirs.config.activation_function == 'gelu'
    assert ours.config.gelu == ('exact' if exact else 'tanh')
    assert ours.config.dropout == ours.transformer.h[0].attn.dropout == 0.25
    with pytest.raises(ValueError, match='only dropout'):
        GPT.from_pretrained(directory, {'n_layer': 1})


def test_names_as_in_openais_own_files_are_read(their_model, tmp_path):
    from safetensors.torch import save_file
    theirs, directory = their_model
    expected = load_gpt2(directory).state_dict()
    # No prefix and no lm_head, but the causal masks.
    bare = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    bare['h.0.attn.bias'] = torch.ones(1, 1, 4, 4)
    save_file(bare, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    for name, tensor in load_gpt2(directory).state_dict().items():
        assert torch.equal(tensor, expected[name])


# ---- refusals ----

def assert_refused(directory, reason):
    with pytest.raises(CannotLoad, match='cannot be loaded as a GPT-2') as refusal:
        load_gpt2(directory)
    message = str(refusal.value)
    assert reason in message
    assert directory in message
    assert '\n' not in message


def change_json(path, changes):
    """Replaces entries of a JSON file, or all of it if the changes are no dict."""
    content = changes
    if isinstance(changes, dict):
        content = json.loads(path.read_text(encoding='utf-8')) | changes
    path.write_text(json.dumps(content), encoding='utf-8')


def test_a_name_of_nothing_is_refused():
    assert_refused('gtp2', 'hub ids have the form owner/name')


def test_without_a_network_a_hub_id_is_refused(monkeypatch, tmp_path):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    assert_refused('no-one/has-this', 'connect')


def test_another_architecture_is_refused(tmp_path):
    from transformers import LlamaConfig
    LlamaConfig().save_pretrained(tmp_path)
    assert_refused(str(tmp_path), "its architecture is 'llama', not 'gpt2'")


@pytest.mark.parametrize('changes, reason', [
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx is True'),
    ({'scale_attn_weights': False}, 'scale_attn_weights is False'),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings is False'),
    ({'activation_function': 'relu'}, "activation_function is 'relu'"),
    ({'n_inner': 5, 'layer_norm_epsilon': 0.1}, 'n_inner is 5, layer_norm_epsilon is 0.1'),
    ({'n_layer': 10 ** 9}, 'n_layer is 1000000000'),
    ({'n_layer': 'x'}, "expected int, got str (value: 'x')"),
    ({'n_head': 3}, 'n_embd=16 must be a multiple of n_head=3'),
    ({'n_head': 0}, 'n_head=0 must be at least 1'),
    ({'vocab_size': 10 ** 12}, 'vocab_size=1000000000000 must be at least 1 and below 2**31'),
    ({'n_layer': 3}, 'its file lacks 12 tensors of the model in its config'),
    ({'n_embd': 32}, ''),
    ([], "its architecture is None, not 'gpt2'"),
    (None, ''),
])
def test_a_config_of_another_model_is_refused(tmp_path, changes, reason):
    save_gpt2(tmp_path)
    change_json(tmp_path / 'config.json', changes)
    assert_refused(str(tmp_path), reason)


@pytest.mark.parametrize('name, content', [
    ('config.json', None),
    ('config.json', b''),
    ('config.json', b'[' * 100_000),
    ('model.safetensors', None),
    ('model.safetensors', b''),
    ('model.safetensors', b'x' * 100),
    ('generation_config.json', b'[]'),
    ('adapter_config.json', b'null'),
])
def test_a_missing_or_damaged_file_is_refused(tmp_path, name, content):
    save_gpt2(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    assert_refused(str(tmp_path), '')


@pytest.mark.parametrize('index', [
    b'{', b'[]', b'{}', b'{"metadata": null, "weight_map": {}}',
    b'{"metadata": {}, "weight_map": ["a"]}', b'{"metadata": {}, "weight_map": {"a": 5}}',
    b'{"metadata": {}, "weight_map": {"a": "missing.safetensors"}}'])
def test_a_damaged_index_of_shards_is_refused(tmp_path, index):
    save_gpt2(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    (tmp_path / 'model.safetensors.index.json').write_bytes(index)
    assert_refused(str(tmp_path), '')


@pytest.mark.parametrize('slipping', ['gpt_config', 'copy_weights', 'GPT'])
def test_a_bug_while_a_model_is_loaded_keeps_its_traceback(tmp_path, monkeypatch, slipping):
    def slip(*arguments):
        raise TypeError('a slip')

    save_gpt2(tmp_path)
    monkeypatch.setattr(hugging_face, slipping, slip)
    with pytest.raises(TypeError, match='^a slip$'):
        load_gpt2(str(tmp_path))


# ---- hostile directories ----

class Canary:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'echo > {self.path}',)


HARMLESS = [
    {'auto_map': {'AutoConfig': 'modeling_x.X', 'AutoModelForCausalLM': 'modeling_x.X'},
     'architectures': ['X']},
    {'quantization_config': {'quant_method': 'bitsandbytes', 'load_in_8bit': True}},
    {'attn_implementation': 'a/kernel'},
    {'_attn_implementation': 'a/kernel'},
    {'attn_implementation': 'flash_attention_2'},
    {'dtype': 'x'},
]


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """(folder of a GPT-2 with a module that makes a file if it is run, path of that file)."""
    canary = tmp_path / 'canary'
    folder = tmp_path / 'gpt2'
    save_gpt2(folder, n_layer=1, n_head=1, n_embd=8, vocab_size=64)
    (folder / 'modeling_x.py').write_text(f'open({str(canary)!r}, "w")', encoding='utf-8')
    monkeypatch.setattr(hugging_face, 'tokenizer_of', lambda path: ABC)
    return folder, canary


@pytest.mark.parametrize('entries', HARMLESS, ids=str)
def test_no_entry_of_a_config_runs_code_or_changes_the_model(hostile, entries):
    folder, canary = hostile
    expected = load_gpt2(str(folder)).state_dict()
    change_json(folder / 'config.json', entries)
    found = load_gpt2(str(folder)).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not canary.exists()


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
@pytest.mark.parametrize('cut_to', ['pickled', -9, 0, 99])
def test_broken_weights_end_a_script_in_one_sentence_and_run_no_code(
        tmp_path, char_data, hostile, cut_to, script):
    folder, canary = hostile
    weights = folder / 'model.safetensors'
    if cut_to == 'pickled':
        weights.unlink()
        pickled = saved_by_torch({'x': Canary(canary)})
        (folder / 'pytorch_model.bin').write_bytes(pickled)
    else:
        weights.write_bytes(weights.read_bytes()[:cut_to])
    if script == 'train.py':
        ended = run_here(script, **TINY, dataset=char_data, init_from=folder,
                         out_dir=tmp_path / 'out')
    else:
        ended = run_here(script, init_from=folder, num_samples=1, max_new_tokens=2, device='cpu')
    assert str(folder) in one_sentence(ended)
    assert not canary.exists()
    assert not (tmp_path / 'out').exists()


# ---- tokenizers ----

@pytest.fixture(scope='module')
def bpe_json(text):
    """The text of a tokenizer.json: a small byte-level BPE, trained on the words of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return tokenizer.to_str()


@pytest.fixture
def with_bpe(tmp_path, bpe_json):
    """(folder of a GPT-2 with a tokenizer of its own, that tokenizer)."""
    tokenizer = load_tokenizer(describe_tokenizer_json(bpe_json))
    folder = tmp_path / 'gpt2'
    save_gpt2(folder, vocab_size=tokenizer.vocab_size)
    (folder / 'tokenizer.json').write_text(bpe_json, encoding='utf-8')
    return folder, tokenizer


@pytest.mark.parametrize('name', ['gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2'])
def test_published_gpt2s_use_its_tokenizer_and_nothing_is_read(monkeypatch, name):
    monkeypatch.setattr(hugging_face, '_tokenizer_json', None)
    monkeypatch.setattr(hugging_face, 'read_config', None)
    assert tokenizer_of(name) == {'kind': 'gpt2'}


def test_a_models_own_tokenizer_is_read(with_bpe, text):
    folder, tokenizer = with_bpe
    found = load_tokenizer(tokenizer_of(str(folder)))
    assert found.encode(text) == tokenizer.encode(text)
    assert found.decode(found.encode(text)) == text


def test_a_model_with_its_own_tokenizer_writes_that_tokenizers_text(with_bpe):
    folder, tokenizer = with_bpe
    keys = {'num_samples': 1, 'max_new_tokens': 20, 'temperature': 0, 'device': 'cpu',
            'dtype': 'float32', 'start': 'the king'}
    written = succeeded(run_here('sample.py', init_from=folder, **keys))
    prompt = torch.tensor([tokenizer.encode('the king')])
    model = load_gpt2(str(folder)).eval()
    ids = model.generate(prompt, 20, temperature=0, vocab_size=tokenizer.vocab_size)
    assert tokenizer.decode(ids[0].tolist()) in written


def test_a_model_is_trained_on_a_data_set_of_its_own_tokenizer_alone(
        tmp_path, with_bpe, char_data, text):
    folder, tokenizer = with_bpe
    keys = TINY | {'init_from': folder, 'max_iters': 2, 'eval_interval': 2}
    ended = run_here('train.py', **keys, dataset=char_data, out_dir=tmp_path / 'refused')
    assert 'tokenizer' in one_sentence(ended)
    assert not (tmp_path / 'refused').exists()

    ids = tokenizer.encode(text)
    data = tmp_path / 'data'
    data.mkdir()
    write_data_set(str(data), tokenizer, {'train': ids, 'val': ids[:1000]}, 'a test', None)
    succeeded(run_here('train.py', **keys, dataset=data, out_dir=tmp_path / 'out'))
    saved = torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)
    assert saved['tokenizer'] == tokenizer_of(str(folder))


def gpt2_data_set(folder):
    """Writes a data set of GPT-2 tokens, without GPT-2's tokenizer."""
    tokenizer = types.SimpleNamespace(vocab_size=GPT2_VOCAB_SIZE, to_meta=lambda: {'kind': 'gpt2'})
    folder.mkdir()
    ids = [number % GPT2_VOCAB_SIZE for number in range(0, 500_000, 101)]
    write_data_set(str(folder), tokenizer, {'train': ids, 'val': ids[:1000]}, 'a test', None)
    return folder


def test_a_model_with_gpt2s_own_tokenizer_json_is_trained_on_gpt2_tokens(tmp_path, monkeypatch):
    folder = tmp_path / 'gpt2'
    save_gpt2(folder, n_layer=1, n_embd=4, vocab_size=GPT2_VOCAB_SIZE)
    (folder / 'tokenizer.json').write_text('the text', encoding='utf-8')

    def describe(text):
        assert text == 'the text'
        return {'kind': 'gpt2'}

    monkeypatch.setattr(hugging_face, 'describe_tokenizer_json', describe)
    data = gpt2_data_set(tmp_path / 'data')
    succeeded(run_here('train.py', **TINY | {'max_iters': 1}, init_from=folder, dataset=data,
                       out_dir=tmp_path / 'out'))


def test_without_a_tokenizer_json_a_large_vocabulary_is_taken_for_gpt2s(tmp_path, capsys):
    save_gpt2(tmp_path, n_layer=1, n_head=1, n_embd=2, vocab_size=GPT2_VOCAB_SIZE)
    assert tokenizer_of(str(tmp_path)) == {'kind': 'gpt2'}
    warning = capsys.readouterr().err
    assert warning.count('warning: ') == 1
    assert f"no tokenizer.json found for {tmp_path}: assuming that it uses GPT-2's" in warning


def test_without_a_tokenizer_json_a_small_vocabulary_is_unknown(tmp_path, char_data):
    folder = tmp_path / 'gpt2'
    save_gpt2(folder)
    assert tokenizer_of(str(folder)) is None
    assert 'has no tokenizer.json' in refused(run_here('sample.py', init_from=folder, device='cpu'))
    # Training needs no text, so any data set will do whose ids the model has.
    succeeded(run_here('train.py', **TINY | {'max_iters': 1}, init_from=folder, dataset=char_data,
                       out_dir=tmp_path / 'out'))


@pytest.mark.parametrize('content', [
    b'', b'{', b'[]', b'\xff\xfe', b'{"model": {}}', b'[' * 99_999])
def test_a_damaged_tokenizer_json_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / 'tokenizer.json').write_bytes(content)
    with refusal() as error:
        tokenizer_of(str(tmp_path))
    assert str(tmp_path / 'tokenizer.json') in str(error.value)


def test_the_tokenizer_of_a_hub_model_is_downloaded_as_data(tmp_path, monkeypatch, bpe_json):
    downloads = []

    def download(repository, name):
        downloads.append((repository, name))
        (tmp_path / name).write_text(bpe_json, encoding='utf-8')
        return str(tmp_path / name)

    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    assert tokenizer_of('someone/small-gpt2')['kind'] == 'tokenizer.json'
    assert downloads == [('someone/small-gpt2', 'tokenizer.json')]


def test_a_hub_model_without_a_tokenizer_json_has_none(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repository, name):
        raise LocalEntryNotFoundError('offline')

    config = types.SimpleNamespace(vocab_size=1000)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    monkeypatch.setattr(hugging_face, 'read_config', lambda model_type: config)
    assert tokenizer_of('someone/small-gpt2') is None


def test_a_hub_that_fails_is_refused_in_one_sentence(monkeypatch):
    import httpx

    def download(repository, name):
        raise httpx.ReadTimeout('timed out')

    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    with refusal(CannotLoad):
        tokenizer_of('someone/small-gpt2')


def test_without_transformers_a_gpt2_is_refused_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match='needs the package transformers: pip install transf'):
        load_gpt2(str(tmp_path))
