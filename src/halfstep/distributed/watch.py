"""Signs of life: every rank gives one each second, so that one that was killed or is stuck is known by its number."""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import distributed

from halfstep.errors import RankError

#: Seconds between two signs of life.
BEAT = 1.0
#: Seconds between two looks whether a rank has come.
ARRIVAL = 0.02
#: A rank without a sign for so many seconds is lost.
SILENCE = 20.0
#: So many suffice once a connection to some rank has broken; others are looked at for as long as SEARCH.
BROKEN = 4.0
SEARCH = 15.0

_AGAIN = "start the same command again: the journal goes on from here, with any number of ranks"
_serial = itertools.count()


class Watch:
    """Gives this rank's signs of life in the store of the process group, and looks for the others'.

    Rank 0 looks for everyone's and tells what it finds; the others look for rank 0's, so that many ranks cost little.

    Args:
        rank: of this process.
        size: how many there are.

    Attributes:
        fault: which rank was lost and why, in words; empty while all is well.
        patience: seconds that a rank is waited for in a common step while it lives: the process group's timeout.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.fault = rank, size, ""
        # A connection of its own: others may wait on theirs.
        world = distributed.group.WORLD
        assert world is not None
        store: Any = world.get_group_store()
        self._store = distributed.PrefixStore(f"halfstep/{next(_serial)}", store.clone())  # type: ignore[attr-defined]
        self.patience = store.timeout.total_seconds()
        self._own = f"process {os.getpid()} on {socket.gethostname()}"
        self._seen: dict[int, tuple[str, float]] = {}
        self._awake, self._looked, self._lock = 0.0, time.monotonic(), threading.Lock()
        self._over = threading.Event()
        self._sign(0)

    def begin(self) -> None:
        """Wait for every rank's first sign, and look for the next ones from now on.

        Raises:
            RankError: naming a rank that does not come.
        """
        until = time.monotonic() + self.patience
        for rank in range(self.size):
            while not self._store.check([f"sign/{rank}"]):
                if time.monotonic() > until:
                    raise RankError(
                        f"rank {rank} of {self.size} did not come to the same call within {self.patience:g} s, the "
                        "timeout of the process group; every rank makes the same calls of halfstep"
                    )
                time.sleep(ARRIVAL)
        threading.Thread(target=self._beat, name="halfstep-watch", daemon=True).start()

    def check(self) -> None:
        """Raise once a rank was lost.

        Raises:
            RankError: naming it and the cause.
        """
        if self.fault:
            raise RankError(self.fault)

    def blame(self, cause: Exception, source: int | None = None) -> RankError:
        """The error for a broken connection, once it is known whose it was.

        Args:
            cause: what torch.distributed says.
            source: the rank that was spoken to; None where it were several.
        """
        reason = _plain(str(cause))
        until = time.monotonic() + SEARCH
        while not self.fault and time.monotonic() < until:
            self._look(range(self.size), BROKEN, reason)
            time.sleep(BEAT / 2)
        if not self.fault:
            which = f"rank {source}" if source is not None else "a rank"
            return RankError(
                f"the connection to {which} broke, though every rank is alive: {reason}; {_AGAIN}"
            )
        return RankError(self.fault)

    def end(self, last_words: str = "") -> None:
        """No further signs; why this rank ends, where that is an error."""
        self._over.set()
        if last_words:
            self._try(lambda: self._store.set(f"words/{self.rank}", last_words))
            if self.rank == 0:
                time.sleep(2 * BEAT)  # the store may end with this process: the others read it first

    def _beat(self) -> None:
        for count in itertools.count(1):
            if self._over.wait(BEAT):
                return
            if not self._try(lambda count=count: self._sign(count)):  # type: ignore[misc]
                self.fault = self.fault or f"rank 0 ended: the store that it keeps is gone; {_AGAIN}"
                return
            self._look(range(self.size) if self.rank == 0 else (0,), SILENCE, "")

    def _sign(self, count: int) -> None:
        self._store.set(f"sign/{self.rank}", f"{count} {self._own}")

    def _look(self, ranks: Iterable[int], silence: float, reason: str) -> None:
        """Note a fault where one of the ranks has said its last words, or nothing for a while."""

        now = self._time_awake()

        def look() -> None:
            if self._store.check(["fault"]):
                self.fault = self.fault or self._store.get("fault").decode()
            for rank in ranks:
                if rank == self.rank or self.fault:
                    continue
                if self._store.check([f"words/{rank}"]):
                    self._find(f"rank {rank} ended: {self._store.get(f'words/{rank}').decode()}")
                    continue
                sign = self._store.get(f"sign/{rank}").decode()
                if self._seen.get(rank, ("", 0.0))[0] != sign:
                    self._seen[rank] = sign, now
                elif now - self._seen[rank][1] > silence:
                    who = sign.partition(" ")[2]
                    because = f" ({reason})" if reason else ""
                    self._find(
                        f"rank {rank} of {self.size} ({who}) gave no sign of life for {silence:g} s: it was killed, or "
                        f"its machine is gone{because}; {_AGAIN}"
                    )

        if not self._try(look):
            self._find(
                f"rank 0 ended: the store that it keeps is gone{f' ({reason})' if reason else ''}; {_AGAIN}"
            )

    def _time_awake(self) -> float:
        """Seconds that this rank itself was not stopped: where the whole machine was, nobody else has been silent."""
        with self._lock:
            now = time.monotonic()
            self._awake += min(now - self._looked, 2 * BEAT)
            self._looked = now
            return self._awake

    def _find(self, fault: str) -> None:
        if not self.fault:
            self.fault = fault
            self._try(lambda: self._store.set("fault", fault))

    @staticmethod
    def _try(ask: Callable[[], object]) -> bool:
        """Whether the store answers."""
        try:
            ask()
        except RuntimeError:
            return False
        return True


def _plain(words: str) -> str:
    """What torch.distributed says of a connection, without places in its source and advice."""
    words = " ".join(words.split())
    return re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", words).partition(". This is typically")[0]
