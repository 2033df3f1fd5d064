"""Whether the others are there: whom a process waits for at the start, its launcher, and the process next in the ring.

A thread beside training. It needs no collective, so that it also sees a process that is frozen or gone while this one
waits for it; it speaks through the store at which the processes meet (`torch.distributed.TCPStore`).
"""

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from shards.errors import InputError, first_line
from trainer import stopping

EVERY = 1.0  # seconds between two looks
LATE = 20.0  # seconds after which a process says for whom it waits
LAST = 10.0  # seconds that a process whose launcher is gone has for its checkpoint
START, SAVING, LONGEST = "the start", "a checkpoint", 120.0  # and so many more while it writes it
LOST = 10.0  # seconds without the store after which its process counts as gone


def launched() -> bool:
    """Whether a launcher started this process, which then ends with it: torchrun, accelerate's for one process (whose
    two marks nobody else sets together), a sweep.
    """
    marks = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"}
    return bool({"TORCHELASTIC_RUN_ID", "CXR_FOCUS_SWEEP"} & os.environ.keys()) or marks <= os.environ.keys()


class Presence(threading.Thread):
    """Watches until `end`; leaves the process in one line where it waits in vain.

    Args:
        timeout: seconds without a sign of the next process after which it counts as gone.

    Attributes:
        place: what this process is at, such as ``step 120``: others name it when this one is late.
    """

    def __init__(self, timeout: float) -> None:
        super().__init__(daemon=True)
        self.timeout, self.place = timeout, START
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.parent = os.getppid() if launched() else 0
        self.at = (os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT") or 0))
        # After a restart by torchrun the store is the same one
        self.prefix = f"cxr-focus/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.over = threading.Event()
        self.meets: threading.Thread | None = None
        self.store: Any = None
        self.all_here = self.world == 1
        self.agreed = threading.Event()  # whether all of them have the store was asked
        self.used = False  # and they have
        self.turns = 0  # meetings so far
        self.beats, self.last = 0, time.monotonic()  # signs that this process gave, and when it gave the last one
        self.seen = ("", time.monotonic())  # the last sign of the next process, and when it was new

    @property
    def needed(self) -> bool:
        """Whether there is anybody to watch."""
        return bool(self.parent) or (self.world > 1 and all(self.at))

    def run(self) -> None:
        """See the class."""
        if self.world > 1 and all(self.at):
            self.meets = threading.Thread(target=self._meet, daemon=True)
            self.meets.start()
        now = time.monotonic()
        while not self.over.wait(EVERY):
            before, now = now, time.monotonic()
            if now - before > 10 * EVERY:  # this process was paused
                self.last = now
            if self.parent and os.getppid() != self.parent:
                self._orphaned()
            if self.all_here and self.world > 1 and not self.agreed.is_set() and now - self.last > self.timeout + 30:
                self._leave(f"all {self.world} processes are there, at {self.where}, and do not come together")
            # The store of a machine that is gone does not answer, nor does it fail
            if self.used and (silent := time.monotonic() - self.last) > self.timeout + 5 * EVERY:
                self._leave(
                    f"the process that holds the run together, at {self.where}, has not answered for {silent:.0f} s"
                )

    def done(self) -> None:
        """What this process shares with the others is done: its silence means nothing from now on."""
        if self.used:
            with suppress(Exception):
                self.store.set(self._key(f"done/{self.rank}"), "")

    def tell(self, error: Exception) -> None:
        """Tell the others that this process fails, and by what: they would wait for it."""
        why = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
        with suppress(Exception):
            self.store.set(self._key("failed"), f"process {self.rank} on {socket.gethostname()}: {why}")

    def end(self, patience: float | None = None) -> None:
        """All is done: nobody is watched any more. The first process, which may hold the store, goes last, or after so
        many seconds.
        """
        self.done()
        self.rest()
        if self.rank or not self.used:
            return
        with suppress(Exception):
            until = time.monotonic() + (LOST if patience is None else patience)
            names = [self._key(f"done/{rank}") for rank in range(self.world)]
            while not self.store.check(names) and time.monotonic() < until:
                time.sleep(0.02)

    def rest(self) -> None:
        """Let both threads come to their end: one that is inside the store when Python ends aborts the process, as it
        comes back from C++ to an interpreter that is gone.
        """
        self.over.set()
        self.agreed.set()
        for thread in (self, self.meets):
            if thread is not None and thread.is_alive() and thread is not threading.current_thread():
                thread.join(LOST)

    @property
    def where(self) -> str:
        """Address and port of the store."""
        return f"{self.at[0]}:{self.at[1]}"

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def _orphaned(self) -> None:
        """The launcher is gone: a checkpoint, if there is time, and out."""
        saves = "saves where it stands and " if stopping.listens() else ""
        self._say(f"the launcher is gone; this process {saves}ends")
        stopping.request(signal.SIGTERM)
        until = time.monotonic() + LAST
        while not self.over.wait(EVERY):
            if time.monotonic() > until + (LONGEST if self.place == SAVING else 0.0):
                os._exit(1)

    def _meet(self) -> None:
        """Wait until all processes are there, then beat and look after the next one."""
        late = threading.Timer(LATE, self._late)
        late.daemon = True
        late.start()
        try:
            self.store = self._connected()
            self.store.set(self._key(f"here/{self.rank}"), socket.gethostname())
            while not self.over.is_set() and self._missing():
                time.sleep(EVERY / 4)
            self.last, self.all_here = time.monotonic(), True
        except Exception:  # of the store: who makes the process group says it better
            return
        finally:
            late.cancel()
            late.join(LOST)
        self.agreed.wait()
        if not self.used or self.over.is_set():
            return
        lost, self.last = 0.0, time.monotonic()
        self.seen = ("", self.last)
        while not self.over.wait(EVERY):
            try:
                self._beat()
                lost = 0.0
            except Exception:  # torch raises several kinds
                lost = lost or time.monotonic()
                if time.monotonic() - lost > LOST and not self.over.is_set():
                    self._leave(f"the process that holds the run together, at {self.where}, is gone")

    def _connected(self) -> Any:
        """A connection to the store, as soon as the process that holds it has begun."""
        while True:
            try:
                with socket.create_connection(self.at, 10):  # torch's own client complains aloud while there is none
                    pass
                break
            except OSError:
                if self.over.wait(EVERY / 2):
                    raise
        distributed: Any = torch.distributed
        return distributed.TCPStore(*self.at, None, False, timeout=timedelta(seconds=30), wait_for_workers=False)

    def _missing(self) -> list[int]:
        """Ranks that are not there yet."""
        return [rank for rank in range(self.world) if not self.store.check([self._key(f"here/{rank}")])]

    def _late(self) -> None:
        """Say whom this process waits for."""
        who = "process 0" if self.store is None else "others"
        if self.store is not None:
            with suppress(Exception):
                missing = self._missing()
                if not missing:
                    return
                shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                who = f"process{'es' if len(missing) > 1 else ''} {shown}"
        self._say(
            f"this is process {self.rank} of {self.world} and waits for {who} at {self.where}: start the others, or "
            "start this one by `accelerate launch`; are all addresses and ports right?"
        )

    def _beat(self) -> None:
        """A sign of this process, and a look at the next one's."""
        self.beats += 1
        self.store.set(self._key(f"beat/{self.rank}"), f"{self.beats} {self.place}")
        if (failed := self._failed()) and not self.over.wait(3 * EVERY):  # nor does this one fail by the same
            self._leave(failed)
        other = (self.rank + 1) % self.world
        sign = self._sign(other)
        gone = self.store.check([self._key(f"done/{other}")])
        before, now = self.last, time.monotonic()
        self.last = now
        # After a pause of this very process, such as a job's that was suspended, the other one was paused, too
        if gone or sign != self.seen[0] or now - before > 10 * EVERY:
            self.seen = (sign, now)
        elif now - self.seen[1] > self.timeout and not self.over.is_set():
            host = self.store.get(self._key(f"here/{other}")).decode()
            self._leave(
                f"process {other} on {host} has not been heard of for {now - self.seen[1]:.0f} s, since "
                f"{sign.partition(' ')[2] or 'the start'}: it was stopped, or its machine is gone"
            )

    def _sign(self, rank: int) -> str:
        """The last one of a process, empty before its first."""
        name = self._key(f"beat/{rank}")
        return self.store.get(name).decode() if self.store.check([name]) else ""

    def _failed(self) -> str:
        """Which process has said that it ends, and why; empty if none has."""
        name = self._key("failed")
        return self.store.get(name).decode() if self.store.check([name]) else ""

    def signs(self) -> list[tuple[int, str]]:
        """Of each process its last sign: how many there were, and what it was at."""
        found = []
        for rank in range(self.world):
            sign = ""
            with suppress(Exception):
                sign = self._sign(rank)
            beats, _, place = sign.partition(" ")
            found.append((int(beats or 0), place or START))
        return found

    def whose_fault(self) -> str:
        """Why a collective failed, as far as the processes' signs tell: takes some seconds."""
        before = self.signs()
        time.sleep(2.5 * EVERY)
        with suppress(Exception):
            if failed := self._failed():
                return failed
        after = self.signs()
        silent = [rank for rank in range(self.world) if before[rank][0] == after[rank][0] and rank != self.rank]
        if silent:
            hosts = []
            for rank in silent[:8]:
                host = "?"
                with suppress(Exception):
                    host = self.store.get(self._key(f"here/{rank}")).decode()
                hosts.append(f"process {rank} on {host} at {after[rank][1]}")
            return f"{', '.join(hosts)}: fallen silent; it was killed or stopped, or its machine is gone"
        places = ", ".join(f"process {rank} is at {place}" for rank, (_, place) in list(enumerate(after))[:16])
        return f"another process gave no answer, though all are alive: {places}"

    def explanation(self) -> str:
        """`whose_fault`, or that it cannot be told: the store may be what is gone."""
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self.whose_fault()), daemon=True)
        asking.start()
        asking.join(10 * EVERY)
        return found[0] if found else f"the process that holds the run together, at {self.where}, does not answer"

    def meet(self, first: bool) -> None:
        """Wait here for the first process, which comes when it is done with something: no collective waits for it
        meanwhile, whose time would run out.
        """
        self.turns += 1
        if not self.used:
            return
        name = self._key(f"turn/{self.turns}")
        if first:
            self.store.set(name, "")
            return
        while not self.store.check([name]):
            time.sleep(0.02)

    def _say(self, message: str) -> None:
        print(f"[process {self.rank}] {message}", file=sys.stderr, flush=True)

    def _leave(self, why: str) -> None:
        trained = self.place != START  # before the first step, and where nothing is trained, nothing is gone on with
        self._say(f"error: {why}{'; --resume goes on from the last checkpoint' if trained else ''}")
        os._exit(1)


