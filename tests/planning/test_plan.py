"""What --plan=True says, that it is so, and that it needs and writes nothing."""
import json
import os
import re

import pytest
import torch
from conftest import TINY, TINY_GPT, refused, run, run_here, succeeded, tiny_gpt

from model import GPT, GPTConfig
from plaingpt.planning import plan
from plaingpt.training import lora

AS_USUAL = dict(optimizer='adamw', lora_rank=0, trainable='all', unfreeze=None)

GPT2 = dict(plan=True, device='cuda', device_name='H100 SXM')


@pytest.fixture
def measured(monkeypatch):
    """In place of a machine whose speed varies: 4 TFLOP/s, micro-batches of 20 ms and updates of 5 ms."""
    monkeypatch.setattr(plan, 'measured_peak', lambda device, dtype: 4e12)
    monkeypatch.setattr(plan, 'measured_step', lambda *args: (0.020, 0.005))


def planned(finished):
    """{label: text} of what a run has printed."""
    return dict(line.split(maxsplit=1) for line in succeeded(finished).splitlines())


def empty(folder):
    return os.listdir(folder) == []


def test_gpt2_on_eight_cards_that_are_not_here(tmp_path):
    finished = run('train.py', 'config/train_gpt2.py', **GPT2, num_devices=8, dataset='nowhere', cwd=tmp_path)
    said = planned(finished)
    assert 'nowhere has no train.bin: the number of epochs is unknown' in finished.stderr
    assert said['model'].startswith('124,373,760 parameters: token embedding and head 38.6M, position embedding 786k')
    assert said['step'] == ('491,520 tokens: micro-batches x sequences x positions 40 x 12 x 1024, shared by 8 devices')
    assert said['run'] == '600,000 steps: 294,912,000,000 tokens, epochs unknown without nowhere'
    per_token = 6 * (124_373_760 - 1024 * 768) + 12 * 12 * 768 * 1024  # PaLM's formula
    steps, evaluations = per_token * 600_000 * 491_520, per_token / 3 * 601 * 2 * 200 * 12 * 1024
    assert said['compute'].startswith(f'{steps + evaluations:.3g} FLOPs: 855M for each token')
    assert said['compute'].endswith(f'{evaluations:.3g} in evaluations')
    assert 'H100 SXM has 75 GB for it: it fits' in said['memory']
    assert said['disk'].startswith('1.49 GB')
    assert said['scale'] == ('2,371.2 tokens a parameter; Chinchilla would spend as many FLOPs on 1.45B parameters and '
                             '29B tokens, 20 for each')
    hours = (steps + evaluations) / (8 * 989e12 * 0.4) / 3600
    assert said['time'].startswith(f'{int(hours)}:') and '8 x H100 SXM, at 40% MFU' in said['time']
    assert empty(tmp_path)


def test_more_devices_a_higher_mfu_and_another_precision_are_reckoned_with(tmp_path):
    keys = dict(GPT2, dataset='nowhere', out_dir=tmp_path / 'out')
    changes = {}, dict(num_devices=2), dict(expected_mfu=0.2), dict(dtype='float32')
    times = [planned(run_here('train.py', **keys, **change))['time'] for change in changes]
    days = [float(re.match(r'([\d.]+) days', time)[1]) for time in times]
    assert [round(other / days[0], 1) for other in days] == [1, 0.5, 2, 2]
    small = planned(run_here('train.py', **keys | dict(device_name='Tesla T4', batch_size=64)))
    assert 'Tesla T4 has 14 GB for it: it does NOT fit' in small['memory']


def test_a_plan_for_this_machine_is_measured_and_writes_nothing(tmp_path, char_data, measured):
    keys = TINY | dict(max_iters=1000, eval_interval=100, eval_iters=30, gradient_accumulation_steps=2)
    said = planned(run_here('train.py', plan=True, out_dir=tmp_path / 'out', dataset=char_data, **keys))
    tokens = json.loads((char_data / 'meta.json').read_text())['tokens']['train']
    assert said['run'] == f'1,000 steps: 128,000 tokens, {128_000 / tokens:.2f} epochs of {tokens:,}'
    # 1000 x (2 x 20 + 5 ms), and 11 evaluations of 2 x 30 forward passes, a third of 20 ms each
    assert said['time'].startswith('49 s: 45.0 ms a step and 0.4 s an evaluation, measured just now in float32')
    assert 'Python and torch' in said['memory'] and 'it fits' in said['memory']
    assert empty(tmp_path)


def test_a_run_says_the_same_as_its_plan_but_for_the_time(tmp_path, char_data, measured):
    keys = TINY | dict(dataset=char_data, out_dir=tmp_path / 'out')
    said, done = (succeeded(run_here('train.py', **keys, **more)) for more in (dict(plan=True), {}))
    for label in 'model', 'step', 'run', 'compute', 'disk', 'scale':
        line = next(line for line in said.splitlines() if line.startswith(label))
        assert line in done.splitlines()


