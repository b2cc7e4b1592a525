"""bench.py: its figures, and where it takes its tokens from."""
import json
import re
import sys

import pytest
import torch
from conftest import TINY, refused, run, run_here, succeeded

from plaingpt.benchmarking import baselines, decoding
from plaingpt.inference import engine
from plaingpt.planning import hardware
from plaingpt.system import compiling, cpu_runtime, devices
from plaingpt.text.tokenizers import GPT2Tokenizer

KEYS = {key: TINY[key]
        for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'device')}
KEYS |= {'vocab_size': 50, 'num_steps': 4, 'warmup_steps': 1}


def figures_of(path):
    return json.loads(path.read_text(encoding='utf-8'))


def test_the_figures_are_consistent_and_random_tokens_are_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout = succeeded(run_here('bench.py', **KEYS, dataset='nowhere', json='figures.json'))
    assert 'nowhere/train.bin is missing, so the tokens are random' in stdout
    figures = figures_of(tmp_path / 'figures.json')
    assert figures['tokens_per_s'] == pytest.approx(4 * 16 / figures['ms_per_step'] * 1000)
    assert figures['peak_memory_bytes'] > 1e6 and figures['mfu'] is None
    assert figures['planned_memory_bytes'] > 1e6
    assert 0 < figures['share_of_peak'] < 1
    assert figures['ms_min'] <= figures['ms_per_step'] <= figures['ms_max']
    assert f"{figures['ms_per_step']:.2f} ms" in stdout and 'MFU      n/a' in stdout
    assert not (tmp_path / 'bench_log').exists()


@pytest.mark.parametrize('mode, baseline, tokens', [
    ('train', 'hf', 4 * 16), ('train', 'plain', 4 * 16),
    ('decode', 'hf', 4 * 5), ('decode', 'plain', 4 * 5)])
def test_a_baseline_takes_turns_and_the_ratio_is_that_of_the_speeds(tmp_path, mode, baseline,
                                                                    tokens):
    keys = dict(KEYS, mode=mode, baseline=baseline, context=3, new_tokens=5, real_data=False)
    stdout = succeeded(run_here('bench.py', **keys, json=tmp_path / 'figures.json'))
    figures = figures_of(tmp_path / 'figures.json')
    ratio = figures['tokens_per_s'] / figures['baseline_tokens_per_s']
    assert figures['ratio'] == pytest.approx(ratio)
    assert figures['tokens_per_s'] == pytest.approx(tokens / figures['ms_per_step'] * 1000)
    assert f"ratio    {figures['ratio']:.2f}" in stdout and f'\n{baseline:8} ' in stdout


# ---- llama.cpp ----

@pytest.mark.parametrize('keys, type', [
    (dict(dtype='float32'), 'f32'), (dict(dtype='bfloat16'), 'bf16'),
    (dict(quantize='int8'), 'q8_0'), (dict(quantize='int4'), 'q4_0')], ids=str)
def test_llama_cpp_takes_turns_with_the_same_weights_in_its_form(tmp_path, monkeypatch, keys, type):
    pytest.importorskip('xllamacpp')
    weights = {}

    def our_writer(gpt, samples, original=decoding.our_writer):
        weights['ours'] = gpt.transformer.wpe.weight.float()
        return original(gpt, samples)

    def llama_cpp_writer(gpt, *arguments, original=decoding.llama_cpp_writer):
        weights['llama.cpp'] = gpt.transformer.wpe.weight
        return original(gpt, *arguments)

    monkeypatch.setattr(decoding, 'our_writer', our_writer)
    monkeypatch.setattr(decoding, 'llama_cpp_writer', llama_cpp_writer)
    keys = KEYS | dict(n_embd=64, mode='decode', baseline='llamacpp', context=3, new_tokens=5,
                       batch_size=1) | keys
    stdout = succeeded(run_here('bench.py', **keys, json=tmp_path / 'figures.json'))
    assert f'; llama.cpp: {type}\n' in stdout
    assert f'model    {50 * 64 + 16 * 64 + 2 * 12 * 64 ** 2 + 5 * 64:,} parameters' in stdout
    torch.testing.assert_close(weights['ours'], weights['llama.cpp'], rtol=0.01, atol=1e-3)
    figures = figures_of(tmp_path / 'figures.json')
    assert figures['llama_cpp_type'] == type
    ours, theirs = figures['contenders']
    assert [ours['name'], theirs['name']] == ['ours', 'llamacpp']
    for part in 'reading', 'writing':
        speed = f'{part}_tokens_per_s'
        assert figures[f'{part}_ratio'] == pytest.approx(ours[speed] / theirs[speed])
        assert figures[f'{part}_ratio_min'] <= figures[f'{part}_ratio_max']
        assert stdout.count(f'\n         {part}: ') == 3  # of both, and the ratio
    # Both parts together take no longer than the whole, of which the writing is four tokens.
    for speeds in ours, theirs:
        parts_ms = 1000 * (3 / speeds['reading_tokens_per_s'] + 4 / speeds['writing_tokens_per_s'])
        assert parts_ms <= speeds['ms_max']


