"""Shards -> batches: the samples of an `EpochPlan`, read by processes that are started once and stay for the whole run.

Legend: W processes that train, B images a process and batch; positions are those of a `Split`.
"""

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from shards.batch import Batch, Reader, decoded
from shards.dataset import Split
from shards.errors import WORKER_LOST, InputError
from shards.joined import Samples
from shards.plan import EpochPlan, Share, Shares
from shards.store import Remote

FETCHERS = 4  # shards of a URL that are fetched ahead at a time
# Batches ahead of each loader process: more would not fit into the 64 MB of shared memory that a container has
PREFETCH = 2
GRACE = 5  # seconds that a loader process lives on after a SIGTERM
STALLED = 600.0  # seconds without a batch after which the loader's processes count as stuck, if nothing else is said


class Loader:
    """The batches of one rank, epoch after epoch.

    Args:
        samples: a split.
        plan: of its epochs.
        batch: images of a rank and batch at most.
        rank, world: this process and how many there are; every rank gets equally many batches.
        workers: processes that read. They start at the first batch and stay: a later fork would copy a process with the
            threads of CUDA, NCCL and
            a tracker. 0: this process reads.
        pinned: batches in page-locked memory, for a GPU.
        timeout: seconds without a batch after which the loader's processes count as stuck; None: `STALLED`.
        decoder: the device that decodes gray JPEGs, whose batches then lie on it; None: whoever reads decodes.
    """

    def __init__(
        self,
        samples: Samples,
        plan: EpochPlan,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pinned: bool = False,
        timeout: float | None = None,
        decoder: torch.device | None = None,
    ) -> None:
        self.timeout = STALLED if timeout is None else timeout
        self.samples, self.plan, self.decoder = samples, plan, decoder
        # By its number: what the current one is, is a thread's own affair
        if decoder is not None and decoder.type == "cuda" and decoder.index is None:
            self.decoder = torch.device("cuda", torch.cuda.current_device())
        self.batch, self.rank, self.world, self.workers = batch, rank, world, workers
        self.sampler = _Armed()
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": pinned, "worker_init_fn": _leave_interrupts}
        if workers:
            options |= {"persistent_workers": True, "prefetch_factor": PREFETCH}
        self.loader: Any = DataLoader(
            Reader(samples, encoded=decoder is not None),
            batch_size=None,
            sampler=self.sampler,
            collate_fn=None,
            **options,
        )
        self.processes: list[Any] = []

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from its sample ``start`` on.

        Shards of a URL are fetched ahead, one window of the plan before they are needed. InputError: a sample that
        cannot be read, processes of the loader that are killed, have no shared memory left, or deliver nothing for
        ``timeout`` seconds.
        """
        shares = Shares(self.plan, epoch, start, batch=self.batch, rank=self.rank, world=self.world)
        # Sets of lung masks, which are joined, are small: a shard of theirs is fetched when it is needed.
        ahead = (
            _Ahead(self.samples, self.plan, shares)
            if isinstance(self.samples, Split) and self.samples.store.remote
            else None
        )
        self.sampler.shares = ahead or shares
        watch = _Watch(self.timeout)
        try:
            yield from self._watched(watch) if self.decoder is None else self._decoded(watch, self.decoder)
        except (RuntimeError, OSError, EOFError) as error:
            if watch.stalled:
                what = (
                    f"have delivered nothing for {self.timeout:g} s: is the disk or network of {self.samples.where} "
                    "stuck, or a process stopped?"
                )
                raise InputError(f"the loader's processes {what}") from error
            if "DataLoader worker" not in str(error) and not (
                self.workers and isinstance(error, ConnectionError | EOFError)
            ):
                raise
            raise InputError(WORKER_LOST) from error
        finally:
            if ahead is not None:
                ahead.close(wait=not watch.stalled)  # what is stuck is not waited for

    def _watched(self, watch: "_Watch") -> Iterator[Batch]:
        """What the loader's processes deliver; the first InputError of theirs is raised here."""
        # Those of an earlier epoch: one that stopped since then does not answer when it is asked to begin anew
        watch.start(self.processes)
        try:
            others = set(multiprocessing.active_children())
            with watch.waiting():
                loader = iter(self.loader)
            self.processes = self.processes or [
                child for child in multiprocessing.active_children() if child not in others
            ]
            watch.start(self.processes)
            while True:
                with watch.waiting():
                    got = next(loader, None)
                if got is None:
                    return
                if isinstance(got, InputError):
                    raise got
                yield got
        finally:
            watch.end()  # before the error is told: what torch's signal handler still raises would take its place

    def _decoded(self, watch: "_Watch", device: torch.device) -> Iterator[Batch]:
        """Those, decoded by the device: one ahead, in a thread, which waits for it while this one trains."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Batch] | None = None
            for batch in self._watched(watch):
                ready, ahead = ahead, pool.submit(decoded, batch, self.samples, device)
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()

    def close(self) -> None:
        """End the loader's processes at once. Otherwise this one waits some seconds for each at its end, and for one
        that is stuck without end.
        """
        self.sampler.shares = ()
        iterator = self.loader._iterator
        # Torch's own: it tells of killed ones otherwise, wherever this process is, and waits for its thread
        with suppress(AttributeError, ValueError):
            torch._C._remove_worker_pids(id(iterator))
            iterator._worker_pids_set, iterator._shutdown = False, True
            iterator._pin_memory_thread_done_event.set()
        for process in self.processes:
            with suppress(RuntimeError):
                process.kill()
        for process in self.processes:
            with suppress(RuntimeError):
                process.join(1)
                if process.is_alive():  # in the system's hands: nobody waits for it
                    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
        self.processes, self.loader._iterator = [], None


class _Armed(Sampler[Share]):
    """Hands out the shares that it is armed with: the loader of the whole run has one sampler."""

    def __init__(self) -> None:
        self.shares: Iterable[Share] = ()

    def __iter__(self) -> Iterator[Share]:
        return iter(self.shares)


class _Watch:
    """Ends loader processes for which the main one has waited longer than ``timeout`` seconds.

    The loader's own timeout does not see a process that is frozen while it hands a batch over; a killed one ends every
    kind of waiting.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.processes: list[Any] = []
        self.stalled = False
        self.since: float | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def start(self, processes: list[Any]) -> None:
        """Watch them; none, before the loader has any, are not watched (a thread would be copied by the fork)."""
        self.processes = processes
        if processes and not self.thread.is_alive():
            self.thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def _watch(self) -> None:
        pause, last = min(1.0, self.timeout / 4), time.monotonic()
        while not self.over.wait(pause):
            since, before, last = self.since, last, time.monotonic()
            if since is not None and last - before > 10 * pause:  # this process was paused, and those with it
                self.since = last
                continue
            if since is not None and time.monotonic() - since > self.timeout:
                self.stalled = True
                for process in self.processes:
                    process.kill()
                return

    def end(self) -> None:
        """Stop watching. Of processes that were killed torch's signal handler raises once more, wherever this one is:
        it does so here, unheard.
        """
        self.over.set()
        if self.processes:
            self.thread.join()
        if self.stalled:
            for process in self.processes:
                with suppress(RuntimeError):
                    process.join(5)


