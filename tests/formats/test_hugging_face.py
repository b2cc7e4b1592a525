"""plaingpt/formats/hugging_face.py: models of Hugging Face compute the same, and run no code."""
import json
import os
import sys
import types

import pytest
import torch
from conftest import TINY, refused, run_here, succeeded, tiny_ids
from fine_tuning import ABC, loss, refusal, save_gpt2
from foreign import LLAMA3_ROPE, OF_LLAMAS_KIND, assert_equal_gradients, save_theirs
from forgery import one_sentence, saved_by_torch

from model import GPT
from plaingpt.formats import hugging_face
from plaingpt.formats.hugging_face import CannotLoad, load_pretrained, tokenizer_of
from plaingpt.system.messages import UserError
from plaingpt.text.publishing import write_data_set
from plaingpt.text import tokenizer_folder
from plaingpt.text.tokenizer_json import describe_tokenizer_json
from plaingpt.text.tokenizers import GPT2_VOCAB_SIZE, load_tokenizer

# ---- equal to Hugging Face ----

SHAPES = [
    {'n_layer': 1, 'n_head': 1, 'n_embd': 8, 'vocab_size': 13, 'n_positions': 7},
    {'n_layer': 3, 'n_head': 4, 'n_embd': 32, 'vocab_size': 101, 'n_positions': 24},
    {'n_layer': 2, 'n_head': 2, 'n_embd': 24, 'vocab_size': 64, 'n_positions': 9,
     'activation_function': 'gelu'},
    {'n_layer': 2, 'n_head': 2, 'n_embd': 24, 'vocab_size': 64, 'n_positions': 9,
     'n_inner': 40, 'layer_norm_epsilon': 1e-3, 'tie_word_embeddings': False},
]


@pytest.fixture(params=SHAPES)
def their_gpt2(request, tmp_path):
    """(a random GPT-2 of Hugging Face, the directory that save_pretrained wrote of it)."""
    return save_gpt2(tmp_path, std=0.3, **request.param), str(tmp_path)


def assert_computes_the_same(ours, theirs, length):
    """Compares logits, loss and the gradients of all parameters."""
    ids = tiny_ids(3, length, vocab_size=theirs.config.vocab_size)
    logits, _ = ours(ids, ids)
    expected = theirs(ids).logits
    print(f'logits differ by {(logits - expected).abs().max():.1e} of {expected.abs().max():.1f}')
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    our_loss = loss(ours, ids)
    their_loss = loss(theirs, ids)
    torch.testing.assert_close(our_loss, their_loss, atol=1e-4, rtol=1e-4)
    our_loss.backward()
    their_loss.backward()
    assert_equal_gradients(ours, theirs)


def test_a_gpt2s_logits_loss_and_gradients_equal_hugging_faces(their_gpt2):
    theirs, directory = their_gpt2
    ours = load_pretrained(directory).eval()
    assert_computes_the_same(ours, theirs, theirs.config.n_positions)


@pytest.mark.parametrize('kind, options', OF_LLAMAS_KIND, ids=str)
def test_logits_loss_and_gradients_of_llamas_kind_equal_hugging_faces(tmp_path, kind, options):
    theirs = save_theirs(tmp_path, kind, **options)
    ours = load_pretrained(str(tmp_path)).eval()
    assert_computes_the_same(ours, theirs, length=32)


@pytest.mark.parametrize('kind, options', OF_LLAMAS_KIND[:1] + OF_LLAMAS_KIND[-3:], ids=str)
def test_greedy_text_equals_hugging_faces(tmp_path, kind, options):
    theirs = save_theirs(tmp_path, kind, **options)
    ours = load_pretrained(str(tmp_path)).eval()
    ids = tiny_ids(2, 5, vocab_size=61)
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours.generate(ids, 20, temperature=0), expected)


