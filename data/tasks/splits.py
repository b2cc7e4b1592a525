"""
Reads the examples of a task from the .jsonl files in this folder.

With `dataset_path: json`, lm_eval would look for them in the working directory, and keep a copy of
them in the home directory.
"""
import json
from pathlib import Path

from datasets import Dataset, DatasetDict


def read_splits(name, **metadata):
    """The splits train and test of a task, a DatasetDict.

    name: of the task. metadata: what lm_eval adds from the .yaml file."""
    splits = {}
    for split in ('train', 'test'):
        path = Path(__file__).with_name(f'{name}_{split}.jsonl')
        lines = path.read_text(encoding='utf-8').splitlines()
        splits[split] = Dataset.from_list([json.loads(line) for line in lines])
    return DatasetDict(splits)
