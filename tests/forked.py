"""
Runs scripts again and again in children of one process that has imported torch already: a start
takes a tenth of a second instead of three.

It reads an order a line on stdin, {"argv": [script, flags…], "log": path, …}, and answers each with
the exit status of the child, negative if a signal has ended it. An order may say when the child is
killed:

    after      this many seconds after its start
    save, at   in its save number `save`, before file operation number `at` of it, or right after
               the save if it has fewer operations

Start it with the repository on PYTHONPATH.
"""
import importlib
import io
import json
import os
import runpy
import signal
import sys
import time

import model
from plaingpt.system import files
from plaingpt.training import checkpoints

importlib.import_module('torch._dynamo')  # an optimizer takes most of a second to import it

ROOT = os.path.dirname(model.__file__)


class KillInSave:
    """Counts the file operations of each save, and kills this process at one of them."""

    def __init__(self, save, at):
        self.save = save
        self.at = at
        self.saves = 0
        self.operations = 0

    def tick(self):
        """To be called before each file operation."""
        self.operations += 1
        if self.saves == self.save and self.operations == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self):
        """Puts itself between checkpoints.save and the file system."""
        for name in 'fsync', 'replace', 'link', 'remove':
            setattr(os, name, self.counted(getattr(os, name)))
        files.open = self.open
        checkpoints.save = self.counted_save(checkpoints.save)

    def counted(self, function):
        def call(*arguments):
            self.tick()
            return function(*arguments)
        return call

    def open(self, path, mode):
        self.tick()
        return HalfwayFile(path, mode, self.tick)

    def counted_save(self, original):
        def save(*arguments):
            self.saves += 1
            self.operations = 0
            original(*arguments)
            print('file operations of this save:', self.operations, flush=True)
            if self.saves == self.save:
                os.kill(os.getpid(), signal.SIGKILL)
        return save


class HalfwayFile(io.FileIO):
    """A file that calls tick() in the middle of each write, as a kill can leave half of it."""

    def __init__(self, path, mode, tick):
        super().__init__(path, mode)
        self.tick = tick

    def write(self, content):
        content = memoryview(content).cast('B')
        half = len(content) // 2
        written = super().write(content[:half])
        self.tick()
        return written + super().write(content[half:])


def obey(order):
    """Runs the script of an order in this child process, which ends with it."""
    with open(order['log'], 'w', encoding='utf-8') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if 'at' in order:
        KillInSave(order['save'], order['at']).install()
    sys.argv = order['argv']
    runpy.run_path(os.path.join(ROOT, sys.argv[0]), run_name='__main__')
    sys.exit(0)


def wait_for(child, seconds):
    """The exit status of a child process, which is killed after so many seconds."""
    due = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > due:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


if __name__ == '__main__':
    print('ready', flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            obey(order)
        print(wait_for(child, order.get('after', 1e9)), flush=True)