@pytest.mark.parametrize('kind', ['Llama', 'Qwen3'])
def test_entries_of_rope_as_older_versions_write_them_mean_the_same(tmp_path, kind):
    save_theirs(tmp_path, kind, rope_parameters=LLAMA3_ROPE)
    expected = load_pretrained(str(tmp_path)).config
    assert expected.rope_theta == 500
    assert expected.rope_scaling == {'factor': 8, 'low_freq_factor': 1, 'high_freq_factor': 4,
                                     'original_context': 8}
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != 'rope_theta'}
    change_json(tmp_path / 'config.json', {'rope_theta': 500.0, 'rope_scaling': scaling,
                                           'rope_parameters': None})
    assert load_pretrained(str(tmp_path)).config == expected


def test_weights_in_bfloat16_become_the_same_numbers_in_float32(tmp_path):
    from transformers import LlamaForCausalLM
    save_theirs(tmp_path, 'Llama').to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_pretrained(str(tmp_path))
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_computes_the_same(ours.eval(), theirs.eval(), length=32)


def test_the_files_may_be_replaced_while_a_model_is_in_use(tmp_path):
    save_theirs(tmp_path, 'Llama')
    ours = load_pretrained(str(tmp_path))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(bytes(weights.stat().st_size))  # the same file, with other content
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_a_model_keeps_its_activation_and_only_dropout_can_be_overridden(their_gpt2):
    theirs, directory = their_gpt2
    ours = GPT.from_pretrained(directory, {'dropout': 0.25})
    exact = theirs.config.activation_function == 'gelu'
    assert ours.config.gelu == ('exact' if exact else 'tanh')
    assert ours.config.dropout == ours.transformer.h[0].attn.resid_dropout.p == 0.25
    with pytest.raises(ValueError, match='only dropout'):
        GPT.from_pretrained(directory, {'n_layer': 1})


def test_names_as_in_openais_own_files_are_read(tmp_path):
    from safetensors.torch import save_file
    theirs = save_gpt2(tmp_path)
    expected = load_pretrained(str(tmp_path)).state_dict()
    # No prefix and no lm_head, but the causal masks.
    bare = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    bare['h.0.attn.bias'] = torch.ones(1, 1, 4, 4)
    bare['h.0.attn.masked_bias'] = torch.tensor(-1e4)
    save_file(bare, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    for name, tensor in load_pretrained(str(tmp_path)).state_dict().items():
        assert torch.equal(tensor, expected[name])


def change_tensors(folder, changes):
    """Replaces or adds tensors of model.safetensors, {name: tensor}; None drops one."""
    from safetensors.torch import load_file, save_file
    path = folder / 'model.safetensors'
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={'format': 'pt'})


def test_a_head_that_repeats_the_embedding_and_the_pace_of_rope_are_ignored(tmp_path):
    theirs = save_theirs(tmp_path, 'Llama', tie_word_embeddings=True)
    expected = load_pretrained(str(tmp_path)).state_dict()
    embedding = theirs.model.embed_tokens.weight.detach()
    change_tensors(tmp_path, {'lm_head.weight': embedding.clone(),
                              'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(3)})
    found = load_pretrained(str(tmp_path)).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_config_is_enough_for_random_weights_in_the_same_shape(tmp_path):
    save_theirs(tmp_path, 'Qwen3')
    expected = load_pretrained(str(tmp_path))
    (tmp_path / 'model.safetensors').unlink()
    found = load_pretrained(str(tmp_path), weights=False)
    assert found.config == expected.config
    assert found.transformer.ln_f.weight.tolist() == [1] * 24


def test_random_weights_have_the_parameters_that_the_weights_at_hand_have(tmp_path):
    # The biases of this GPT-2 are all 0, so they are left out, as those of an exported model are.
    theirs = save_gpt2(tmp_path)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith('bias'):
                parameter.zero_()
    theirs.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))
    assert not loaded.config.bias
    assert load_pretrained(str(tmp_path), weights=False).config == loaded.config


def test_loading_needs_no_transformers(tmp_path, monkeypatch):
    save_theirs(tmp_path, 'Llama')
    monkeypatch.setitem(sys.modules, 'transformers', None)
    load_pretrained(str(tmp_path))


# ---- refusals ----

def assert_refused(directory, reason):
    with pytest.raises(CannotLoad, match='cannot be loaded') as refusal:
        load_pretrained(str(directory))
    message = str(refusal.value)
    assert reason in message
    assert str(directory) in message
    assert '\n' not in message


