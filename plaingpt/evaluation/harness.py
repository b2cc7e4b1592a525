"""
Runs standard tasks with lm_eval, EleutherAI's evaluation harness: finds them, and prints and writes
their results.
"""
import difflib
import logging
import os
import tempfile

from plaingpt.system.files import write_atomically
from plaingpt.system.messages import UserError, explained, print0

# lm_eval's own seed for the solved examples of a task, so that scores equal those it publishes.
SEED = 1234


def run(gpt, tokenizer, tasks, *, task_path='', limit=None, num_fewshot=None, batch_size=16,
        chat_template=False, output='', seed=SEED, name=''):
    """Runs tasks in this process, prints a table of their scores, and returns lm_eval's results.

    gpt: in evaluation mode, on its device and in its precision.
    tokenizer: as load_tokenizer() returns it.
    tasks: names of lm_eval's tasks, groups and tags, and patterns such as 'mmlu_*'.
    task_path: a folder of further tasks as .yaml files, which are searched first. Such a file may
        name Python functions, which then run.
    limit: examples of each task; None: all.
    num_fewshot: solved examples before each; None: as the task has it.
    batch_size: texts that the model reads together.
    chat_template: True: each request becomes a message of a chat, and each solved example two.
    output: a .json file for what lm_eval calls the aggregated results. The answers to the examples
        of each task go beside it, to output_samples_TASK.jsonl. '': none.
    seed: of what a task draws, such as its solved examples.
    name: of the model, for these files.

    UserError if lm_eval is missing, a task is unknown, can't be loaded or asks for something that
    the model can't do, or if output can't be written."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        from plaingpt.evaluation.lm_eval_model import GPTForTasks
    except ImportError as error:
        raise UserError(f'tasks need the package lm_eval ({error}): '
                        'pip install lm_eval==0.4.13') from None
    if chat_template and getattr(tokenizer, 'chat_template', None) is None:
        raise UserError('this model has no chat template: leave out chat_template')
    logging.getLogger('lm_eval').setLevel(logging.ERROR)  # its hints are for authors of tasks
    manager, names = find_tasks(tasks, task_path)
    loaded = load_tasks(manager, names)
    if num_fewshot is not None:
        check_fewshot(loaded, num_fewshot)

    tracker = EvaluationTracker()
    model = GPTForTasks(gpt, tokenizer, batch_size, seed)
    results = simple_evaluate(
        model, model_args={'pretrained': name},
        tasks=_outermost(loaded, names), task_manager=manager, limit=limit,
        num_fewshot=num_fewshot, apply_chat_template=chat_template, batch_size=batch_size,
        device=str(model.device), numpy_random_seed=seed, torch_random_seed=seed,
        fewshot_random_seed=seed, evaluation_tracker=tracker)
    samples = results.pop('samples')
    print_table(results)
    if output:
        with explained(OSError, prefix='output cannot be written: '):
            write_results(tracker, results, samples, output)
    return results


# ---- tasks ----

def find_tasks(tasks, task_path):
    """(lm_eval's TaskManager, the names of all tasks that the names and patterns stand for)."""
    from lm_eval.tasks import TaskManager
    if task_path:
        manager = TaskManager(include_path=task_path, include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):
            return manager, tasks
    # Reading lm_eval's own 14,000 tasks takes 5 seconds.
    manager = TaskManager(include_path=task_path or None)
    names = []
    for task in tasks:
        matches = manager.match_tasks([task])
        if not matches:
            raise UserError(_unknown(task, manager.all_tasks, task_path))
        names += [match for match in matches if match not in names]
    return manager, names


def _unknown(task, known, task_path):
    sentence = f'tasks={task}: there is no task of this name in lm_eval'
    if task_path:
        sentence += f', and no valid .yaml file in {task_path} describes it'
    close = difflib.get_close_matches(task, known, n=3)
    if close:
        sentence += f'; did you mean {" or ".join(close)}?'
    return sentence


def load_tasks(manager, names):
    """lm_eval's TaskDict of the tasks and groups of these names, with their data.

    UserError if they can't be loaded."""
    try:
        return manager.load(names)
    except Exception as error:
        # What fails here is a .yaml file, the functions that it names, or a download, and lm_eval
        # and datasets let exceptions of any kind pass.
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]  # one line
        raise UserError(f'tasks={",".join(names)} cannot be loaded ({reason})') from error


def check_fewshot(loaded, num_fewshot):
    """UserError if a task has fewer solved examples than are to be shown."""
    for name, task in loaded['tasks'].items():
        solved = len(list(task.fewshot_docs() or []))
        if num_fewshot > solved:
            raise UserError(f'num_fewshot={num_fewshot}: the task {name} has {solved} solved '
                            'examples')


def _outermost(loaded, names):
    """Those of the loaded groups and tasks that no other one contains, a list of objects."""
    groups = [loaded['groups'][name] for name in names if name in loaded['groups']]
    contained = set()
    for group in groups:
        contained.update(task.task_name for task in group.get_all_tasks())
    single = [task for name, task in loaded['tasks'].items() if name not in contained]
    return groups + single


# ---- results ----

def print_table(results):
    """Prints the scores of groups, then those of tasks, as lm_eval does."""
    from lm_eval.utils import make_table
    if results.get('groups'):
        print0(make_table(results, 'groups'))
    print0(make_table(results))


def write_results(tracker, results, samples, output):
    """Writes the files of lm_eval's EvaluationTracker, under names without its date."""
    with tempfile.TemporaryDirectory() as folder:
        tracker.output_path = os.path.join(folder, 'results.json')
        tracker.save_results_aggregated(results, samples)
        written = {f'results_{tracker.date_id}.json': output}
        stem = output.removesuffix('.json')
        for task, rows in samples.items():
            tracker.save_results_samples(task, rows)
            written[f'samples_{task}_{tracker.date_id}.jsonl'] = f'{stem}_samples_{task}.jsonl'
        for temporary, path in written.items():
            with open(os.path.join(folder, temporary), 'rb') as file:
                write_atomically(path, file.read())
