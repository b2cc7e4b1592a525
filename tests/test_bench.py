"""bench.py: its figures, and where it gets its tokens from."""
import json

import pytest
from conftest import TINY, refused, run, run_here, succeeded

from plaingpt.text.tokenizers import GPT2Tokenizer

KEYS = {key: TINY[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'device')} | {
    'vocab_size': 50, 'num_steps': 4, 'warmup_steps': 1}


def test_the_figures_belong_together_and_synthetic_tokens_are_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout = succeeded(run_here('bench.py', **KEYS, dataset='nowhere', json='figures.json'))
    assert 'nowhere/train.bin is missing, so the tokens are random' in stdout
    figures = json.loads((tmp_path / 'figures.json').read_text())
    assert figures['tokens_per_s'] == pytest.approx(4 * 16 / figures['ms_per_step'] * 1000)
    assert figures['peak_memory_bytes'] > 1e6 and figures['mfu'] is None
    assert f"{figures['ms_per_step']:.2f} ms" in stdout and 'MFU      n/a' in stdout
    assert not (tmp_path / 'bench_log').exists()


@pytest.mark.parametrize('mode, baseline', [('train', 'hf'), ('train', 'plain'), ('decode', 'hf'), ('decode', 'plain')])
def test_a_baseline_is_timed_in_turns_and_the_ratio_is_of_tokens_a_second(tmp_path, mode, baseline):
    keys = dict(mode=mode, baseline=baseline, context=3, new_tokens=5, real_data=False, json=tmp_path / 'figures.json')
    stdout = succeeded(run_here('bench.py', **KEYS, **keys))
    figures = json.loads((tmp_path / 'figures.json').read_text())
    assert figures['ratio'] == pytest.approx(figures['tokens_per_s'] / figures['baseline_tokens_per_s'])
    tokens = 4 * 16 if mode == 'train' else 4 * 5
    assert figures['tokens_per_s'] == pytest.approx(tokens / figures['ms_per_step'] * 1000)
    assert f"ratio    {figures['ratio']:.2f}" in stdout and f'\n{baseline:8} ' in stdout


@pytest.mark.parametrize('baseline', ['', pytest.param('plain', marks=pytest.mark.slow)])
def test_preparation_is_timed_from_text_to_files(tmp_path, baseline):
    import datasets
    texts = [f'document {number} of some, ' * 20 for number in range(200)]
    datasets.Dataset.from_dict({'text': texts}).to_parquet(tmp_path / 'texts.parquet')
    keys = dict(mode='prepare', data_files=tmp_path / '*.parquet', num_steps=1, json=tmp_path / 'figures.json')
    succeeded(run_here('bench.py', **keys, baseline=baseline))
    figures = json.loads((tmp_path / 'figures.json').read_text())
    assert figures['tokens_per_s'] * figures['ms_per_step'] / 1000 == pytest.approx(
        len(GPT2Tokenizer().encode_documents(texts)))
    assert figures['peak_memory_bytes'] > 1e6


def test_a_profile_is_a_trace_and_a_table(tmp_path, char_data):
    stdout = succeeded(run('bench.py', **KEYS, dataset=char_data, profile=True, dtype='bfloat16', cwd=tmp_path))
    assert 'random' not in stdout and 'Self CPU' in stdout and 'aten::' in stdout and 'bfloat16' in stdout
    trace, = (tmp_path / 'bench_log').glob('*.pt.trace.json')
    assert json.loads(trace.read_text())['traceEvents']


def test_what_cannot_be_measured_is_said_in_one_sentence(tmp_path, char_data, monkeypatch):
    assert 'multiple of n_head' in refused(run_here('bench.py', **{**KEYS, 'n_head': 3}))
    noted = succeeded(run_here('bench.py', **{**KEYS, 'vocab_size': 3}, dataset=char_data))
    assert 'tokens, so the tokens are random' in noted
    assert '--data_files=' in refused(run_here('bench.py', mode='prepare'))
    assert 'neither' in refused(run_here('bench.py', mode='prepare', data_files='x', baseline='hf'))
    assert 'is more' in refused(run_here('bench.py', mode='decode', baseline='hf', context=1000, new_tokens=99))
    assert 'texts/no' in refused(run_here('bench.py', mode='prepare', data_files='texts/no', num_steps=1))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bench_log').write_text('in the way')
    assert 'the trace cannot be written' in refused(run_here('bench.py', **KEYS, real_data=False, profile=True))
    assert 'json: ' in refused(run_here('bench.py', **KEYS, real_data=False, json=tmp_path / 'no' / 'folder.json'))
