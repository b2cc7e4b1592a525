"""bench.py: its figures, and where it gets its tokens from."""
import json

import pytest
from conftest import TINY, refused, run, run_here, succeeded

KEYS = {key: TINY[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'device')} | {
    'vocab_size': 50, 'num_steps': 4, 'warmup_steps': 1}


def test_the_figures_belong_together_and_synthetic_tokens_are_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout = succeeded(run_here('bench.py', **KEYS, dataset='nowhere', json='figures.json'))
    assert 'nowhere/train.bin is missing, so the tokens are random' in stdout
    figures = json.loads((tmp_path / 'figures.json').read_text())
    assert figures['tokens_per_s'] == pytest.approx(4 * 16 / figures['ms_per_step'] * 1000)
    assert figures['peak_memory_bytes'] > 1e6 and figures['mfu'] is None
    assert f"{figures['ms_per_step']:.2f} ms" in stdout and 'MFU n/a' in stdout
    assert not (tmp_path / 'bench_log').exists()


def test_a_profile_is_a_trace_and_a_table(tmp_path, char_data):
    stdout = succeeded(run('bench.py', **KEYS, dataset=char_data, profile=True, dtype='bfloat16', cwd=tmp_path))
    assert 'random' not in stdout and 'Self CPU' in stdout and 'aten::' in stdout and 'bfloat16' in stdout
    trace, = (tmp_path / 'bench_log').glob('*.pt.trace.json')
    assert json.loads(trace.read_text())['traceEvents']


def test_what_cannot_be_measured_is_said_in_one_sentence(tmp_path, char_data, monkeypatch):
    assert 'multiple of n_head' in refused(run_here('bench.py', **{**KEYS, 'n_head': 3}))
    noted = succeeded(run_here('bench.py', **{**KEYS, 'vocab_size': 3}, dataset=char_data))
    assert 'tokens, so the tokens are random' in noted
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bench_log').write_text('in the way')
    assert 'the trace cannot be written' in refused(run_here('bench.py', **KEYS, real_data=False, profile=True))
    assert 'json: ' in refused(run_here('bench.py', **KEYS, real_data=False, json=tmp_path / 'no' / 'folder.json'))
