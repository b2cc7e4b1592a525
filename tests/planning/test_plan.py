"""What --plan=True prints, that it is true, and that it needs and writes nothing."""
import json
import os
import re
import sys

import pytest
import torch
from conftest import TINY, TINY_GPT, refused, run, run_here, succeeded, tiny_gpt

from model import GPT, GPTConfig
from plaingpt.planning import hardware, plan
from plaingpt.planning.hardware import Hardware
from plaingpt.planning.memory import step_memory
from plaingpt.planning.run_size import RunSize
from plaingpt.training import freezing, lora

ON_H100 = dict(plan=True, device='cuda', device_name='H100 SXM')
A_CARD = Hardware('a card', 1, 'cuda', None)


@pytest.fixture
def measured(monkeypatch):
    """A machine of constant speed: 4 TFLOP/s, micro-batches of 20 ms and updates of 5 ms."""
    monkeypatch.setattr(plan, 'measured_peak', lambda device, dtype: 4e12)
    monkeypatch.setattr(plan, 'measured_step', lambda *arguments: (0.020, 0.005))


def printed(finished):
    """{label: text} of what a run has printed."""
    return dict(line.split(maxsplit=1) for line in succeeded(finished).splitlines())


def is_empty(folder):
    return os.listdir(folder) == []


# ---- hardware that is not here ----

def test_gpt2_on_eight_cards_that_are_not_here(tmp_path):
    finished = run('train.py', 'config/train_gpt2.py', **ON_H100, num_devices=8, dataset='nowhere',
                   cwd=tmp_path)
    said = printed(finished)
    assert 'nowhere has no train.bin: the number of epochs is unknown' in finished.stderr
    assert said['model'].startswith('124,373,760 parameters: token embedding and head 38.6M, '
                                    'position embedding 786k')
    assert said['step'] == ('491,520 tokens: micro-batches x sequences x positions '
                            '40 x 12 x 1024, shared by 8 devices')
    assert said['run'] == '600,000 steps: 294,912,000,000 tokens, epochs unknown without nowhere'

    flops_per_token = 6 * (124_373_760 - 1024 * 768) + 12 * 12 * 768 * 1024  # PaLM's formula
    steps = flops_per_token * 600_000 * 491_520
    evaluations = flops_per_token / 3 * 601 * 2 * 200 * 12 * 1024
    assert said['compute'].startswith(f'{steps + evaluations:.3g} FLOPs: 855M for each token')
    assert said['compute'].endswith(f'{evaluations:.3g} in evaluations')

    assert 'H100 SXM has 75 GB for it: it fits' in said['memory']
    assert said['disk'].startswith('1.49 GB')
    assert said['scale'] == ('2,371.2 tokens a parameter; Chinchilla would spend as many FLOPs on '
                             '1.45B parameters and 29B tokens, 20 for each')
    hours = (steps + evaluations) / (8 * 989e12 * 0.4) / 3600
    assert said['time'].startswith(f'{int(hours)}:')
    assert '8 x H100 SXM, at 40% MFU' in said['time']
    assert is_empty(tmp_path)


def test_time_depends_on_the_number_of_devices_their_mfu_and_the_precision(tmp_path):
    keys = dict(ON_H100, dataset='nowhere', out_dir=tmp_path / 'out')

    def days(**changes):
        time = printed(run_here('train.py', **keys, **changes))['time']
        return float(re.match(r'([\d.]+) days', time)[1])

    assert days(num_devices=2) / days() == pytest.approx(0.5, abs=0.05)
    assert days(expected_mfu=0.2) / days() == pytest.approx(2, abs=0.05)
    assert days(dtype='float32') / days() == pytest.approx(2, abs=0.05)


def test_a_small_card_has_no_room(tmp_path):
    keys = dict(ON_H100, device_name='Tesla T4', batch_size=64)
    said = printed(run_here('train.py', **keys, dataset='nowhere', out_dir=tmp_path / 'out'))
    assert 'Tesla T4 has 14 GB for it: it does NOT fit' in said['memory']


