"""plaingpt/formats/hugging_face_export.py: transformers computes the same with an export."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_ids
from foreign import OPTIONS, ROPE, SWIGLU, random_gpt

from plaingpt.formats import hugging_face_export
from plaingpt.formats.families import NoTarget
from plaingpt.formats.hugging_face import load_pretrained, tokenizer_of
from plaingpt.formats.hugging_face_export import (export_hugging_face, logits_by_transformers,
                                                  write_safetensors)
from plaingpt.system.messages import UserError

CHARS = {'kind': 'char', 'chars': list('\nabcdefghijklmnopqrstuvwxyzABCD')}  # 31, as tiny_gpt has
SCALING = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_context': 8}
EXPORTED = [
    *OPTIONS,
    ('llama', {**SWIGLU, 'block_size': 48, 'rope_scaling': SCALING, 'rope_theta': 500.0}),
    ('qwen3', {**SWIGLU, 'qk_norm': True, 'rope_scaling': SCALING, 'block_size': 48}),
    ('arcee', {**ROPE, 'mlp': 'relu2', 'mlp_width': 24, 'norm_eps': 1e-3, 'tied': False}),
]


def logits(gpt, ids):
    with torch.no_grad():
        return gpt(ids, ids)[0]


def same_weights(gpt, other):
    """Whether two GPTs have the same parameters, bit for bit."""
    ours = gpt.state_dict()
    theirs = other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name])
                                              for name in ours)


# ---- the same model ----

@pytest.mark.parametrize('name, options', EXPORTED)
def test_transformers_computes_the_same_and_the_way_back_is_exact(tmp_path, name, options):
    gpt = random_gpt(**options)
    export_hugging_face(tmp_path, gpt, CHARS)
    ids = tiny_ids(2, gpt.config.block_size)
    theirs = logits_by_transformers(tmp_path, ids)
    ours = logits(gpt, ids)
    print(f'{name}: logits differ by {(ours - theirs).abs().max():.1e} of {ours.abs().max():.1f}')
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    back = load_pretrained(str(tmp_path))
    assert back.config == gpt.config
    assert same_weights(back, gpt)
    assert tokenizer_of(str(tmp_path)) == CHARS


@pytest.mark.parametrize('name, options', EXPORTED)
def test_transformers_own_tools_write_the_same_greedy_text(tmp_path, name, options):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    gpt = random_gpt(**options)
    export_hugging_face(tmp_path, gpt, CHARS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer('cab', return_tensors='pt')
    theirs = model.generate(**prompt, max_new_tokens=10, do_sample=False)
    ids = torch.tensor([[CHARS['chars'].index(char) for char in 'cab']])
    ours = gpt.generate(ids, 10, temperature=0)
    assert torch.equal(ours, theirs)
    assert tokenizer.decode(theirs[0]) == ''.join(CHARS['chars'][i] for i in ours[0])


def test_rows_that_pad_the_vocabulary_are_left_out(tmp_path):
    gpt = random_gpt(vocab_size=64, tied=False)
    export_hugging_face(tmp_path, gpt, CHARS)
    ids = tiny_ids(2, 16)
    theirs = logits_by_transformers(tmp_path, ids)
    assert theirs.shape == (2, 16, 31)
    torch.testing.assert_close(logits(gpt, ids)[..., :31], theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_type_that_is_asked_for(tmp_path, dtype):
    gpt = random_gpt(**SWIGLU)
    export_hugging_face(tmp_path, gpt, CHARS, dtype)
    assert json.loads((tmp_path / 'config.json').read_text())['dtype'] == str(dtype)[6:]
    for parameter in gpt.parameters():
        parameter.data = parameter.data.to(dtype).float()
    assert same_weights(load_pretrained(str(tmp_path)), gpt)
    ids = tiny_ids(2, 16)
    theirs = logits_by_transformers(tmp_path, ids)
    torch.testing.assert_close(logits(gpt, ids), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('options', [{'bias': False}, {**SWIGLU, 'n_kv_head': 2}])
def test_large_models_are_written_in_shards(tmp_path, monkeypatch, options):
    monkeypatch.setattr(hugging_face_export, 'LARGEST_FILE', 2000)
    gpt = random_gpt(**options)
    export_hugging_face(tmp_path, gpt, CHARS)
    shards = sorted(path.name for path in tmp_path.glob('*.safetensors'))
    assert len(shards) > 3
    assert shards[0] == f'model-00001-of-{len(shards):05}.safetensors'
    assert same_weights(load_pretrained(str(tmp_path)), gpt)
    ids = tiny_ids(2, 16)
    theirs = logits_by_transformers(tmp_path, ids)
    torch.testing.assert_close(logits(gpt, ids), theirs, atol=1e-4, rtol=1e-4)


def test_shards_are_as_large_as_allowed(tmp_path):
    tensors = {'c': torch.ones(50), 'a': torch.ones(6), 'b': torch.ones(4), 'd': torch.ones(10)}
    write_safetensors(tmp_path, tensors.items(), torch.float32, largest_file=40)
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    assert index['metadata'] == {'total_size': 280}
    numbers = {name: file[6:11] for name, file in index['weight_map'].items()}
    assert numbers == {'c': '00001', 'a': '00002', 'b': '00002', 'd': '00003'}


# ---- what stands beside the weights ----

@pytest.fixture(scope='module')
def bpe():
    """The dict of a small tokenizer with special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(['<s>', '</s>'])
    template = ("{% for message in messages %}{{ '<s>' + message['role'] + ': ' + "
                "message['content'] + '</s>' }}{% endfor %}")
    return {'kind': 'tokenizer.json', 'json': tokenizer.to_str(), 'bos': '<s>', 'eos': '</s>',
            'chat_template': template}


