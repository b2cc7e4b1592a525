"""
Runs scripts again and again in children of one process that has imported torch already: a start takes a tenth of a
second in place of three. It reads an order a line on stdin, {"argv": [script, flags…], "log": path, …}, and answers
each with the exit status of the child, negative if a signal has ended it. An order may say when the child is killed:

    after      this many seconds after its start
    save, at   in its save number `save`, before file operation number `at` of it, or right after it if it has fewer
"""
import io
import json
import os
import runpy
import signal
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch._dynamo  # noqa: E402, F401  # which an optimizer takes most of a second to import

import model  # noqa: E402, F401
from plaingpt.training import checkpoints


def kill_in_save(save, at):
    saves, operations, original = [], [], checkpoints.save

    def tick(last=False):
        operations.append(1)
        if len(saves) == save and (last or len(operations) == at):
            os.kill(os.getpid(), signal.SIGKILL)

    class File(io.FileIO):
        def write(self, content):
            content = memoryview(content).cast('B')
            written = super().write(content[:len(content) // 2])  # a kill can leave half of it
            tick()
            return written + super().write(content[len(content) // 2:])

    def counted(function):
        return lambda *arguments: (tick(), function(*arguments))[1]

    def counted_save(*arguments):
        saves.append(1)
        operations.clear()
        original(*arguments)
        print('file operations of this save:', len(operations), flush=True)
        tick(last=True)

    for name in 'fsync', 'replace', 'link', 'remove':
        setattr(os, name, counted(getattr(os, name)))
    checkpoints.open = lambda path, mode: (tick(), File(path, mode))[1]
    checkpoints.save = counted_save


def obey(order):
    with open(order['log'], 'w', encoding='utf-8') as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    if 'at' in order:
        kill_in_save(order['save'], order['at'])
    sys.argv = order['argv']
    runpy.run_path(os.path.join(ROOT, sys.argv[0]), run_name='__main__')
    sys.exit(0)


if __name__ == '__main__':
    print('ready', flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            obey(order)
        due = time.monotonic() + order.get('after', 1e9)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > due:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)