def test_a_device_name_implies_a_plan_for_cuda(tmp_path):
    keys = dict(dataset='nowhere', out_dir=tmp_path / 'out')
    implied = run_here('train.py', **keys, device_name='H100 SXM')
    assert printed(implied) == printed(run_here('train.py', **keys, **ON_H100))
    assert is_empty(tmp_path)


def test_a_config_file_sees_the_device_that_a_device_name_implies(tmp_path):
    said = printed(run_here('train.py', 'config/train_shakespeare_char.py', device_name='H100',
                            dataset='nowhere', out_dir=tmp_path / 'out'))
    assert 'n_layer=6' in said['model']  # as on a GPU; on a CPU, the file asks for 4


def test_only_a_device_name_on_the_command_line_implies_settings():
    assert plan.implied_settings(['--device_name=H100']) == {'plan': True, 'device': 'cuda'}
    assert plan.implied_settings(['--device_name=', '--device=cpu', 'config/a.py']) == {}


# ---- this machine ----

def test_a_plan_for_this_machine_is_measured_and_writes_nothing(tmp_path, char_data, measured):
    keys = TINY | dict(max_iters=1000, eval_interval=100, eval_iters=30, dataset=char_data)
    said = printed(run_here('train.py', plan=True, out_dir=tmp_path / 'out', **keys))
    tokens = json.loads((char_data / 'meta.json').read_text(encoding='utf-8'))['tokens']['train']
    epochs = 128_000 / tokens
    assert said['run'] == f'1,000 steps: 128,000 tokens, {epochs:.2f} epochs of {tokens:,}'
    # 1000 x (2 x 20 + 5 ms), and 11 evaluations of 2 x 30 forward passes, a third of 20 ms each.
    assert said['time'].startswith('49 s: 45.0 ms a step and 0.4 s an evaluation, '
                                   'measured just now in float32')
    assert 'Python and torch' in said['memory'] and 'it fits' in said['memory']
    assert is_empty(tmp_path)


def test_a_run_prints_its_plan_but_for_the_time(tmp_path, char_data, measured):
    keys = TINY | dict(dataset=char_data, out_dir=tmp_path / 'out')
    planned = succeeded(run_here('train.py', **keys, plan=True)).splitlines()
    trained = succeeded(run_here('train.py', **keys)).splitlines()
    for label in 'model', 'step', 'run', 'compute', 'disk', 'scale':
        line = next(line for line in planned if line.startswith(label))
        assert line in trained


@pytest.mark.parametrize('changes, milliseconds', [
    ({}, '2,000.0'),
    (dict(num_devices=2), '1,000.0'),
    (dict(compile=True, activation_checkpointing=True, compile_mode='max-autotune'), '2,000.0'),
    (dict(dtype='bfloat16', bf16_residual=True), '2,000.0'),
])
def test_a_step_is_measured_as_the_run_would_compute_it(
        tmp_path, char_data, monkeypatch, changes, milliseconds):
    calls = []

    def measured_step(config, *arguments):
        calls.append(arguments)
        return 1.0, 0.0

    monkeypatch.setattr(plan, 'measured_peak', lambda device, dtype: 4e12)
    monkeypatch.setattr(plan, 'measured_step', measured_step)
    keys = TINY | dict(max_iters=10, eval_interval=100, dataset=char_data, out_dir=tmp_path / 'out')
    said = printed(run_here('train.py', **{**keys, **changes}, plan=True))
    assert f' {milliseconds} ms a step' in said['time']
    [(batch_size, device, settings, _)] = calls
    assert (batch_size, device) == (4, torch.device('cpu'))
    expected = {'dtype': 'float32', 'compiled': changes.get('compile', False),
                'compile_mode': 'auto', 'bf16_residual': False, 'activation_checkpointing': False}
    for key in expected:
        assert getattr(settings, key) == changes.get(key, expected[key])


def test_what_does_not_fit_is_not_measured(tmp_path, char_data, monkeypatch):
    monkeypatch.setattr(hardware, 'device_memory', lambda device: 1000)
    keys = TINY | dict(plan=True, dataset=char_data, out_dir=tmp_path / 'out')
    said = printed(run_here('train.py', **keys))
    assert said['memory'].endswith('it does NOT fit')
    assert said['time'] == 'not measured, since it does not fit'


