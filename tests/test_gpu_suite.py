"""experiments/gpu_suite.py in small, on a CPU: its parts, its record, its table."""
import json

import pytest
import torch
from conftest import ROOT, refused, run_here, succeeded

from plaingpt.system import devices

SUITE = 'experiments/gpu_suite.py'
GUIDE = ROOT / 'docs' / 'gpu.md'


def suite(folder, data, **keys):
    """The finished suite, in small unless keys say otherwise, with its results in a folder."""
    keys = {'small': True, 'device': 'cpu', 'dataset': data, **keys}
    return run_here(SUITE, json=folder / 'suite.json', **keys)


def results_of(folder):
    return json.loads((folder / 'suite.json').read_text(encoding='utf-8'))['parts']


def test_parts_are_recorded_and_the_table_is_written_beside_the_record(tmp_path, char_data):
    guide = GUIDE.read_text(encoding='utf-8')
    stdout = succeeded(suite(tmp_path, char_data, part='step_12,fp16'))
    assert f'the table is in {tmp_path / "suite.md"}' in stdout
    assert GUIDE.read_text(encoding='utf-8') == guide

    results = results_of(tmp_path)
    assert list(results) == ['step_12', 'fp16']
    assert all(result['error'] is None and result['seconds'] > 0 for result in results.values())
    assert results['step_12']['figures'][0]['ratio'] > 0
    table = (tmp_path / 'suite.md').read_text(encoding='utf-8')
    assert '2 of 25 parts done' in table and 'In small' in table
    assert '| step_12 | 124M, eager, 2 x 32 tokens |' in table
    assert "| step_12 | against nanoGPT's way |" in table
    assert '| fp16 | float16 with the scaler | validation loss' in table
    assert (tmp_path / 'suite' / 'fp16' / 'log.txt').exists()
    # Tiny shapes neither reach nor miss a target.
    assert 'reached' not in table and 'missed' not in table


def test_finished_parts_are_skipped_unless_asked_for_again(tmp_path, char_data):
    succeeded(suite(tmp_path, char_data, part='decode_124m'))
    first = results_of(tmp_path)
    stdout = succeeded(suite(tmp_path, char_data, part='decode_124m'))
    assert 'decode_124m: done before' in stdout and results_of(tmp_path) == first
    succeeded(suite(tmp_path, char_data, part='decode_124m', again=True))
    assert results_of(tmp_path)['decode_124m']['seconds'] != first['decode_124m']['seconds']


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path, char_data, monkeypatch):
    from plaingpt.benchmarking.part import PartFailed, PartRun
    original = PartRun.bench

    def bench(run, keys):
        if run.folder.name == 'step_12_eager':
            raise PartFailed('exit status 2: error: the GPU is out of memory')
        return original(run, keys)

    monkeypatch.setattr(PartRun, 'bench', bench)
    finished = suite(tmp_path, char_data, part='step_12_eager,decode_124m')
    assert finished.returncode == 1
    assert 'error: failed: step_12_eager;' in finished.stderr
    results = results_of(tmp_path)
    assert results['decode_124m']['error'] is None
    assert 'out of memory' in results['step_12_eager']['error']
    table = (tmp_path / 'suite.md').read_text(encoding='utf-8')
    assert '| step_12_eager | **failed** | exit status 2: error: the GPU is out of memory' in table

    # A failed part is tried again.
    monkeypatch.undo()
    succeeded(suite(tmp_path, char_data, part='step_12_eager,decode_124m'))
    assert results_of(tmp_path)['step_12_eager']['error'] is None


def test_no_part_but_the_first_begins_when_the_time_is_up(tmp_path, char_data, monkeypatch):
    from plaingpt.benchmarking.part import PartFailed, PartRun
    keys = dict(part='decode_124m,fp16', minutes=1e-9)
    finished = suite(tmp_path, char_data, **keys)
    assert finished.returncode == 75
    assert 'the time is up, and 1 parts are left' in finished.stdout
    assert list(results_of(tmp_path)) == ['decode_124m']

    # Failed parts and parts that are left are both reported.
    def bench(run, keys):
        raise PartFailed('exit status 2')

    monkeypatch.setattr(PartRun, 'bench', bench)
    finished = suite(tmp_path, char_data, again=True, **keys)
    assert finished.returncode == 1
    assert 'the time is up, and 1 parts are left' in finished.stdout
    assert 'error: failed: decode_124m;' in finished.stderr


def test_a_missing_figure_costs_only_its_own_part(tmp_path, char_data, monkeypatch):
    from plaingpt.benchmarking.part import PartRun
    figures = {'config': {}}

    def bench(run, keys):
        run.figures.append(figures)
        return figures

    records = [{'step': 0, 'val_loss': 2.0}, {'step': 60, 'val_loss': 1.5}]  # without a time
    monkeypatch.setattr(PartRun, 'bench', bench)
    monkeypatch.setattr(PartRun, 'train', lambda run, *arguments, **options: records)
    finished = suite(tmp_path, char_data, part='decode_124m,fp16')
    assert 'error: failed: decode_124m, fp16;' in finished.stderr
    results = results_of(tmp_path)
    assert results['decode_124m']['error'] == "KeyError: 'tokens_per_s'"
    assert results['decode_124m']['figures'] == [figures]
    assert results['fp16']['error'].startswith('StatisticsError: ')


def test_the_table_has_each_part_that_has_ended(tmp_path, char_data, monkeypatch):
    from plaingpt.benchmarking.part import PartRun
    original = PartRun.bench

    def bench(run, keys):
        if run.folder.name == 'step_12_eager':
            raise KeyboardInterrupt
        return original(run, keys)

    monkeypatch.setattr(PartRun, 'bench', bench)
    with pytest.raises(KeyboardInterrupt):
        suite(tmp_path, char_data, part='decode_124m,step_12_eager')
    assert '| decode_124m | 124M, ' in (tmp_path / 'suite.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('card, verdict', [
    ('NVIDIA H100 80GB HBM3', 'reached'), ('NVIDIA H200', 'reached'), ('Tesla T4', '')])
