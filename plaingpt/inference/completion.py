"""
Completions: the text of each row of a batch, from ids that arrive one position after another.
"""
import torch


def complete(new_ids, rows, tokenizer, stops=(), show=None):
    """The completions of all rows, a list of str.

    new_ids: yields the next id of each row, int64 (rows, 1), as engine.stream() does. It is asked
        for no more once each row has a stop.
    stops: texts that end a completion, and are cut off with all that follows.
    show: a function that gets each piece of the first completion as soon as it is known."""
    chosen = []
    decoders = [tokenizer.decoder() for _ in range(rows)]
    drafts = [''] * rows  # the completions so far, as far as they are followed
    unfinished = list(range(rows))  # rows without a stop
    may_begin_a_stop = max((len(stop) - 1 for stop in stops), default=0)  # last characters
    shown = 0
    for ids in new_ids:
        chosen.append(ids)
        if not show and not stops:
            continue  # nobody looks yet, so no step waits for the device
        new = ids.flatten().tolist()
        followed = unfinished if stops else [0]
        for row in followed:
            drafts[row] += decoders[row]([new[row]])
        unfinished = [row for row in unfinished if not _has_any(drafts[row], stops)]
        if not unfinished:
            break
        if show and 0 in unfinished:
            ready = max(shown, len(drafts[0]) - may_begin_a_stop)
            show(drafts[0][shown:ready])
            shown = ready

    ids_of_rows = torch.cat(chosen, dim=1).tolist() if chosen else [[] for _ in range(rows)]
    completions = []
    for ids in ids_of_rows:
        completion = tokenizer.decode(ids)
        for stop in stops:
            completion = completion.partition(stop)[0]
        completions.append(completion)
    if show:
        show(completions[0][shown:])
    return completions


def _has_any(text, stops):
    return any(stop in text for stop in stops)