@pytest.mark.slow
def test_without_a_compiler_the_plan_is_of_the_eager_model(tmp_path, char_data):
    keys = TINY | dict(plan=True, compile=True, dataset=char_data, out_dir=tmp_path / 'out')
    no_compiler = {'CC': '/nowhere', 'CXX': '/nowhere',
                   'TORCHINDUCTOR_CACHE_DIR': tmp_path / 'cache'}
    finished = run('train.py', **keys, env=no_compiler)
    assert 'ms a step' in printed(finished)['time']
    assert 'warning: torch.compile failed' in finished.stderr


def test_two_ranks_print_one_plan_and_share_the_machine(tmp_path, char_data):
    launcher = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
    keys = TINY | dict(plan=True, dataset=char_data, out_dir=tmp_path / 'out')
    stdout = succeeded(run('train.py', **keys, launcher=launcher))
    steps = [line for line in stdout.splitlines() if line.startswith('step')]
    assert len(steps) == 1 and 'shared by 2 devices' in steps[0]
    assert is_empty(tmp_path)


# ---- weights and data that are missing ----

def test_a_plan_to_resume_has_the_checkpoints_shape_and_leaves_the_run_alone(tmp_path, char_data,
                                                                             measured):
    out_dir = tmp_path / 'out'
    succeeded(run_here('train.py', **TINY, dataset=char_data, out_dir=out_dir))
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    said = printed(run_here('train.py', plan=True, init_from='resume', device='cpu',
                            dtype='float32', out_dir=out_dir, dataset=char_data, max_iters=12))
    assert 'n_layer=2, n_head=2, n_embd=16' in said['model']
    assert said['run'].startswith('6 steps: ')
    assert said['run'].endswith('; 6 of 12 are done')
    assert said['time'].startswith('10 s: 805.0 ms')  # 6 steps of 40 micro-batches, 2 evaluations
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before


def test_a_plan_to_fine_tune_needs_no_weights(tmp_path, measured):
    from transformers import GPT2Config
    shape = GPT2Config(n_layer=3, n_head=2, n_embd=8, n_positions=64, vocab_size=77)
    shape.save_pretrained(tmp_path / 'gpt2')
    keys = TINY | dict(plan=True, init_from=tmp_path / 'gpt2', dataset='nowhere',
                       out_dir=tmp_path / 'out')
    said = printed(run_here('train.py', **keys))
    gpt = GPT(GPTConfig(16, 77, 3, 2, 8, 0.0, True))
    assert said['model'].startswith(f'{gpt.get_num_params(False):,} parameters')
    assert said['model'].endswith('; GPTConfig(block_size=16, vocab_size=77, n_layer=3, n_head=2, '
                                  'n_embd=8, dropout=0.0, bias=True)')
    assert os.listdir(tmp_path) == ['gpt2']


def test_a_nanogpt_checkpoint_is_planned_without_its_data(tmp_path, measured):
    gpt = tiny_gpt(bias=True)
    checkpoint = {
        'model': {f'_orig_mod.{name}': tensor for name, tensor in gpt.state_dict().items()},
        'optimizer': {},
        'model_args': TINY_GPT | {'bias': True, 'dropout': 0.0},
        'iter_num': 40,
        'best_val_loss': 3.0,
        'config': {'dataset': 'nowhere'},
    }
    (tmp_path / 'out').mkdir()
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    said = printed(run_here('train.py', plan=True, init_from='resume', out_dir=tmp_path / 'out',
                            device='cpu', dtype='float32', dataset='nowhere', max_iters=100))
    assert said['model'].startswith(f'{gpt.get_num_params(False):,} parameters')
    assert said['run'].startswith('60 steps: ') and 'without nowhere' in said['run']
    assert os.listdir(tmp_path / 'out') == ['ckpt.pt']


@pytest.mark.parametrize('keys', [dict(plan=True), dict(device_name='H100')], ids=str)
def test_a_plan_needs_no_wandb(tmp_path, char_data, measured, monkeypatch, keys):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not installed
    monkeypatch.setattr('plaingpt.training.trackers.find_spec', lambda name: None)
    run_keys = {key: value for key, value in TINY.items() if key != 'device'}
    said = printed(run_here('train.py', **run_keys, **keys, wandb_log=True, dataset=char_data,
                            out_dir=tmp_path / 'out'))
    assert 'time' in said