def test_a_tokenizer_with_its_special_tokens_and_chat_template_is_written(tmp_path, bpe):
    from transformers import AutoConfig, AutoTokenizer
    gpt = random_gpt(**SWIGLU, vocab_size=320)
    export_hugging_face(tmp_path, gpt, bpe)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.vocab_size == 258
    assert (config.bos_token_id, config.eos_token_id) == (256, 257)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (256, 257)
    assert theirs.model_max_length == 16
    chat = [{'role': 'user', 'content': 'hi'}]
    assert theirs.apply_chat_template(chat, tokenize=False) == '<s>user: hi</s>'
    generation = json.loads((tmp_path / 'generation_config.json').read_text())
    assert generation == {'bos_token_id': 256, 'eos_token_id': 257}

    found = tokenizer_of(str(tmp_path))
    for key in ('kind', 'bos', 'eos', 'chat_template'):
        assert found[key] == bpe[key]
    assert json.loads(found['json']) == json.loads(bpe['json'])


def test_without_special_tokens_their_ids_are_null(tmp_path):
    export_hugging_face(tmp_path, random_gpt(), CHARS)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert (config['bos_token_id'], config['eos_token_id']) == (None, None)


def test_the_model_card_says_which_library_loads_the_model(tmp_path):
    export_hugging_face(tmp_path, random_gpt(**SWIGLU), CHARS, card='# A tiny model\n\nLoss 3.2.\n')
    card = (tmp_path / 'README.md').read_text(encoding='utf-8')
    _, header, body = card.split('---\n')
    assert 'library_name: transformers\npipeline_tag: text-generation\n' in header
    assert '- llama\n' in header
    assert body == '\n# A tiny model\n\nLoss 3.2.\n'


# ---- refusals ----

def test_a_model_that_transformers_lacks_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(NoTarget, match='logit_softcap=30.0'):
        export_hugging_face(tmp_path, random_gpt(logit_softcap=30.0), CHARS)
    with pytest.raises(NoTarget, match='must|needs'):
        options = {**SWIGLU, 'n_head': 3, 'head_size': 4}
        export_hugging_face(tmp_path, random_gpt(**options), CHARS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('value, dtype', [(1e5, torch.float16), (torch.nan, torch.float32)])
def test_a_number_that_the_type_can_not_hold_is_refused(tmp_path, value, dtype):
    gpt = random_gpt()
    gpt.transformer.ln_f.weight.data[3] = value
    with pytest.raises(UserError, match=rf'transformer.ln_f.weight.*not finite in {dtype}'):
        export_hugging_face(tmp_path, gpt, CHARS, dtype)


def test_a_folder_that_can_not_be_written_raises_an_os_error(tmp_path):
    with pytest.raises(OSError):
        export_hugging_face(tmp_path / 'missing', random_gpt(), CHARS)


# ---- memory ----

MEASURE = '''
import sys
from conftest import tiny_gpt
from plaingpt.formats.hugging_face_export import export_hugging_face

def peak():
    status = open('/proc/self/status', encoding='utf-8').read()
    return int(status.split('VmHWM:')[1].split()[0]) * 1024

chars = {'kind': 'char', 'chars': [chr(0x4e00 + i) for i in range(2000)]}
export_hugging_face(sys.argv[1], tiny_gpt(), {'kind': 'char', 'chars': ['a']})
before = peak()
gpt = tiny_gpt(n_layer=8, n_embd=768, n_head=12, vocab_size=2000)
export_hugging_face(sys.argv[1], gpt, chars)
print((peak() - before) / (4 * gpt.get_num_params()))
'''


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='measures memory as Linux does')
def test_an_export_takes_at_most_twice_the_memory_of_the_weights(tmp_path):
    """GPT-2 is the worst case, because transformers stores its matrices transposed."""
    finished = subprocess.run([sys.executable, '-c', MEASURE, str(tmp_path)], cwd=ROOT / 'tests',
                              env={**os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'},
                              capture_output=True, text=True, encoding='utf-8')
    assert finished.returncode == 0, finished.stderr
    print(f'the export took {float(finished.stdout):.2f} times the memory of the weights')
    assert float(finished.stdout) < 2.2