def test_speeds_are_judged_only_on_the_cards_that_the_targets_are_for(
        tmp_path, char_data, monkeypatch, card, verdict):
    from plaingpt.benchmarking.part import PartRun
    figures = {
        'ms_per_step': 100.0, 'tokens_per_s': 1e6, 'mfu': 0.6, 'compiled': True,
        'peak_memory_bytes': 1e9, 'planned_memory_bytes': 1.1e9,
        'config': {'batch_size': 64, 'block_size': 1024}, 'left_out': ['hf compiled'],
        'contenders': [{'name': 'ours', 'ms_per_step': 100.0},
                       {'name': 'plain', 'ms_per_step': 150.0}],
    }
    monkeypatch.setattr(PartRun, 'bench', lambda run, keys: figures)
    monkeypatch.setattr(devices, 'check_device', lambda device: torch.device('cuda'))
    monkeypatch.setattr(devices, 'hardware_name', lambda device: card)
    succeeded(suite(tmp_path, char_data, part='step_64', small=False, report=tmp_path / 'all.md'))
    lines = (tmp_path / 'all.md').read_text(encoding='utf-8').splitlines()
    assert [line for line in lines if line.startswith('| step_64 ')] == [
        '| step_64 | 124M, compiled, 64 x 1024 tokens | 100.0 ms, 1,000,000 tokens/s, MFU 60.0% | '
        f'MFU of at least 55% | {verdict} |',
        '| step_64 | peak memory | 1 GB; planned: 1.1 GB (+10%) | a plan within 15% | '
        'reached |',
        "| step_64 | against nanoGPT's way | 1.50 times as fast (150.0 ms) | at least 1.3 | "
        f'{verdict} |',
        '| step_64 | against hf compiled | ran out of memory |  |  |']


def test_a_data_set_without_a_source_is_called_by_its_name(tmp_path, char_data, monkeypatch):
    from plaingpt.benchmarking.part import PartRun
    from plaingpt.text import data_sets
    records = [{'step': 0, 'val_loss': 2.0, 'ms_per_step': 1.0, 'elapsed': 1.0},
               {'step': 60, 'val_loss': 1.5, 'elapsed': 2.0}]
    monkeypatch.setattr(PartRun, 'train', lambda run, *arguments, **options: records)
    monkeypatch.setattr(data_sets, 'read_meta', lambda folder: {})  # of an older prepare.py
    succeeded(suite(tmp_path, char_data, part='baby_gpt'))
    row, _ = results_of(tmp_path)['baby_gpt']['rows']
    assert row['figure'] == f'1.5000 on {char_data}' and row['target'] == ''


def test_a_loss_that_rises_fails_its_part(tmp_path, char_data, monkeypatch):
    from plaingpt.benchmarking.part import PartRun
    rising = [{'step': 0, 'val_loss': 2.0, 'ms_per_step': 1.0}, {'step': 60, 'val_loss': 2.5}]
    monkeypatch.setattr(PartRun, 'train', lambda run, *arguments, **options: rising)
    finished = suite(tmp_path, char_data, part='fp16')
    assert finished.returncode == 1
    assert 'the validation loss rose from 2.0 to 2.5' in results_of(tmp_path)['fp16']['error']


@pytest.mark.parametrize('part, key, values', [
    ('kill_and_resume', 'loss', [2.0, 2.0, 2.1]),
    ('one_rank', 'loss', [2.0, 2.1]),
    ('unfreeze', 'grad_norm', [1.0, 0.0]),
])
def test_runs_that_differ_fail_their_part(tmp_path, char_data, monkeypatch, part, key, values):
    from plaingpt.benchmarking.part import PartRun
    runs = [[{'step': 1, key: value}] for value in values]
    monkeypatch.setattr(PartRun, 'train', lambda run, *arguments, **options: runs.pop(0))
    assert suite(tmp_path, char_data, part=part).returncode == 1
    assert 'differ by' in results_of(tmp_path)[part]['error']


@pytest.mark.parametrize('keys, sentence', [
    (dict(part='fp17'), "there is no part 'fp17'"),
    (dict(dataset='nowhere'), 'nowhere has no train.bin: run python'),
    (dict(small=False), 'is no CUDA GPU'),
    (dict(report=GUIDE), 'is for the figures of a whole run'),
    (dict(again=True), 'again=True repeats parts: name them with --part'),
    (dict(json='results'), 'json=results needs an ending'),
], ids=str)
def test_what_cannot_be_done_is_refused_before_any_part(tmp_path, char_data, keys, sentence):
    defaults = {'small': True, 'device': 'cpu', 'dataset': char_data,
                'json': tmp_path / 'suite.json'}
    assert sentence in refused(run_here(SUITE, **defaults | keys))
    assert list(tmp_path.iterdir()) == []


def test_results_of_another_machine_are_not_mixed_in(tmp_path, char_data):
    record = {'machine': {'device': 'NVIDIA H100', 'torch': '2.13.0', 'small': False}, 'parts': {}}
    (tmp_path / 'suite.json').write_text(json.dumps(record), encoding='utf-8')
    assert 'has results of' in refused(suite(tmp_path, char_data))


@pytest.mark.slow
def test_the_whole_suite_passes_in_small(tmp_path, char_data):
    succeeded(suite(tmp_path, char_data))
    assert len(results_of(tmp_path)) == 25