# ---- what is refused ----

@pytest.mark.parametrize('keys, sentence', [
    (ON_H100 | dict(device_name='Cray-1'), "device_name='Cray-1' has no data sheet in plaingpt"),
    (ON_H100 | dict(device_name='NVIDIA A100-SXM4-40GB MIG 1g.5gb'), 'has no data sheet in'),
    (dict(device_name='H100', device='cpu'), "device_name='H100' means device='cuda'"),
    (ON_H100 | dict(plan=False), "device_name='H100 SXM' is for a plan: leave out plan=False"),
    (ON_H100 | dict(num_devices=0), 'num_devices=0: must be >= 1'),
    (ON_H100 | dict(expected_mfu=1.5), 'expected_mfu=1.5: must be'),
    (ON_H100 | dict(num_devices=3, batch_size=4), '3 processes cannot share'),
    (dict(plan=True, eval_only=True), 'plan=True is about training'),
    (dict(find_lr=True, eval_only=True), 'find_lr=True is about training'),
    (dict(plan=True, find_lr=True), 'plan=True takes no steps'),
    (dict(n_embd=12, n_head=4, position='rope'), "position='rope' turns pairs of channels"),
    (dict(n_head=2, n_kv_head=3), 'n_head=2 must be a multiple of n_kv_head=3'),
])
def test_what_cannot_be_planned_is_refused(tmp_path, keys, sentence):
    assert sentence in refused(run_here('train.py', **TINY | dict(out_dir=tmp_path / 'out') | keys))
    assert is_empty(tmp_path)


# ---- the plan itself ----

def test_devices_share_the_micro_batches_of_a_step_or_their_rows():
    gpt = GPT(GPTConfig(16, 65, 2, 2, 16))
    size = RunSize(batch_size=4, micro_batches=2, max_steps=0)

    def memory_on(devices):
        return plan.Plan(gpt, size, Hardware('a card', devices, 'cuda', None), 'float32').memory

    def expected(rows, accumulating, distributed):
        return step_memory(gpt.config, rows, 'float32', 'cuda', accumulating,
                           distributed=distributed)

    assert memory_on(1) == expected(4, accumulating=True, distributed=False)
    assert memory_on(2) == expected(4, accumulating=False, distributed=True)
    assert memory_on(4) == expected(2, accumulating=False, distributed=True)


def test_nothing_is_said_of_what_is_unknown():
    gpt = GPT(GPTConfig(16, 65, 2, 2, 16))
    said = plan.Plan(gpt, RunSize(batch_size=4, max_steps=0), A_CARD, 'float32').summary()
    assert 'scale' not in said and 'fits' not in said['memory']


def test_float32_buffers_of_the_hardware_are_in_the_plan():
    gpt = GPT(GPTConfig(600, 65, 2, 2, 64))
    a_cpu = Hardware('a CPU', 1, 'cpu', None)
    with_buffers = a_cpu._replace(float32_buffers=True)
    size = RunSize(batch_size=3)
    memory = [plan.Plan(gpt, size, each, 'bfloat16').memory for each in (a_cpu, with_buffers)]
    assert memory == [step_memory(gpt.config, 3, 'bfloat16', 'cpu', float32_buffers=buffers)
                      for buffers in (False, True)]


def test_a_run_is_planned_as_it_is_compiled(gpt):
    a_cpu = A_CARD._replace(device_type='cpu')

    def is_compiled(hardware, key, compiled=None):
        run_plan = plan.Plan.of_run(gpt, RUN | {'compile': key}, hardware, 'float32', (),
                                    compiled=compiled)
        return run_plan.size.compiled

    assert is_compiled(A_CARD, key=None) and is_compiled(a_cpu, key=True)
    assert not is_compiled(a_cpu, key=None) and not is_compiled(A_CARD, key=False)
    assert not is_compiled(A_CARD, key=None, compiled=False)  # compiling has failed


