"""A clock that jumps ahead while a loop is going on."""

import time
from collections import Counter

_real = time.perf_counter


class Clock:
    """Hears of loops, and is an hour later once ``after`` steps of a loop with ``during`` in its name are done.

    Attributes:
        loops: that were begun.
        late: those of them that were begun later.
        done: steps of each.
    """

    def __init__(self, during, after=1):
        self.during, self.left, self.ahead = during, after, 0.0
        self.loops, self.late, self.done = [], [], Counter()

    def __call__(self):
        return _real() + self.ahead

    def start(self, what, total):
        self.loops.append(what)
        if self.ahead:
            self.late.append(what)
        if self.during in what and self.left <= 0:
            self.ahead = 3600.0
        return what

    def advance(self, task, count):
        self.done[task] += count
        if self.during in task:
            self.left -= count
            self.ahead = 3600.0 if self.left <= 0 else self.ahead

    def end(self, task):
        pass

    def say(self, sentence):
        pass