def test_the_measured_time_is_shared_by_devices_and_compiled_if_asked_for(tmp_path, char_data, monkeypatch):
    seen = []
    monkeypatch.setattr(plan, 'measured_peak', lambda device, dtype: 4e12)
    monkeypatch.setattr(plan, 'measured_step', lambda *args: seen.append(args) or (1.0, 0.0))
    keys = TINY | dict(plan=True, dataset=char_data, out_dir=tmp_path / 'out', max_iters=10, eval_interval=100)
    times = [planned(run_here('train.py', **keys, **more))['time'].split()[2] for more in
             ({}, dict(num_devices=2), dict(compile=True, activation_checkpointing=True))]
    assert times == ['2,000.0', '1,000.0', '2,000.0']
    assert [args[1:6] for args in seen] == [(4, torch.device('cpu'), 'float32', *last) for last in
                                           ((False, False), (False, False), (True, True))]


def test_a_plan_to_resume_is_of_the_checkpoints_shape_and_leaves_the_run_alone(tmp_path, char_data, measured):
    out_dir = tmp_path / 'out'
    succeeded(run_here('train.py', **TINY, dataset=char_data, out_dir=out_dir))
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    said = planned(run_here('train.py', plan=True, init_from='resume', device='cpu', dtype='float32', out_dir=out_dir,
                            dataset=char_data, max_iters=12))
    assert 'n_layer=2, n_head=2, n_embd=16' in said['model']
    assert said['run'].startswith('6 steps: ') and said['run'].endswith('; the others of 12 are over')
    assert said['time'].startswith('10 s: 805.0 ms')  # 6 steps of 40 micro-batches, two evaluations
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before


def test_a_plan_to_fine_tune_needs_no_weights(tmp_path, char_data, measured):
    from transformers import GPT2Config
    GPT2Config(n_layer=3, n_head=2, n_embd=8, n_positions=64, vocab_size=77).save_pretrained(tmp_path / 'gpt2')
    keys = TINY | dict(plan=True, init_from=tmp_path / 'gpt2', dataset='nowhere', out_dir=tmp_path / 'out')
    said = planned(run_here('train.py', **keys))
    shape = GPTConfig(16, 77, 3, 2, 8, 0.0, True)
    assert said['model'].endswith('; GPTConfig(block_size=16, vocab_size=77, n_layer=3, n_head=2, n_embd=8, '
                                  'dropout=0.0, bias=True)')
    assert said['model'].startswith(f'{GPT(shape).get_num_params(False):,} parameters')
    assert os.listdir(tmp_path) == ['gpt2']


@pytest.mark.parametrize('keys, sentence', [
    (GPT2 | dict(device_name='Cray-1'), "device_name='Cray-1' has no data sheet in model.py"),
    (GPT2 | dict(device_name='NVIDIA A100-SXM4-40GB MIG 1g.5gb'), 'has no data sheet in model.py'),
    (dict(device_name='H100', device='cuda'), "device_name='H100' goes with --plan=True and --device=cuda"),
    (dict(device_name='H100', plan=True), "device_name='H100' goes with --plan=True and --device=cuda"),
    (GPT2 | dict(num_devices=0), 'num_devices=0: must be >= 1'),
    (GPT2 | dict(expected_mfu=1.5), 'expected_mfu=1.5: must be'),
    (GPT2 | dict(num_devices=3, batch_size=4), '3 processes cannot share'),
    (dict(plan=True, eval_only=True), 'are about training'),
])
def test_what_cannot_be_planned_is_refused(tmp_path, keys, sentence):
    assert sentence in refused(run_here('train.py', **TINY | dict(out_dir=tmp_path / 'out') | keys))
    assert empty(tmp_path)


def test_a_step_is_that_of_its_parts():
    gpt = GPT(GPTConfig(16, 65, 2, 2, 16))
    run = dict(gradient_accumulation_steps=2, batch_size=4, max_iters=0, eval_interval=5, eval_iters=0,
               activation_checkpointing=False, dataset='a', **AS_USUAL)
    for devices, accumulates, rows in (1, True, 4), (2, False, 4), (4, False, 2):
        said = plan.Plan(gpt, run, plan.Hardware('a card', devices, 'cuda', None), 'float32', None)
        assert said.memory == plan.memory(gpt.config, rows, 'float32', 'cuda', accumulates, False, devices > 1)
    assert 'scale' not in said.summary() and 'fits' not in said.summary()['memory']


def test_of_a_shape_is_said_what_gpt2_has_not():
    run = dict(gradient_accumulation_steps=2, batch_size=4, max_iters=1, eval_interval=5, eval_iters=1,
               activation_checkpointing=False, dataset='a', **AS_USUAL)
    gpt = GPT(GPTConfig(16, 65, 2, 2, 16, position='rope', n_kv_head=1, tied=False))
    said = plan.Plan(gpt, run, plan.Hardware('a card', 1, 'cuda', None), 'float32', None).summary()['model']
    assert said == (f'{gpt.get_num_params(False):,} parameters: token embedding and head 2.08k, attention 1.63k, '
                    'MLP 4.26k, layer norms 160; GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, '
                    "n_embd=16, dropout=0.0, bias=True, position='rope', n_kv_head=1, tied=False)")