def test_several_samples_have_a_prompt_each_where_llama_cpp_reads_one_for_each(tmp_path,
                                                                             monkeypatch):
    pytest.importorskip('xllamacpp')
    asked = []
    original = engine.stream

    def stream(gpt, idx, *arguments, **options):
        asked.append((idx, options['num_samples']))
        return original(gpt, idx, *arguments, **options)

    monkeypatch.setattr(engine, 'stream', stream)
    keys = dict(KEYS, mode='decode', baseline='llamacpp', context=6, new_tokens=5)
    succeeded(run_here('bench.py', **keys, json=tmp_path / 'figures.json'))
    prompts, samples = asked[-1]
    assert prompts.shape == (4, 6) and samples == 1
    assert len({tuple(row) for row in prompts.tolist()}) == 4
    figures = figures_of(tmp_path / 'figures.json')
    ours, theirs = figures['contenders']
    assert theirs['tokens_per_s'] == pytest.approx(4 * 5 / theirs['ms_per_step'] * 1000)
    # Its own times of a text include those of the others.
    assert 'writing_tokens_per_s' in ours and 'writing_tokens_per_s' not in theirs
    assert 'ratio' in figures and 'writing_ratio' not in figures


# ---- what is measured, and in which order ----

def test_several_steps_wait_once_and_are_reported_per_step(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(devices, 'synchronize', waits.append)
    keys = dict(KEYS, num_steps=5, warmup_steps=3, steps_a_sync=3, real_data=False)
    stdout = succeeded(run_here('bench.py', **keys, json=tmp_path / 'figures.json'))
    assert len(waits) == 1 + 1 + 2  # the first step alone, the warm-up, the timed steps
    assert 'the median of 2 rounds of 3 steps' in stdout
    figures = figures_of(tmp_path / 'figures.json')
    assert figures['config']['num_steps'] == 6
    assert figures['tokens_per_s'] == pytest.approx(4 * 16 / figures['ms_per_step'] * 1000)


def test_the_first_text_is_the_first_use_of_its_lengths(tmp_path, monkeypatch):
    asked = []
    original = engine.stream

    def stream(gpt, idx, max_new_tokens, *arguments, **options):
        asked.append((idx.size(1), max_new_tokens))
        return original(gpt, idx, max_new_tokens, *arguments, **options)

    monkeypatch.setattr(engine, 'stream', stream)
    keys = dict(KEYS, mode='decode', context=3, new_tokens=5, num_steps=2)
    stdout = succeeded(run_here('bench.py', **keys, json=tmp_path / 'figures.json'))
    assert asked == [(1, 2), (3, 5), (3, 5), (3, 5)]
    figures = figures_of(tmp_path / 'figures.json')
    assert f"its first text took {figures['first_ms']:.2f} ms" in stdout


def test_the_peak_is_that_of_our_steps_alone(monkeypatch):
    events = []

    def noted(module, name):
        original = getattr(module, name)

        def function(*arguments, **options):
            events.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, function)

    noted(hardware, 'peak_memory')  # which the plan needs
    noted(devices, 'peak_memory')
    noted(devices, 'reset_peak_memory')
    noted(devices, 'synchronize')
    noted(baselines, 'nanogpt_step')
    succeeded(run_here('bench.py', **KEYS, real_data=False, baseline='plain'))
    # The first step, in which torch.compile tries kernels, comes before; the baseline after it.
    assert events[:6] == ['peak_memory', 'synchronize', 'reset_peak_memory', 'synchronize',
                          'peak_memory', 'nanogpt_step']
    assert events.count('peak_memory') == 2


