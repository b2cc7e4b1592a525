"""export.py as a command: folders for transformers, files for llama.cpp, adapters for peft."""
import json
import os
import re

import pytest
import torch
from conftest import refused, run_here, succeeded
from fine_tuning import ABC, add_adapter, save_run
from generating import lively_gpt

from plaingpt.formats import export_check, foreign_weights
from plaingpt.formats.peft_adapter import save_adapter
from plaingpt.training import lora
from plaingpt.training.lora import LoraSettings
from plaingpt.training.trained_model import open_trained

LLAMA = dict(position='rope', norm='rmsnorm', mlp='swiglu', tied=False, bias=False)
MODELS = {
    'GPT2LMHeadModel': dict(bias=False),
    'LlamaForCausalLM': LLAMA | dict(n_kv_head=1),
    'Qwen2ForCausalLM': LLAMA | dict(qkv_bias=True),
    'Qwen3ForCausalLM': LLAMA | dict(qk_norm=True),
    'ArceeForCausalLM': LLAMA | dict(mlp='relu2'),
}


def save_lively(folder, **options):
    """Saves a run whose model writes text that varies; its 31 tokens are those of ABC."""
    return save_run(folder, lively_gpt(**options))


def export(out_dir, output, **keys):
    return run_here('export.py', out_dir=out_dir, output=output, **keys)


@pytest.mark.parametrize('to', ['hf', 'gguf'])
@pytest.mark.parametrize('architecture', MODELS)
def test_a_model_is_exported_compared_and_comes_back_bit_for_bit(tmp_path, architecture, to):
    out_dir = save_lively(tmp_path / 'run', **MODELS[architecture])
    output = str(tmp_path / 'there.gguf' if to == 'gguf' else tmp_path / 'there')
    printed = succeeded(export(out_dir, output, to=to))
    assert printed.startswith(f'{output}: {architecture}, ')
    program = "llama.cpp's log-probabilities" if to == 'gguf' else 'the logits of transformers'
    assert f'{program} differ' in printed

    before = open_trained('resume', out_dir)
    after = open_trained(output)
    assert after.gpt.config == before.gpt.config
    weights = after.gpt.state_dict()
    assert weights.keys() == before.gpt.state_dict().keys()
    for name, weight in before.gpt.state_dict().items():
        assert torch.equal(weights[name], weight), name


def test_an_exact_gelu_becomes_a_tanh_in_a_gguf_file_with_a_warning(tmp_path):
    out_dir = save_lively(tmp_path / 'run', gelu='exact')
    finished = export(out_dir, str(tmp_path / 'there.gguf'), to='gguf')
    succeeded(finished)
    assert 'warning: llama.cpp has only the tanh form of GELU' in finished.stderr
    assert open_trained(str(tmp_path / 'there.gguf')).gpt.config.gelu == 'tanh'


def test_others_may_read_an_export_that_may_read_its_folder(tmp_path):
    out_dir = save_lively(tmp_path / 'run', **LLAMA)
    succeeded(export(out_dir, str(tmp_path / 'there')))
    modes = {os.stat(path).st_mode & 0o777 for path in (tmp_path / 'there').iterdir()}
    assert modes == {os.stat(tmp_path / 'there').st_mode & 0o666}


@pytest.mark.parametrize('to, type', [('hf', 'f16'), ('hf', 'bf16'), ('gguf', 'f16'),
                                      ('gguf', 'bf16'), ('gguf', 'q8_0')])
def test_the_matrices_are_rounded_to_a_type(tmp_path, to, type):
    out_dir = save_lively(tmp_path / 'run', **LLAMA, n_embd=32)
    output = str(tmp_path / 'there.gguf' if to == 'gguf' else tmp_path / 'there')
    printed = succeeded(export(out_dir, output, to=to, type=type))
    assert 'differ' in printed
    before = open_trained('resume', out_dir).gpt.lm_head.weight
    after = open_trained(output).gpt.lm_head.weight
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)


