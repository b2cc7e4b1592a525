import asyncio
import threading

from plaingpt.serving.mailbox import Mailbox


class CountingLoop:
    """A loop that keeps what it is asked to call, and calls it when told."""

    def __init__(self):
        self.calls = []

    def call_soon_threadsafe(self, function):
        self.calls.append(function)

    def run(self):
        calls, self.calls = self.calls, []
        for function in calls:
            function()


def test_calls_keep_their_order_and_wake_the_loop_once():
    loop = CountingLoop()
    mailbox = Mailbox(loop)
    found = []
    for number in range(5):
        mailbox.put(found.append, number)
    assert len(loop.calls) == 1
    loop.run()
    assert found == [0, 1, 2, 3, 4]
    mailbox.put(found.append, 5)
    assert len(loop.calls) == 1
    loop.run()
    assert found[-1] == 5


def test_a_call_that_comes_while_the_others_are_made_is_made_too():
    loop = CountingLoop()
    mailbox = Mailbox(loop)
    found = []

    def put_another(number):
        found.append(number)
        mailbox.put(found.append, number + 1)

    mailbox.put(put_another, 1)
    loop.run()
    loop.run()
    assert found == [1, 2]


def test_calls_from_other_threads_arrive():
    async def collect():
        mailbox = Mailbox(asyncio.get_running_loop())
        found = []
        everything = asyncio.Event()

        def receive(number):
            found.append(number)
            if len(found) == 4000:
                everything.set()

        def send(first):
            for number in range(first, first + 1000):
                mailbox.put(receive, number)

        threads = [threading.Thread(target=send, args=(first,)) for first in range(0, 4000, 1000)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(everything.wait(), 30)
        for thread in threads:
            thread.join()
        return found

    found = asyncio.run(collect())
    assert sorted(found) == list(range(4000))
    for first in range(0, 4000, 1000):
        of_thread = [number for number in found if first <= number < first + 1000]
        assert of_thread == sorted(of_thread)
