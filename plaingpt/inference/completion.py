"""
Completions: the text of each row of a batch, from ids that arrive one position after another.
"""
import torch

from plaingpt.inference.text_stream import TextStream


def complete(new_ids, rows, tokenizer, stops=(), show=None):
    """The completions of all rows, a list of str.

    new_ids: yields the next id of each row, int64 (rows, 1), as engine.stream() does. It is asked
        for no more once each row has a stop.
    stops: texts that end a completion, and are cut off with all that follows.
    show: a function that gets each piece of the first completion as soon as it is known."""
    if not stops and show is None:
        # Nobody looks before the end, so no step waits for the device.
        chosen = list(new_ids)
        ids_of_rows = torch.cat(chosen, dim=1).tolist() if chosen else [[] for _ in range(rows)]
        return [tokenizer.decode(ids) for ids in ids_of_rows]

    completions = [''] * rows
    streams = [TextStream(tokenizer, stops) for _ in range(rows)]

    def add(row, piece):
        completions[row] += piece
        if show is not None and row == 0:
            show(piece)

    for ids in new_ids:
        for row, id in enumerate(ids.flatten().tolist()):
            if not streams[row].has_stopped:
                add(row, streams[row].push(id))
        if all(stream.has_stopped for stream in streams):
            break
    for row, stream in enumerate(streams):
        add(row, stream.finish())
    return completions