def change_json(path, changes):
    """Replaces entries of a JSON file, or all of it if the changes are no dict."""
    content = changes
    if isinstance(changes, dict):
        content = json.loads(path.read_text(encoding='utf-8')) | changes
    path.write_text(json.dumps(content), encoding='utf-8')


@pytest.mark.parametrize('changes, reason', [
    ({'model.norm.weight': None}, 'lack 1 tensors of the model in its config, model.norm.weight'),
    ({'model.norm.weight': torch.ones(25)}, 'model.norm.weight has the shape (25,), expected (24,'),
    ({'model.norm.weight': torch.ones(24, dtype=torch.int8)}, 'is torch.int8, not a float tensor'),
    ({'model.norm.weight': torch.full((24,), torch.nan)}, 'holds numbers that are not finite'),
    ({'model.norm.weight': torch.full((24,), torch.inf)}, 'holds numbers that are not finite'),
    ({'model.layers.0.self_attn.q_proj.bias': torch.zeros(24)},
     'have 1 tensors that the model in its config does not have, model.layers.0.self_attn.q_proj'),
    ({'model.layers.2.mlp.up_proj.weight': torch.zeros(40, 24)}, 'model.layers.2.mlp.up_proj'),
    ({'lm_head.weight': torch.zeros(61, 24)}, 'lm_head.weight is another matrix'),
])
def test_tensors_of_another_model_are_refused(tmp_path, changes, reason):
    save_theirs(tmp_path, 'Llama', tie_word_embeddings=True)
    change_tensors(tmp_path, changes)
    assert_refused(tmp_path, reason)


@pytest.mark.parametrize('changes, reason', [
    ({'n_layer': 3}, 'lack 12 tensors of the model in its config, transformer.h.2.attn.c_attn.b'),
    ({'n_embd': 32}, 'transformer.wte.weight has the shape (31, 16), expected (31, 32)'),
    ({'vocab_size': 2 ** 31 - 1}, 'transformer.wte.weight has the shape (31, 16)'),
])
def test_weights_of_other_sizes_than_the_config_claims_are_refused(tmp_path, changes, reason):
    save_gpt2(tmp_path)
    change_json(tmp_path / 'config.json', changes)
    assert_refused(tmp_path, reason)