here: Presence | None = None


def begin(timeout: float) -> None:
    """Watch from now on, once a process."""
    global here
    if here is None and (watch := Presence(timeout)).needed:
        here = watch
        here.start()
        atexit.register(watch.rest)  # whatever way Python ends


def agree(together: Callable[[list[bool]], list[bool]]) -> None:
    """Once the processes have met: use the store if all of them have it, else none does.

    Args:
        together: gathers what each process says.
    """
    if here is None or here.world == 1:
        return
    until = time.monotonic() + LOST
    while not here.all_here and all(here.at) and time.monotonic() < until:
        time.sleep(0.02)
    here.used = all(together([here.all_here]))
    here.agreed.set()


def done() -> None:
    """See `Presence.done`."""
    if here is not None:
        here.done()


def end() -> None:
    """Stop watching."""
    global here
    if here is not None:
        here.end()
        here = None


def at(place: str) -> None:
    """Say what this process is at."""
    if here is not None:
        here.place = place


def meeting(first: bool) -> None:
    """See `Presence.meet`."""
    if here is not None:
        here.meet(first)


def explained(action: Callable[[], None]) -> None:
    """Run something. Where it fails because of the others, leave in one line that says where they stand; where by
    itself, tell them.
    """
    try:
        action()
    except Exception as error:
        if here is None or not here.used:
            raise
        if _of_connection(error):
            here._leave(f"{here.explanation()} ({first_line(error)})")
        here.tell(error)
        here.end(2.5 * EVERY)
        raise


def tell(error: Exception) -> None:
    """Tell the others at once what this process fails by, before it tidies up."""
    if here is not None and here.used and not _of_connection(error):
        here.tell(error)


def _of_connection(error: Exception) -> bool:
    """Whether it is torch's word for a process that does not answer."""
    if not isinstance(error, RuntimeError):
        return False
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Timed out waiting", "Socket", "recv")
    return any(word in str(error) for word in words)
