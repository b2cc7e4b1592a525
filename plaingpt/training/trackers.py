"""
Experiment trackers: copies of metrics.jsonl in Weights & Biases, TensorBoard, or trackio.

A killed run resumes from its last saved state and repeats the steps after it. Each tracker still
shows every step once and in order. When a session starts, it asks the tracker's own record which
step is the first that it lacks. Steps before that are not sent again, and lines that are missing,
because a kill lost them or because an earlier session had no tracker, come from metrics.jsonl.

The figures of repeated steps are those of the resumed session in TensorBoard, which can hide the
old ones. Weights & Biases and trackio can only append, and keep the first that they got.
"""
import glob
import os
import struct
from importlib.util import find_spec

from plaingpt.system.messages import UserError, explained, warn


def chosen(run):
    """The tracker that the keys of train.py ask for: 'none', 'wandb', 'tensorboard', 'trackio'."""
    if run['wandb_log'] and run['tracker'] == 'none':
        return 'wandb'
    return run['tracker']


def problems(run):
    """Yields what is wrong with the keys of train.py about trackers."""
    name = chosen(run)
    if run['wandb_log'] and name != 'wandb':
        yield f"wandb_log=True means tracker='wandb', not {name!r}: add --wandb_log=False"
    writes = not (run['plan'] or run['find_lr'] or run['eval_only'])
    if name != 'none' and writes and not find_spec(name):
        yield f'tracker={name!r} needs its package: pip install {name}'


def connect(run, run_id):
    """The Tracker that the keys of train.py ask for, or None.

    run_id: names the run in wandb and trackio. UserError if the tracker refuses these keys."""
    name = chosen(run)
    if name == 'none':
        return None
    return Tracker(name, run, run_id)


class Tracker:
    """Sends the lines of metrics.jsonl to a tracker, each step once and in order.

    Whatever fails there is one warning. Training continues, and the next session of the run sends
    what is missing."""

    def __init__(self, name, run, run_id):
        """Connects to the tracker, and writes nothing into out_dir yet."""
        self.name = name
        self.next_step = 0  # the first step that the tracker lacks
        self.record = self._attempt(RECORDS[name], run, run_id)  # None after a failure

    def start(self, step, entries):
        """Begins a session that writes lines from this step on.

        entries: the lines of earlier sessions, as dicts; the tracker gets those that it lacks."""
        if self.record:
            self.next_step = self._attempt(self.record.open, step)
            for entry in entries:
                self.send(entry)

    def send(self, entry):
        """Logs the figures of a line, unless the tracker has its step already."""
        # The line that says why a run ended has no figures, and its step has a line before it.
        if self.record is None or entry['step'] < self.next_step or 'error' in entry:
            return
        self._attempt(self.record.log, entry['step'], figures_of(entry))
        self.next_step = entry['step'] + 1

    def close(self):
        if self.record:
            self._attempt(self.record.close)

    def _attempt(self, action, *arguments):
        """What action(*arguments) returns; if it fails, None, and the tracker is not used again.

        Each tracker has its own exceptions for a lost server or a full disk, and none of them is
        worth a run."""
        try:
            return action(*arguments)
        except UserError:
            raise
        except Exception as error:
            self.record = None
            warn(f'tracker={self.name!r} has failed ({error}): training continues without it, and '
                 'a resumed run will send it what is missing')
        return None


def figures_of(entry):
    """{name: number} of a line of metrics.jsonl, as trackers take them.

    The norms of the groups of weights become weight_norm/mlp and so on."""
    figures = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            for part, number in value.items():
                figures[f'{key}/{part}'] = number
        elif key != 'step':
            figures[key] = value
    return {key: number for key, number in figures.items() if number is not None}


