"""
Models of other programs, in one of two forms: a .gguf file, which gguf_reading.py reads, or a
directory or hub id in Hugging Face's form, which hugging_face.py reads.
"""
import os

from plaingpt.formats import gguf_reading, hugging_face


def is_gguf(source):
    """Whether a source is a .gguf file, by its name."""
    return source.endswith('.gguf')


def is_foreign_folder(source):
    """Whether a source is a folder that holds a model in Hugging Face's form."""
    return os.path.exists(os.path.join(source, 'config.json'))


def load_foreign(source, overrides=None, weights=True):
    """GPT in float32 with the weights of a foreign model.

    overrides: {'dropout': float} or None.
    weights=False: random weights in the same shape, for which the description is enough.
    hugging_face_files.CannotLoad, a ValueError, if it can't be loaded."""
    overrides = overrides or {}
    not_overridable = sorted(set(overrides) - {'dropout'})
    if not_overridable:
        raise ValueError('only dropout may be overridden in a pretrained model, '
                         f'not {not_overridable}')
    load = gguf_reading.load_gguf if is_gguf(source) else hugging_face.load_pretrained
    return load(source, overrides, weights)


def tokenizer_of(source):
    """The tokenizer dict of a foreign model, or None if nothing says which one it has.

    UserError if its tokenizer is damaged or unknown; CannotLoad if its files can't be read."""
    if is_gguf(source):
        return gguf_reading.gguf_tokenizer_of(source)
    return hugging_face.tokenizer_of(source)