def test_what_the_model_and_the_card_have_is_in_the_plan(gpt):
    size = RunSize(batch_size=3, compiled=True)
    gpt.residual_dtype = torch.bfloat16
    old_card = A_CARD._replace(has_flash=False)
    assert plan.Plan(gpt, size, old_card, 'bfloat16').memory == step_memory(
        gpt.config, 3, 'bfloat16', 'cuda', compiled=True, bf16_residual=True, has_flash=False)


def test_the_model_is_described_by_what_gpt2_does_not_have():
    gpt = GPT(GPTConfig(16, 65, 2, 2, 16, position='rope', n_kv_head=1, tied=False))
    said = plan.Plan(gpt, RunSize(batch_size=4), A_CARD, 'float32').summary()
    assert said['model'] == (
        f'{gpt.get_num_params(False):,} parameters: token embedding and head 2.08k, '
        'attention 1.63k, MLP 4.26k, layer norms 160; '
        'GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=16, dropout=0.0, '
        "bias=True, position='rope', n_kv_head=1, tied=False)")


# ---- the optimizer state, which depends on the optimizer and on what is trained ----

RUN = dict(gradient_accumulation_steps=1, batch_size=4, max_iters=1, eval_interval=5, eval_iters=1,
           activation_checkpointing=False, optimizer='adamw', lora_rank=0,
           trainable='all', unfreeze=None, compile=None)
MATRICES = 2 * 12 * 16 * 16                             # of the two blocks
EVERYTHING = 16 * 65 + 16 * 16 + MATRICES + 5 * 16      # embeddings, blocks, norms
PART = r'wpe|h\.1|ln_f'
IN_PART = EVERYTHING - 16 * 65 - MATRICES // 2 - 2 * 16  # without wte and block 0


@pytest.fixture
def gpt():
    return GPT(GPTConfig(16, 65, 2, 2, 16, bias=False))


def plan_of(gpt, **keys):
    return plan.Plan.of_run(gpt, RUN | keys, A_CARD, 'float32', ())


def state_of(gpt, **keys):
    return plan_of(gpt, **keys).memory['optimizer state']


def test_adamw_keeps_two_numbers_a_parameter(gpt):
    assert state_of(gpt) == 8 * EVERYTHING
    said = plan_of(gpt).summary()
    assert 'trained' not in said['model']
    assert said['disk'].startswith(f'{12 * EVERYTHING / 1e6:.3g} MB')


def test_muon_keeps_one_number_for_each_of_the_blocks_matrices(gpt):
    assert state_of(gpt, optimizer='muon') == 8 * EVERYTHING - 4 * MATRICES
    disk = plan_of(gpt, optimizer='muon').summary()['disk']
    assert disk.startswith(f'{(12 * EVERYTHING - 4 * MATRICES) / 1e6:.3g} MB')


def test_the_update_of_muon_is_in_the_plan(gpt):
    assert plan_of(gpt).size.update_memory == 0
    assert plan_of(gpt, optimizer='muon').size.update_memory > 0


def test_frozen_parameters_have_no_optimizer_state(gpt):
    keys = dict(optimizer='muon', trainable=PART)
    assert state_of(gpt, **keys) == 8 * IN_PART - 2 * MATRICES
    model = plan_of(gpt, **keys).summary()['model']
    assert model.startswith(f'{EVERYTHING:,} parameters, {IN_PART:,} of them trained: ')


def test_the_stage_that_trains_the_most_counts_even_while_it_is_frozen(gpt):
    keys = dict(optimizer='muon', unfreeze={0: 'head', 5: PART, 9: 'ln_f'})
    expected = state_of(gpt, optimizer='muon', trainable=PART)
    assert state_of(gpt, **keys) == expected
    freezing.freeze(gpt, 0, RUN | keys)  # as a run has done when it prints its plan
    assert state_of(gpt, **keys) == expected


def test_a_checkpoint_of_lora_holds_the_adapter_alone(gpt):
    lora.add_lora(gpt, 2, 4.0, 0.0, 'c_attn')
    adapter = 2 * 2 * (16 + 48)
    assert state_of(gpt, lora_rank=2) == 8 * adapter
    disk = plan_of(gpt, lora_rank=2).summary()['disk']
    assert disk.startswith(f'{12 * adapter / 1e6:.3g} MB')