def test_what_is_not_trained_and_what_muon_trains_take_less():
    gpt = GPT(GPTConfig(16, 65, 2, 2, 16, bias=False))
    run = dict(gradient_accumulation_steps=1, batch_size=4, max_iters=1, eval_interval=5, eval_iters=1,
               activation_checkpointing=False, dataset='a', **AS_USUAL)

    def planned_with(**keys):
        made = plan.Plan(gpt, run | keys, plan.Hardware('a card', 1, 'cuda', None), 'float32', None)
        return made.memory['optimizer state'], made.summary()

    N, matrices = gpt.get_num_params(False), 2 * 12 * 16 * 16
    state, said = planned_with(optimizer='adamw')
    assert state == planned_with()[0] == 8 * N and 'trained' not in said['model']
    assert said['disk'].startswith(f'{12 * N / 1e6:.3g} MB')
    state, said = planned_with(optimizer='muon')
    assert state == 8 * N - 4 * matrices and said['disk'].startswith(f'{(12 * N - 4 * matrices) / 1e6:.3g} MB')
    trained = N - 65 * 16 - matrices // 2 - 2 * 16
    state, said = planned_with(optimizer='muon', trainable=r'wpe|h\.1|ln_f')
    assert state == 8 * trained - 2 * matrices
    assert said['model'].startswith(f'{N:,} parameters, {trained:,} of them trained: token embedding')
    stages = {0: 'head', 5: r'wpe|h\.1|ln_f', 9: 'ln_f'}
    assert planned_with(optimizer='muon', trainable='all', unfreeze=stages)[0] == state  # which needs the most
    lora.add_lora(gpt, 2, 4.0, 0.0, 'c_attn')
    state, said = planned_with(lora_rank=2)
    adapter = 2 * 2 * (16 + 48)
    assert state == 8 * adapter and said['disk'].startswith(f'{12 * adapter / 1e6:.3g} MB')


def test_what_does_not_fit_is_said_and_not_measured(tmp_path, char_data, monkeypatch):
    monkeypatch.setattr(plan, 'device_memory', lambda device: 1000)
    said = planned(run_here('train.py', **TINY, plan=True, dataset=char_data, out_dir=tmp_path / 'out'))
    assert said['memory'].endswith('it does NOT fit') and said['time'] == 'not measured, since it does not fit'


@pytest.mark.slow
def test_without_a_compiler_the_plan_is_of_the_eager_model(tmp_path, char_data):
    keys = TINY | dict(plan=True, compile=True, dataset=char_data, out_dir=tmp_path / 'out')
    nothing = {'CC': '/nowhere', 'CXX': '/nowhere', 'TORCHINDUCTOR_CACHE_DIR': tmp_path / 'cache'}
    finished = run('train.py', **keys, env=nothing)
    assert 'ms a step' in planned(finished)['time'] and 'warning: torch.compile failed' in finished.stderr


def test_two_ranks_say_one_plan_and_share_the_machine(tmp_path, char_data):
    launcher = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
    finished = run('train.py', **TINY, plan=True, dataset=char_data, out_dir=tmp_path / 'out', launcher=launcher)
    lines = [line.split(maxsplit=1) for line in succeeded(finished).splitlines()]
    assert [line[0] for line in lines].count('step') == 1 and 'shared by 2 devices' in dict(lines)['step']
    assert empty(tmp_path)


def test_a_nanogpt_checkpoint_is_planned_without_its_data(tmp_path, measured):
    gpt = tiny_gpt(bias=True)
    (tmp_path / 'out').mkdir()
    torch.save({'model': {f'_orig_mod.{name}': tensor for name, tensor in gpt.state_dict().items()}, 'optimizer': {},
                'model_args': TINY_GPT | {'bias': True, 'dropout': 0.0}, 'iter_num': 40, 'best_val_loss': 3.0,
                'config': {'dataset': 'nowhere'}}, tmp_path / 'out' / 'ckpt.pt')
    said = planned(run_here('train.py', plan=True, init_from='resume', out_dir=tmp_path / 'out', device='cpu',
                            dtype='float32', dataset='nowhere', max_iters=100))
    assert said['model'].startswith(f'{gpt.get_num_params(False):,} parameters')
    assert said['run'].startswith('60 steps: ') and 'without nowhere' in said['run']
    assert os.listdir(tmp_path / 'out') == ['ckpt.pt']


def test_old_cards_compute_in_float16_and_float32_at_an_eighth():
    peaks = [plan.Hardware.named(name, 1, 'float32').flops / 1e12 for name in ('Tesla T4', 'V100', 'A100')]
    assert peaks == [65 / 8, 125 / 8, 156]


@pytest.mark.parametrize('number, short', [(0, '0'), (65, '65'), (999, '999'), (1000, '1k'), (124_439_808, '124M'),
                                           (999_600_000, '1B'), (2.9e11, '290B'), (1.2e18, '1.2e+06T')])
def test_numbers_are_shortened(number, short):
    assert plan._short(number) == short