def test_transformers_competes_eager_and_compiled_and_the_faster_counts(tmp_path, monkeypatch):
    def compile_or_warn(gpt, trial, **options):
        trial()
        return True

    original = baselines.transformers_step
    versions = []

    def transformers_step(*arguments):
        *others, compiled = arguments
        versions.append(compiled)
        return original(*others, False)  # torch.compile itself would take half a minute

    monkeypatch.setattr(compiling, 'compile_or_warn', compile_or_warn)
    monkeypatch.setattr(baselines, 'transformers_step', transformers_step)
    keys = dict(KEYS, real_data=False, baseline='hf', compile=True)
    succeeded(run_here('bench.py', **keys, json=tmp_path / 'figures.json'))
    assert versions == [False, True]
    figures = figures_of(tmp_path / 'figures.json')
    ours, eager, compiled = figures['contenders']
    assert [ours['name'], eager['name'], compiled['name']] == ['ours', 'hf', 'hf compiled']
    faster = max(eager['tokens_per_s'], compiled['tokens_per_s'])
    assert figures['ratio'] == pytest.approx(ours['tokens_per_s'] / faster)


# Its first step is that of its start, the second is the warm-up.
@pytest.mark.parametrize('good_steps', [0, 3])
def test_a_baseline_that_runs_out_of_memory_is_left_out(tmp_path, monkeypatch, good_steps):
    calls = []

    def transformers_step(*arguments):
        def step(number):
            calls.append(number)
            if len(calls) > good_steps:
                raise torch.OutOfMemoryError('no room')
        return step

    monkeypatch.setattr(baselines, 'transformers_step', transformers_step)
    keys = dict(KEYS, real_data=False, baseline='hf')
    stdout = succeeded(run_here('bench.py', **keys, json=tmp_path / 'figures.json'))
    assert 'hf runs out of memory' in stdout
    assert len(calls) == good_steps + 1
    figures = figures_of(tmp_path / 'figures.json')
    assert [contender['name'] for contender in figures['contenders']] == ['ours']
    assert figures['left_out'] == ['hf']
    assert 'ratio' not in figures


def test_the_optimizer_is_the_one_asked_for_and_the_plan_knows_it():
    keys = dict(KEYS, real_data=False, n_embd=256)
    state = {}  # megabytes of it in the plan
    for optimizer in 'adamw', 'muon':
        stdout = succeeded(run_here('bench.py', **keys, optimizer=optimizer))
        state[optimizer] = float(re.search(r'optimizer state ([\d.]+) MB', stdout)[1])
    matrices = 2 * 12 * 256 ** 2  # numbers, in two blocks: Muon keeps one less for each
    assert state['adamw'] - state['muon'] == pytest.approx(4 * matrices / 1e6, rel=0.01)


def test_the_residual_stream_can_be_bfloat16(tmp_path):
    keys = dict(KEYS, real_data=False, bf16_residual=True, dtype='bfloat16')
    succeeded(run_here('bench.py', **keys, json=tmp_path / 'figures.json'))
    assert figures_of(tmp_path / 'figures.json')['config']['bf16_residual'] is True


@pytest.mark.parametrize('keys, keeps', [
    ({}, True), (dict(keep_memory=False), False), (dict(activation_checkpointing=True), False)])
def test_malloc_keeps_memory_unless_memory_is_dear(monkeypatch, keys, keeps):
    calls = []
    monkeypatch.setattr(cpu_runtime, 'keep_freed_memory', lambda: calls.append(1))
    succeeded(run_here('bench.py', **KEYS, **keys, real_data=False))
    assert bool(calls) == keeps


@pytest.mark.parametrize('mode', ['train', 'decode'])
def test_it_is_timed_again_beside_a_program_and_on_one_thread(tmp_path, monkeypatch, mode):
    threads = []
    set_threads = torch.set_num_threads
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: (threads.append(n), set_threads(n)))
    before = torch.get_num_threads()
    keys = KEYS | dict(mode=mode, real_data=False, context=3, new_tokens=5, busy_core=True,
                       json=tmp_path / 'figures.json')
    stdout = succeeded(run_here('bench.py', **keys))
    figures = figures_of(tmp_path / 'figures.json')
    busy, one_thread = figures['busy_core']
    assert threads == [1, before]
    assert figures['busy_core_of_one_thread'] == pytest.approx(
        busy['tokens_per_s'] / one_thread['tokens_per_s'])
    assert re.search('^busy  .*\n1 thread .*\n', stdout, re.MULTILINE)
    assert f"{figures['busy_core_of_one_thread']:.2f} of that of one thread alone" in stdout