@pytest.mark.parametrize('slipping', ['gpt_config', 'open_tensors', '_reader'])
def test_a_bug_while_a_model_is_loaded_keeps_its_traceback(tmp_path, monkeypatch, slipping):
    def slip(*arguments):
        raise TypeError('a slip')

    save_gpt2(tmp_path)
    monkeypatch.setattr(hugging_face, slipping, slip)
    with pytest.raises(TypeError, match='^a slip$'):
        load_pretrained(str(tmp_path))


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
    expected = load_pretrained(str(folder)).state_dict()
    change_json(folder / 'config.json', entries)
    found = load_pretrained(str(folder)).state_dict()
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
    monkeypatch.setattr(hugging_face, 'find_file', None)
    monkeypatch.setattr(hugging_face, 'read_json', None)
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
    model = load_pretrained(str(folder)).eval()
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
    (folder / 'generation_config.json').unlink()  # its eos_token_id would be looked up in the text

    def describe(text, bos, eos, chat_template):
        assert text == 'the text'
        return {'kind': 'gpt2'}

    monkeypatch.setattr(tokenizer_folder, 'describe_tokenizer_json', describe)
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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that makes {name: text} the files of all models on the hub; others are missing."""
    from huggingface_hub.errors import LocalEntryNotFoundError
    files = {}

    def download(repository, name):
        if name not in files:
            raise LocalEntryNotFoundError('offline')
        (tmp_path / name).write_text(files[name], encoding='utf-8')
        return str(tmp_path / name)

    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    return files.update


def test_the_tokenizer_of_a_hub_model_is_downloaded_as_data(hub, bpe_json):
    hub({'tokenizer.json': bpe_json, 'tokenizer_config.json': '{"eos_token": "!"}'})
    found = tokenizer_of('someone/small-gpt2')
    assert found['kind'] == 'tokenizer.json'
    assert found['eos'] == '!'


def test_a_hub_model_without_a_tokenizer_json_has_none(hub, tmp_path):
    save_gpt2(tmp_path / 'gpt2')
    hub({'config.json': (tmp_path / 'gpt2' / 'config.json').read_text(encoding='utf-8')})
    assert tokenizer_of('someone/small-gpt2') is None


def test_a_large_vocabulary_of_another_family_is_not_taken_for_gpt2s(tmp_path):
    save_theirs(tmp_path, 'Llama', vocab_size=GPT2_VOCAB_SIZE, hidden_size=8, num_hidden_layers=1)
    assert tokenizer_of(str(tmp_path)) is None


def test_a_hub_that_fails_is_refused_in_one_sentence(monkeypatch):
    import httpx

    def download(repository, name):
        raise httpx.ReadTimeout('timed out')

    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    with refusal(CannotLoad):
        tokenizer_of('someone/small-gpt2')


# ---- special tokens and chat template ----

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def with_files(tmp_path, bpe_json):
    """A function that writes {name: content} beside a tokenizer.json, and returns its dict."""
    def read(files):
        for name, content in {'tokenizer.json': bpe_json, **files}.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text, encoding='utf-8')
        found = tokenizer_of(str(tmp_path))
        return {key: found.get(key) for key in ('bos', 'eos', 'chat_template')}

    return read


@pytest.mark.parametrize('files, expected', [
    ({}, {}),
    ({'tokenizer_config.json': {'bos_token': 'a', 'eos_token': {'content': 'b', 'lstrip': False}}},
     {'bos': 'a', 'eos': 'b'}),
    ({'tokenizer_config.json': {'bos_token': None, 'eos_token': 'b'},
      'special_tokens_map.json': {'bos_token': {'content': 'c'}, 'eos_token': 'd'}},
     {'bos': 'c', 'eos': 'b'}),
    ({'generation_config.json': {'eos_token_id': 2}}, {'eos': '#'}),
    ({'generation_config.json': {'eos_token_id': [2, 3]}}, {'eos': '#'}),
    ({'generation_config.json': {'eos_token_id': 10 ** 30}}, {}),
    ({'generation_config.json': {'eos_token_id': [-1]}}, {}),
    ({'generation_config.json': {'eos_token_id': 'x'}}, {}),
    ({'tokenizer_config.json': {'eos_token': 'b'}, 'generation_config.json': {'eos_token_id': 2}},
     {'eos': 'b'}),
    ({'tokenizer_config.json': {'chat_template': TEMPLATE}}, {'chat_template': TEMPLATE}),
    ({'tokenizer_config.json': {'chat_template': 'old'}, 'chat_template.jinja': TEMPLATE},
     {'chat_template': TEMPLATE}),
    ({'tokenizer_config.json': {'chat_template': [{'name': 'tools', 'template': 'x'},
                                                  {'name': 'default', 'template': TEMPLATE}]}},
     {'chat_template': TEMPLATE}),
    ({'tokenizer_config.json': {'chat_template': [{'name': 'tools', 'template': 'x'}, 5]}}, {}),
])
def test_special_tokens_and_chat_template_come_along(with_files, files, expected):
    assert with_files(files) == {'bos': None, 'eos': None, 'chat_template': None, **expected}


@pytest.mark.parametrize('files, reason', [
    ({'tokenizer_config.json': '['}, 'tokenizer_config.json is damaged'),
    ({'tokenizer_config.json': []}, 'tokenizer_config.json holds no JSON object'),
    ({'tokenizer_config.json': {'eos_token': 5}}, 'the eos_token in tokenizer_config.json is no'),
    ({'tokenizer_config.json': {'eos_token': {'content': []}}}, 'the eos_token in tokenizer_con'),
    ({'generation_config.json': []}, 'generation_config.json holds no JSON object'),
    ({'tokenizer_config.json': {'eos_token': 'none of its tokens'}}, 'lacks the eos token'),
])
def test_damaged_files_beside_a_tokenizer_are_refused(with_files, files, reason, tmp_path):
    with refusal((CannotLoad, UserError)) as error:
        with_files(files)
    assert reason in str(error.value)
    assert str(tmp_path) in str(error.value)