@pytest.mark.parametrize('type', ['q4_0', 'q4_1'])
def test_four_bits_change_much_and_the_output_says_how_much(tmp_path, type):
    out_dir = save_lively(tmp_path / 'run', **LLAMA, n_embd=32)
    output = str(tmp_path / 'there.gguf')
    printed = succeeded(export(out_dir, output, to='gguf', type=type))
    found = re.search(f'{type} changes the logits by at most (.+) of (.+), and the likeliest token '
                      r"at (\d+) of 16 positions; llama.cpp's log-probabilities", printed)
    before = open_trained('resume', out_dir).gpt
    after = open_trained(output).gpt
    ids = export_check.probe(before.config)
    assert ids.shape == (1, 16)
    ours = export_check.logits_of(before, ids, 31)
    theirs = export_check.logits_of(after, ids, 31)
    assert float(found[1]) == pytest.approx((theirs - ours).abs().max().item(), rel=0.06)
    assert float(found[2]) == pytest.approx(ours.abs().max().item(), abs=0.06)
    assert int(found[3]) == (theirs.argmax(-1) != ours.argmax(-1)).sum()
    # Each row is one block, in which no number moves by more than an eighth of the largest.
    bound = before.lm_head.weight.abs().amax(dim=1, keepdim=True) / 8
    assert ((after.lm_head.weight - before.lm_head.weight).abs() <= bound * 1.01).all()


def test_sample_writes_the_same_text_from_the_export(tmp_path):
    out_dir = save_lively(tmp_path / 'run', **LLAMA)
    keys = {'start': 'abc', 'num_samples': 1, 'max_new_tokens': 12, 'temperature': 0,
            'device': 'cpu', 'dtype': 'float32'}
    text = succeeded(run_here('sample.py', out_dir=out_dir, **keys))
    for to, name in ('hf', 'there'), ('gguf', 'there.gguf'):
        output = str(tmp_path / name)
        succeeded(export(out_dir, output, to=to))
        assert succeeded(run_here('sample.py', init_from=output, **keys)) == text


def test_the_model_card_has_the_figures_of_the_run(tmp_path):
    gpt = lively_gpt(**LLAMA)
    out_dir = save_run(tmp_path / 'run', gpt, iter_num=1234, best_val_loss=1.2345,
                       tokens_seen=56789, config={'dataset': 'fables'})
    succeeded(export(out_dir, str(tmp_path / 'there')))
    card = (tmp_path / 'there' / 'README.md').read_text(encoding='utf-8')
    for figure in '1,234', '1.2345', '56,789', 'fables', torch.__version__:
        assert figure in card


def test_the_padding_of_the_vocabulary_is_left_out(tmp_path):
    out_dir = save_run(tmp_path / 'run', lively_gpt(**LLAMA, vocab_size=64))
    succeeded(export(out_dir, str(tmp_path / 'there')))
    config = json.loads((tmp_path / 'there' / 'config.json').read_text(encoding='utf-8'))
    assert config['vocab_size'] == 31
    before = open_trained('resume', out_dir).gpt.lm_head.weight
    assert torch.equal(open_trained(str(tmp_path / 'there')).gpt.lm_head.weight, before[:31])


def test_a_soft_cap_is_warned_of_and_leaves_greedy_text_as_it_is(tmp_path):
    out_dir = save_lively(tmp_path / 'run', **LLAMA, logit_softcap=2.0)
    finished = export(out_dir, str(tmp_path / 'there'))
    succeeded(finished)
    assert 'warning: no other program has logit_softcap=2.0' in finished.stderr
    prompt = torch.tensor([[1, 2, 3]])
    texts = [open_trained(*source).gpt.generate(prompt, 12, temperature=0).tolist()
             for source in (('resume', out_dir), (str(tmp_path / 'there'),))]
    assert texts[0] == texts[1]


# ---- LoRA ----

ADAPTED = {
    'gpt2': {},
    'llama': LLAMA | dict(n_kv_head=1),
    'llama with a soft cap': LLAMA | dict(logit_softcap=2.0),
}


@pytest.fixture(params=ADAPTED)
def adapted(request, tmp_path):
    """The folder of an adapter, as a LoRA run on the model in tmp_path/base leaves it."""
    base = save_lively(tmp_path / 'base', **ADAPTED[request.param])
    gpt = open_trained('resume', base).gpt
    settings = LoraSettings(3, 12.0, 0.0, 'c_attn,c_fc,attn.c_proj', base,
                            lora.digest_of_base(gpt))
    add_adapter(gpt, targets=settings.targets)
    folder = str(tmp_path / 'adapter')
    save_adapter(folder, gpt, settings, ABC)
    return folder


