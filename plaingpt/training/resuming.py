"""
Resuming a run: which checkpoint it continues, which data set that fixes, and restoring weights,
moments and loss scale. state.py restores the counts of the run.
"""
import hashlib
import os
import re

import torch

from plaingpt.system.messages import UserError
from plaingpt.training import older_checkpoints
from plaingpt.training.checkpoints import load_to_resume, present
from plaingpt.training.optimizers import expected_state

# The name that torchrun gives the job, unless it gives none.
JOB = os.environ.get('TORCHELASTIC_RUN_ID')
if JOB == 'none':
    JOB = None

# Names of folders in data/ only: one alone, or several with their shares.
FOLDER = r'\w[\w.-]*'
WITH_SHARE = rf'{FOLDER} *: *[\d.eE+-]+'
INSIDE_DATA = re.compile(rf'{FOLDER}|{WITH_SHARE}( *, *{WITH_SHARE})*')


# ---- which checkpoint ----

def to_resume(out_dir, init_from, resume, restarted):
    """(checkpoint, path) that a run continues; ({}, None) if it starts anew.

    init_from and resume: those keys of train.py. restarted: whether torchrun has restarted the job
    (--max-restarts), which then continues what it has saved, whatever it first started from."""
    if resume == 'always' or init_from == 'resume':
        return load_to_resume(out_dir)
    if not present(out_dir):
        return {}, None
    if resume == 'auto':
        return load_to_resume(out_dir)
    if restarted and JOB is not None:
        checkpoint, path = load_to_resume(out_dir)
        if checkpoint.get('job') == JOB:
            return checkpoint, path
    return {}, None


def describe_resume(checkpoint, path, config, hidden):
    """A line that says what is resumed, and which keys of config, but the hidden ones, changed."""
    saved_config = checkpoint['config']
    changes = []
    for key, value in config.items():
        saved_value = saved_config.get(key, value)
        if saved_value != value and key not in hidden:
            changes.append(f'{key} {saved_value!r} -> {value!r}')
    line = f"resuming {path} at step {checkpoint['iter_num']}"
    if changes:
        line += f'; now {", ".join(changes)}'
    return line


def fingerprint(checkpoint):
    """A number by which processes find out whether they have loaded the same state."""
    state = repr([checkpoint.get('iter_num'), checkpoint.get('digest')])
    return int(hashlib.sha256(state.encode()).hexdigest()[:12], 16)


def data_set(checkpoint, path, given=None,
             remedy='if you trust it, name it yourself with train.py --dataset'):
    """The data set, or the mixture of several, that a checkpoint was trained on.

    UserError if it leads out of data/, unless the user has given the same name: whoever made the
    file may have put any path into it. remedy: what this error tells the user to do."""
    name = checkpoint['config'].get('dataset', given)
    given_by_user = given is not None and name == given
    inside_data = isinstance(name, str) and INSIDE_DATA.fullmatch(name)
    if given_by_user or inside_data:
        return name
    raise UserError(f'{path} was trained on the data set {str(name)[:200]!r}, which is not a '
                    f'folder in data/: {remedy}')


# ---- into a model ----

def restore_model(model, checkpoint, path, mapped=False):
    """Gives model the checkpoint's weights; UserError if they have other names or shapes.

    The parameters are replaced by float32 tensors, so the model may be on the meta device.
    mapped: do not copy float32 weights, but use them where they lie, in the map of their file."""
    weights = {name: weight.to(torch.float32, copy=not mapped)
               for name, weight in checkpoint['model'].items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        details = ' '.join(str(error).split())[:300]
        raise UserError(f'the weights in {path} do not fit the model_args beside them '
                        f'({details})') from error
    if model.config.tied:
        model.transformer.wte.weight = model.lm_head.weight


def restore_optimizer(optimizer, scaler, checkpoint, path):
    """Copies the checkpoint's moments into optimizer, and its loss scale into scaler.

    The optimizer keeps its own learning rate, betas and decay. UserError if the moments are missing
    or of another optimizer."""
    saved = checkpoint.get('optimizer')
    state = saved.get('state') if isinstance(saved, dict) else None
    if not _moments_fit(state, expected_state(optimizer), checkpoint):
        raise UserError(f'the optimizer state in {path} is missing, or of another model or '
                        'optimizer: resume with the optimizer that it was saved by, or begin a new '
                        f'run with --init_from={path}')
    groups = optimizer.state_dict()['param_groups']
    optimizer.load_state_dict({'state': state, 'param_groups': groups})
    # On a CPU the moments still lie in the file's memory map: copy them.
    for moments in optimizer.state.values():
        for name, tensor in moments.items():
            if tensor.device.type == 'cpu':
                moments[name] = tensor.clone()

    scale = checkpoint.get('scaler') or scaler.state_dict()  # a run in another precision has none
    if scaler.is_enabled():
        for key in scaler.state_dict():
            if not isinstance(scale.get(key), (int, float)):
                raise UserError(f'the scaler state in {path} is incomplete')
    scaler.load_state_dict(scale)


def _moments_fit(state, expected, checkpoint):
    """Whether a saved optimizer state is one that the optimizer can have.

    expected: for each parameter {name: shape} of its moments; see optimizers.expected_state()."""
    if not isinstance(state, dict):
        return False
    # Parameters that were always frozen have no moments; the checkpoint counts those that have.
    counted = checkpoint.get('moments', len(expected))
    if len(state) != counted and not older_checkpoints.may_lack_moments(checkpoint):
        return False
    for number, moments in state.items():
        if not isinstance(number, int) or not 0 <= number < len(expected):
            return False
        if not isinstance(moments, dict):
            return False
        shapes = {name: getattr(value, 'shape', None) for name, value in moments.items()}
        if shapes != expected[number]:
            return False
    return True