@pytest.mark.parametrize('mode', ['train', 'decode'])
def test_the_plain_baseline_uses_none_of_the_cpu_kernels(mode, monkeypatch):
    from plaingpt.system.cpu_kernels import CpuKernels
    used = []
    own = CpuKernels.causal_attention

    def causal_attention(kernels, *arguments):
        used.append(kernels)
        return own(kernels, *arguments)

    monkeypatch.setattr(CpuKernels, 'causal_attention', causal_attention)
    keys = dict(KEYS, mode=mode, context=3, new_tokens=5, real_data=False)
    succeeded(run_here('bench.py', **keys))
    alone = len(used)
    assert alone > 0
    succeeded(run_here('bench.py', **keys, baseline='plain'))
    assert len(used) == 2 * alone


@pytest.mark.parametrize('baseline', ['', pytest.param('plain', marks=pytest.mark.slow)])
def test_preparation_is_timed_from_text_to_files(tmp_path, baseline):
    import datasets
    texts = [f'document {number} of some, ' * 20 for number in range(200)]
    datasets.Dataset.from_dict({'text': texts}).to_parquet(tmp_path / 'texts.parquet')
    keys = dict(mode='prepare', data_files=tmp_path / '*.parquet', num_steps=1)
    succeeded(run_here('bench.py', **keys, baseline=baseline, json=tmp_path / 'figures.json'))
    figures = figures_of(tmp_path / 'figures.json')
    tokens = figures['tokens_per_s'] * figures['ms_per_step'] / 1000
    lengths = [len(ids) + 1 for ids in GPT2Tokenizer().encode_corpus(texts)]
    assert tokens == pytest.approx(sum(lengths))
    assert figures['peak_memory_bytes'] > 1e6


def test_a_profile_is_a_table_and_a_trace_for_perfetto(tmp_path, char_data):
    keys = dict(KEYS, dataset=char_data, profile=True, dtype='bfloat16')
    stdout = succeeded(run('bench.py', **keys, cwd=tmp_path))
    assert 'random' not in stdout
    assert 'Self CPU' in stdout and 'aten::' in stdout and 'bfloat16' in stdout
    trace, = (tmp_path / 'bench_log').glob('train-*.json')
    assert json.loads(trace.read_text(encoding='utf-8'))['traceEvents']
    assert f'{trace.name}: open it at https://ui.perfetto.dev' in stdout


def test_without_wandb_it_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not installed
    succeeded(run_here('bench.py', **KEYS, real_data=False, baseline='hf'))


@pytest.mark.parametrize('keys, sentence', [
    (KEYS | dict(n_head=3), 'multiple of n_head'),
    (dict(mode='prepare'), '--data_files='),
    (dict(mode='prepare', data_files='x', baseline='hf'), 'neither'),
    (dict(mode='decode', baseline='hf', context=1000, new_tokens=99), 'is more'),
    (dict(mode='decode', baseline='llamacpp', context=1000, new_tokens=99, device='cpu'),
     'llamacpp stops at block_size=1024'),
    (KEYS | dict(baseline='llamacpp'), 'baseline=llamacpp goes with mode=decode'),
    (dict(mode='decode', baseline='llamacpp', device='mps'), 'and device=cpu'),
    (KEYS | dict(mode='decode', baseline='llamacpp', vocab_size=101), 'use at most 100'),
    (KEYS | dict(quantize='int8'), 'quantize=int8 goes with mode=decode'),
    (dict(mode='prepare', data_files='texts/no', num_steps=1), 'texts/no'),
    (KEYS | dict(real_data=False, json='no/folder.json'), 'json: '),
    (KEYS | dict(compile_mode='fast'), 'compile_mode='),
    (KEYS | dict(busy_core=True, device='mps'), 'busy_core=True goes with device=cpu'),
    (dict(mode='prepare', data_files='x', busy_core=True), 'not with mode=prepare'),
    (KEYS | dict(bf16_residual=True, dtype='float32'), 'bf16_residual=True needs dtype=bfloat16'),
], ids=str)
def test_what_cannot_be_measured_is_refused_in_one_sentence(keys, sentence):
    assert sentence in refused(run_here('bench.py', **keys))


def test_a_trace_that_cannot_be_written_is_refused_before_the_measurement(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bench_log').write_text('in the way', encoding='utf-8')
    finished = run_here('bench.py', **KEYS, real_data=False, profile=True)
    assert 'the trace cannot be written' in refused(finished)
    assert 'ms' not in finished.stdout
