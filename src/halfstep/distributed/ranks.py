"""The processes of a run that torch.distributed holds together: how they talk, and how a lost one is noticed."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, distributed

from halfstep.distributed.watch import Watch
from halfstep.errors import RankError

#: How often whoever waits looks whether a rank was lost.
LOOK = 0.2
#: Seconds that a broken connection may take to notice that it is.
LEAVE = 5.0
#: Collectives themselves never give up: whoever waits does.
NEVER = timedelta(days=30)


def group_is_there() -> bool:
    """Whether ``torch.distributed`` is initialised with more than one rank."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@contextmanager
def joined() -> Iterator[bool]:
    """The process group that torchrun started this process for, for the length of a block; elsewhere nothing.

    NCCL carries what lies on GPUs, gloo all else; each rank on a machine has a GPU of its own.

    Yields:
        Whether this is rank 0, or the only process.

    Raises:
        RankError: the ranks do not find each other.
    """
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield True
        return
    accelerated = torch.cuda.is_available() and distributed.is_nccl_available()
    if accelerated:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if accelerated else "gloo")
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {os.environ.get('RANK', '?')}: the ranks do not find each other: {error}; see that "
            "torchrun's --rdzv-endpoint or --master-addr and --nnodes are right on every machine"
        ) from error
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


class Ranks:
    """All processes of the default group of ``torch.distributed``, rank 0 being the one that decides.

    What they say goes over a gloo group of their own, so that the user's is left alone, and from a thread of its own,
    so that whoever waits sees that a rank was lost, or Ctrl-C.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        sent: bytes that this process has sent, by what they were; of what goes to all other ranks, once.

    Raises:
        RankError: a rank does not come within the group's timeout.
    """

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.sent: Counter[str] = Counter()
        self._sending: list[tuple[Any, Tensor]] = []
        self.watch = Watch(self.rank, self.size)
        self.watch.begin()
        self._line = _Line()
        self._group: Any = distributed.new_group(backend="gloo", timeout=NEVER)

    # from rank 0 to all others

    def tell(self, content: bytes, what: str) -> None:
        """Send ``content`` to every other rank, which hears it; for rank 0."""
        payload = _tensor(content)
        self._count(what, payload)

        def broadcast() -> None:
            distributed.broadcast(torch.tensor([len(payload)]), 0, self._group)
            distributed.broadcast(payload, 0, self._group)

        self._wait(broadcast, what)

    def hear(self) -> bytes:
        """What rank 0 tells next, however long that takes."""

        def broadcast() -> bytes:
            length = torch.empty(1, dtype=torch.int64)
            distributed.broadcast(length, 0, self._group)
            payload = torch.empty(int(length), dtype=torch.uint8)
            distributed.broadcast(payload, 0, self._group)
            return payload.numpy().tobytes()

        content: bytes = self._wait(broadcast, "rank 0", patient=True)
        return content

    # from one to another

    def send(self, to: int, content: bytes, what: str) -> None:
        """Send ``content`` to a rank; does not wait until it is received."""
        payload = _tensor(content)
        self._count(what, payload)

        def send() -> None:
            for part in (torch.tensor([len(payload)]), payload):
                self._sending.append((distributed.isend(part, to, self._group), part))

        self._wait(send, what)

    def receive(self, source: int, what: str) -> bytes:
        """What a rank sent next.

        Raises:
            RankError: naming it, where it was lost or does not come to this.
        """

        def receive() -> bytes:
            length = torch.empty(1, dtype=torch.int64)
            distributed.recv(length, source, self._group)
            payload = torch.empty(int(length), dtype=torch.uint8)
            distributed.recv(payload, source, self._group)
            return payload.numpy().tobytes()

        content: bytes = self._wait(receive, what, source)
        return content

    def add_up(self, tensor: Tensor, what: str) -> None:
        """Make ``tensor`` the sum of all ranks' in place, the same to the last bit on each."""
        self._count(what, tensor)
        if tensor.device.type == "cuda" and "nccl" in distributed.get_backend_config():
            self._wait(lambda: _all_reduce_there(tensor), what)
            return
        here = tensor.cpu()
        self._wait(lambda: distributed.all_reduce(here, group=self._group), what)
        if here is not tensor:
            tensor.copy_(here)

    # waiting

    def _wait(
        self, operation: Callable[[], Any], what: str, source: int | None = None, patient: bool = False
    ) -> Any:
        """What ``operation`` returns, made in the thread of the line.

        Args:
            operation: talks to other ranks.
            what: about, in a word.
            source: the rank that is waited for; None where it may be any.
            patient: wait as long as it lives.

        Raises:
            RankError: a rank was lost, or is not there in time.
        """
        future, start = self._line.do(operation), time.monotonic()
        while True:
            try:
                return future.result(LOOK)
            except RuntimeError as error:
                raise self.watch.blame(error, source) from error
            except TimeoutError:
                self.watch.check()
                if not patient and time.monotonic() - start > self.watch.patience:
                    which = "a rank" if source is None else f"rank {source}"
                    raise RankError(
                        f"{which} gives signs of life, but did not come to {what!r} within "
                        f"{self.watch.patience:g} s, the timeout of the process group: look where it waits (a data "
                        "loader that hangs, a lock, a breakpoint), or give init_process_group a longer timeout"
                    ) from None

    def settle(self) -> None:
        """Let go of what was sent: it has been received."""
        sent, self._sending = self._sending, []
        for work, _ in sent:
            work.wait()

    def _count(self, what: str, payload: Tensor) -> None:
        self.sent[what] += payload.nbytes

    def close(self, last_words: str = "") -> None:
        """Stop watching, and leave the group; after an error with what the others are to be told of it."""
        self.watch.end(last_words)
        if last_words:
            self._group.abort()  # else the process could not end while the line waits for another rank
        self._line.close()
        distributed.destroy_process_group(self._group)
        self._group = None


class _Line:
    """A thread that does one thing after another."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="halfstep-line", daemon=True)
        self._thread.start()

    def do(self, operation: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._asked.put((future, operation))
        return future

    def close(self) -> None:
        self._asked.put(None)
        self._thread.join(LEAVE)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            future, operation = asked
            try:
                future.set_result(operation())
            except BaseException as error:
                future.set_exception(error)


def _all_reduce_there(tensor: Tensor) -> None:
    """Add up on GPUs, and wait until that is done."""
    with torch.cuda.device(tensor.device):  # a thread has one of its own
        distributed.all_reduce(tensor)
        torch.cuda.synchronize()


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()