def _leave_interrupts(_: int) -> None:
    """In a loader process: signals that go to all processes of a job are the parent's, which ends this one."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A SIGTERM to all is followed by the parent's last checkpoint; one by the parent means this process, whose end it
    # waits for. Which it is cannot be told, so that after the first one there is a little time.
    signal.signal(signal.SIGTERM, lambda *_: (signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.alarm(GRACE)))


class _Ahead(Sampler[Share]):
    """Hands out shares and has the shards of this window of the plan and of the next one fetched meanwhile."""

    def __init__(self, split: Split, plan: EpochPlan, shares: Shares) -> None:
        self.split, self.plan, self.shares = split, plan, shares
        self.threads: list[threading.Thread] = []
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self.asked: set[int] = set()
        self.room = split.store.room_ahead() if isinstance(split.store, Remote) else 0

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[Share]:
        # Threads start here, after the loader has forked its workers.
        self.asked = set()
        self.threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(FETCHERS)]
        for thread in self.threads:
            thread.start()
        for start in self.shares.starts():
            room = self.room
            for shard in self.plan.shards_ahead(self.shares.epoch, start):
                room -= self.split.shards[shard]["bytes"]
                if shard not in self.asked and room >= 0:
                    self.asked.add(shard)
                    self.queue.put(shard)
            yield self.shares.share(start)

    def _serve(self) -> None:
        """In a thread, which the end of the process does not wait for:
        fetch what is asked for until nothing more is.
        """
        while (shard := self.queue.get()) is not None:
            with suppress(InputError):  # whoever needs the shard tries again and says so
                self.split.store.shard(self.split.shards[shard])

    def close(self, *, wait: bool = True) -> None:
        """Drop what was not begun; with ``wait`` for the fetches under way: nothing of them is left when the next
        loader forks.
        """
        with suppress(Empty):
            while True:
                self.queue.get_nowait()
        for _ in self.threads:
            self.queue.put(None)
        if wait:
            for thread in self.threads:
                thread.join()
        self.threads = []
