"""A model has more rows than its trained tokenizer has tokens: no script may choose the others."""
import json
import shutil

import pytest
import torch
from conftest import TINY, refused, run_here, succeeded
from runs import losses, state

from plaingpt.formats.gguf_file import read_gguf
from plaingpt.text.publishing import write_data_set
from plaingpt.text.tokenizer_training import train_tokenizer
from plaingpt.training import checkpoints
from plaingpt.training.trained_model import open_trained

TOKENS = 300
ROWS = 320  # the next multiple of 64


@pytest.fixture(scope='module')
def data(tmp_path_factory, text):
    """The folder of a data set with a trained tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp('bpe_data')
    tokenizer = train_tokenizer([text], TOKENS)
    ids, = tokenizer.encode_corpus([text])
    cut = len(ids) * 9 // 10
    write_data_set(str(folder), tokenizer, {'train': ids[:cut], 'val': ids[cut:]}, 'a test', None)
    return folder


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory, data):
    """The folder of a run on it."""
    out_dir = tmp_path_factory.mktemp('run')
    keys = TINY | {'always_save_checkpoint': True, 'bias': True}
    succeeded(run_here('train.py', **keys, dataset=data, out_dir=out_dir))
    return out_dir


@pytest.fixture(scope='module')
def eager_dir(tmp_path_factory, run_dir):
    """The same run with weights that make the rows without a token by far the likeliest."""
    checkpoint = state(run_dir / 'ckpt.pt')
    # Every hidden state begins with 1, and only the rows without a token have a weight for it.
    checkpoint['model']['transformer.ln_f.weight'][0] = 0
    checkpoint['model']['transformer.ln_f.bias'][0] = 1
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        checkpoint['model'][name][:TOKENS, 0] = 0
        checkpoint['model'][name][TOKENS:, 0] = 100
    out_dir = tmp_path_factory.mktemp('eager')
    checkpoints.save(str(out_dir), checkpoint, ['ckpt'])
    return out_dir


def test_a_new_model_has_a_multiple_of_64_rows_and_resumes(run_dir, data, tmp_path):
    assert state(run_dir / 'ckpt.pt')['model_args']['vocab_size'] == ROWS
    keys = TINY | {'always_save_checkpoint': True, 'max_iters': 8, 'lr_decay_iters': 8}
    in_one = tmp_path / 'one'
    succeeded(run_here('train.py', **keys, dataset=data, out_dir=in_one))
    in_two = tmp_path / 'two'
    succeeded(run_here('train.py', **keys | {'max_iters': 6}, dataset=data, out_dir=in_two))
    succeeded(run_here('train.py', **keys, dataset=data, out_dir=in_two, init_from='resume'))
    assert losses(in_two)[8] == losses(in_one)[8]


@pytest.mark.parametrize('tokens, named', [
    (TOKENS, 'another vocabulary'), (ROWS + 1, f'{ROWS + 1} tokens')])
def test_a_run_does_not_resume_after_its_data_got_another_tokenizer(data, tmp_path, text, tokens,
                                                                    named):
    folder = tmp_path / 'data'
    shutil.copytree(data, folder)
    keys = TINY | {'dataset': folder, 'out_dir': tmp_path / 'run'}
    succeeded(run_here('train.py', **keys | {'max_iters': 1}))
    other = train_tokenizer([text + text.upper()], tokens)
    ids, = other.encode_corpus([text])
    write_data_set(str(folder), other, {'train': ids, 'val': ids[:999]}, 'a test', None)
    assert named in refused(run_here('train.py', **keys, init_from='resume'))


@pytest.mark.parametrize('temperature', [0, 1])
def test_no_completion_has_an_id_without_a_token(eager_dir, temperature):
    logits, _ = open_trained('resume', str(eager_dir)).gpt(torch.zeros(1, 1, dtype=torch.int64))
    assert logits.argmax() >= TOKENS
    printed = succeeded(run_here('sample.py', out_dir=eager_dir, num_samples=2, max_new_tokens=20,
                                 temperature=temperature, start='the king', device='cpu'))
    completions = printed.split('\n---------------')[:2]
    for completion in completions:
        # Each of 20 tokens has a text; an id without a token would have none.
        assert len(completion.strip()) >= len('the king') + 10


def test_losses_are_measured_and_per_byte(run_dir, data):
    printed = succeeded(run_here('evaluate.py', out_dir=run_dir, dataset=data, device='cpu'))
    assert 'bits per byte' in printed


def test_a_folder_for_transformers_has_the_tokens_alone(eager_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    output = tmp_path / 'hf'
    succeeded(run_here('export.py', out_dir=eager_dir, output=output, to='hf'))
    assert json.loads((output / 'config.json').read_text())['vocab_size'] == TOKENS
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) == TOKENS
    model = AutoModelForCausalLM.from_pretrained(output)
    prompt = tokenizer('the king', return_tensors='pt')
    ids = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert ids.max() < TOKENS
    succeeded(run_here('sample.py', init_from=output, num_samples=1, max_new_tokens=5,
                       device='cpu'))


def test_a_gguf_file_has_the_tokens_alone(eager_dir, tmp_path):
    output = tmp_path / 'there.gguf'
    succeeded(run_here('export.py', out_dir=eager_dir, output=output, to='gguf'))
    assert len(read_gguf(str(output)).metadata['tokenizer.ggml.tokens']) == TOKENS
    succeeded(run_here('sample.py', init_from=output, num_samples=1, max_new_tokens=5,
                       device='cpu'))
