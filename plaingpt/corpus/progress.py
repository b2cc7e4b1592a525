"""
Shows how far the reading of a corpus is: a bar in a terminal, now and then a line elsewhere.
"""
import time

from tqdm import tqdm

from plaingpt.system.messages import print0

LINE_SECONDS = 30  # between lines


class Progress:
    """The progress of one reading, to be used in a with statement.

    name: what is being done. total, begin: bytes of all files, and those that were read before."""

    def __init__(self, name, total, begin=0):
        self.name = name
        self.total = total
        self.begin = begin
        self.tokens = 0
        self.began = time.monotonic()
        self.printed = self.began
        # disable=None: a bar only where the output is a terminal
        self.bar = tqdm(total=total, initial=begin, desc=name, unit='B', unit_scale=True,
                        disable=None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def show(self, done, tokens=0):
        """Shows that `done` bytes are read, and that they gave so many more tokens."""
        self.tokens += tokens
        if not self.bar.disable:
            if self.tokens:
                speed = self.tokens / (time.monotonic() - self.began)
                self.bar.set_postfix_str(f'{speed:,.0f} tokens/s', refresh=False)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if now - self.printed < LINE_SECONDS or done <= self.begin:
            return
        self.printed = now
        seconds = now - self.began
        minutes_left = (self.total - done) * seconds / (done - self.begin) / 60
        speed = f'{self.tokens / seconds:,.0f} tokens/s, ' if self.tokens else ''
        print0(f'{self.name}: {done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {speed}'
               f'{minutes_left:.1f} minutes left')
