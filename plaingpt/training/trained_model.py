"""
A trained model to use: to write text with, to evaluate or to export.
"""
from typing import NamedTuple

from model import GPT
from plaingpt.formats.hugging_face_files import CannotLoad
from plaingpt.formats.peft_adapter import load_adapter
from plaingpt.system.messages import UserError, explained, warn
from plaingpt.text.data_sets import folder_of, read_meta
from plaingpt.text.mixtures import shares_of
from plaingpt.text.tokenizers import load_tokenizer
from plaingpt.training import checkpoints, lora, resuming, starting_weights


class TrainedModel(NamedTuple):
    """A model as open_trained() returns it."""
    gpt: GPT         # in float32 on the CPU; adapters are merged into its weights
    tokenizer: dict  # the one that it was trained with
    saved: dict      # its checkpoint; {} for a model of another program
    path: str        # the checkpoint's file, or the other program's file, folder or hub id
    adapter: str     # the folder of the adapter in it; '': none

    @property
    def name(self):
        """The path of the model, and of its adapter."""
        if not self.adapter:
            return self.path
        return f'{self.path} with {self.adapter}'

    @property
    def origin(self):
        """What a script says of where the model comes from."""
        if not self.saved:
            return self.name
        return f"{self.name}, step {self.saved['iter_num']}"

    def load_tokenizer(self):
        """The tokenizer itself. UserError if it is damaged, or has more tokens than the model."""
        tokenizer = load_tokenizer(self.tokenizer)
        known = self.gpt.config.vocab_size
        if tokenizer.vocab_size > known:
            raise UserError(f'{self.path} has a vocabulary of {known} tokens and its tokenizer one '
                            f'of {tokenizer.vocab_size}: they do not belong together')
        return tokenizer


def open_named(config, given):
    """The TrainedModel that the keys init_from, out_dir and adapter of a script name.

    config, given: what configure() has returned. UserError as from open_trained()."""
    base = config['init_from']
    if config['adapter'] and 'init_from' not in given:
        base = None  # the one that the adapter names
    return open_trained(base, config['out_dir'], config['adapter'])


def open_trained(init_from, out_dir='', adapter=''):
    """The TrainedModel that the keys of these names ask for.

    init_from: 'resume' for the best of the run in out_dir, or as in starting_weights.find(); None
    for the base that the adapter names.
    adapter: the folder of a LoRA adapter to merge into it; '': none.
    UserError, in one sentence, if there is no such model or nothing says which tokenizer it has."""
    loaded_adapter = load_adapter(adapter) if adapter else None
    if init_from is None:
        init_from = loaded_adapter.lora.base
        if init_from == '':
            raise UserError(f'{adapter} does not name its base: give it with --init_from')
    with explained(CannotLoad, prefix=f'init_from={init_from}: '):
        if init_from == 'resume':
            saved, path = checkpoints.load_to_sample(out_dir)
        else:
            saved, path = starting_weights.find(init_from)
        gpt = starting_weights.build(saved, path, mapped=True)
        tokenizer = starting_weights.tokenizer_of(saved, path)
    lora.merge_adapter(gpt)  # if it is a LoRA run
    if loaded_adapter:
        lora.apply_adapter(gpt, loaded_adapter, path)
        lora.merge_adapter(gpt)
        tokenizer = loaded_adapter.tokenizer or tokenizer
    if tokenizer is None:
        tokenizer = _guessed_tokenizer(saved, path)
    return TrainedModel(gpt, tokenizer, saved, path, adapter)


def _guessed_tokenizer(saved, path):
    """The tokenizer dict of a model that names none."""
    if not saved:
        raise UserError(f'{path} has no tokenizer.json, and too few tokens for the vocabulary of '
                        "GPT-2: put the model's own tokenizer.json there")
    # A checkpoint of nanoGPT: the characters are stored with its data set only.
    dataset = resuming.data_set(saved, path)
    data_dir = folder_of(next(iter(shares_of(dataset))))  # the data sets of a mixture share them
    tokenizer = read_meta(data_dir)['tokenizer']
    warn(f'{path} names no tokenizer: using that of {data_dir}, of kind {tokenizer["kind"]!r}')
    return tokenizer