@pytest.mark.parametrize('to', ['hf', 'gguf'])
def test_an_adapter_is_merged(tmp_path, adapted, to):
    output = str(tmp_path / 'there.gguf' if to == 'gguf' else tmp_path / 'there')
    succeeded(run_here('export.py', adapter=adapted, to=to, output=output))
    merged = open_trained(None, adapter=adapted).gpt
    after = open_trained(output).gpt
    assert torch.equal(after.transformer.h[1].attn.c_attn.weight,
                       merged.transformer.h[1].attn.c_attn.weight)


def test_an_adapter_is_exported_for_peft_and_the_exported_base(tmp_path, adapted):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    output = str(tmp_path / 'there')
    printed = succeeded(run_here('export.py', adapter=adapted, to='peft', output=output))
    assert 'the logits of peft differ from ours by at most' in printed
    assert sorted(os.listdir(output)) == ['adapter_config.json', 'adapter_model.safetensors']

    base = str(tmp_path / 'base-there')
    succeeded(run_here('export.py', out_dir=tmp_path / 'base', output=base))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output)
    ids = torch.randint(31, (1, 16), generator=torch.Generator().manual_seed(3))
    gpt = open_trained(None, adapter=adapted).gpt
    gpt.config.logit_softcap = 0.0
    ours, _ = gpt(ids, ids)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-4)


# ---- refusals ----

@pytest.mark.parametrize('options, keys, sentence', [
    (dict(position='alibi'), {}, "has no position='alibi'"),
    (dict(position='none', bias=False), {'to': 'gguf'}, "has no position='none'"),
    (LLAMA, {'output': ''}, "output='' cannot be a file or folder"),
    (LLAMA, {'type': 'q8_0'}, 'type=q8_0 is for gguf'),
    (LLAMA, {'type': 'q4_0'}, 'type=q4_0 is for gguf'),
    (LLAMA, {'to': 'peft'}, 'to=peft needs the adapter'),
    (LLAMA, {'to': 'onnx'}, "to='onnx'"),
    (LLAMA, {'out_dir': 'nowhere'}, 'nowhere holds no checkpoint'),
])
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path, options, keys,
                                                                    sentence):
    out_dir = save_lively(tmp_path / 'run', **options)
    keys = {'out_dir': out_dir, 'output': str(tmp_path / 'there'), **keys}
    assert sentence in refused(run_here('export.py', **keys))
    assert os.listdir(tmp_path) == ['run']


def test_an_output_that_exists_stays_as_it_is(tmp_path):
    out_dir = save_lively(tmp_path / 'run', **LLAMA)
    output = tmp_path / 'there'
    output.mkdir()
    (output / 'thesis.txt').write_text('three years of work', encoding='utf-8')
    assert 'exists: remove it, or name another' in refused(export(out_dir, str(output)))
    assert os.listdir(output) == ['thesis.txt']


@pytest.mark.parametrize('to', ['hf', 'gguf'])
def test_an_export_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, to):
    def wrong_tensors(gpt, vocab_size, form, original=foreign_weights.named_tensors):
        for name, tensor in original(gpt, vocab_size, form):
            is_first = 'layers.0.self_attn.k_proj' in name or 'blk.0.attn_k' in name
            yield name, tensor.flip(0) if is_first else tensor

    monkeypatch.setattr('plaingpt.formats.hugging_face_export.named_tensors', wrong_tensors)
    monkeypatch.setattr('plaingpt.formats.gguf_writing.named_tensors', wrong_tensors)
    out_dir = save_lively(tmp_path / 'run', **LLAMA)
    sentence = refused(export(out_dir, str(tmp_path / 'there'), to=to))
    assert 'differ' in sentence
    assert 'nothing was written' in sentence
    assert os.listdir(tmp_path) == ['run']


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('safetensors.torch.save_file', fail)
    out_dir = save_lively(tmp_path / 'run', **LLAMA)
    sentence = refused(export(out_dir, str(tmp_path / 'there')))
    assert 'cannot be written: ' in sentence
    assert 'No space left on device' in sentence
    assert os.listdir(tmp_path) == ['run']