# ---- the trackers ----
# Each has open(step), which returns the first step that its record lacks, log(step, figures) and
# close().
class WeightsAndBiases:
    """A run of Weights & Biases, online or in a local folder (WANDB_MODE=offline)."""

    def __init__(self, run, run_id):
        import wandb
        try:
            self.run = wandb.init(project=run['wandb_project'], name=run['wandb_run_name'],
                                  config=run, id=run_id, resume='allow')
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise UserError(f"tracker='wandb', but Weights & Biases refuses: {error}") from error

    def open(self, step):
        if not self.run.offline:
            return self.run.starting_step  # the server knows
        # Offline, each session has a file of its own, and `wandb sync` joins those of an id.
        folders = os.path.join(glob.escape(self.run.settings.wandb_dir), f'*run-*-{self.run.id}')
        recorded = [-1]
        for path in glob.glob(os.path.join(folders, '*.wandb')):
            recorded.extend(history.step.num for history in wandb_histories(path))
        return max(recorded) + 1

    def log(self, step, figures):
        # Without commit=True, wandb would keep a step back until it sees the next one.
        self.run.log(figures, step=step, commit=True)

    def close(self):
        self.run.finish()


def wandb_histories(path):
    """Yields the logged steps in a .wandb file, wandb's local record of a session.

    The file is in LevelDB's log format: blocks of 32 KiB, filled with pieces of records. A piece
    has a header of 7 bytes: a checksum, its length, and whether it is a whole record (1), or the
    first (2), a middle (3) or the last (4) piece of one. The first 7 bytes are wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record
    with open(path, 'rb') as file:
        content = file.read()
    position = 7
    pieces = b''
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:  # too short for a header: padding
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from('<IHB', content, position)
        position += 7
        pieces += content[position:position + length]
        position += length
        complete = kind in (1, 4) and position <= len(content)  # a kill can cut the last one off
        if complete:
            record = Record.FromString(pieces)
            pieces = b''
            if record.HasField('history'):
                yield record.history


class TensorBoard:
    """Event files in out_dir/tensorboard, one for each session of the run."""

    def __init__(self, run, run_id):
        self.folder = os.path.join(run['out_dir'], 'tensorboard')
        self.writer = None

    def open(self, step):
        from torch.utils.tensorboard import SummaryWriter
        first_missing = min(step, self._end())
        # TensorBoard drops what earlier files have from purge_step on.
        self.writer = SummaryWriter(self.folder, purge_step=first_missing)
        return first_missing

    def _end(self):
        """The first step that the newest file lacks; 0 if there is no file."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        paths = glob.glob(os.path.join(glob.escape(self.folder), 'events.out.tfevents.*'))
        for path in sorted(paths, reverse=True):  # the names begin with the time
            end = None
            for event in LegacyEventFileLoader(path).Load():
                if event.HasField('session_log'):  # the purge_step of this file
                    end = event.step
                elif event.HasField('summary'):
                    end = event.step + 1
            if end is not None:
                return end
        return 0

    def log(self, step, figures):
        from tensorboard.compat.proto.summary_pb2 import Summary
        values = [Summary.Value(tag=key, simple_value=value) for key, value in figures.items()]
        # One event for the line and a flush (0.1 ms together), so that a kill leaves whole lines
        # and loses none.
        self.writer.file_writer.add_summary(Summary(value=values), step)
        self.writer.flush()

    def close(self):
        self.writer.close()


class Trackio:
    """A run of trackio: a local database, or a server that its environment variables name."""

    def __init__(self, run, run_id):
        import trackio
        # trackio finds a run by its name, which must therefore be this run's alone.
        with explained(ValueError, prefix="tracker='trackio', but trackio refuses: "):
            self.run = trackio.init(project=run['wandb_project'], config=run, resume='allow',
                                    name=f'{run["wandb_run_name"]}-{run_id}', embed=False)

    def open(self, step):
        # One after the last in its database or on its server. The attribute is trackio 0.43's own;
        # without it, the Tracker warns and the run goes on without one.
        return self.run._next_step

    def log(self, step, figures):
        self.run.log(figures, step=step)

    def close(self):
        self.run.finish()


RECORDS = {'wandb': WeightsAndBiases, 'tensorboard': TensorBoard, 'trackio': Trackio}
