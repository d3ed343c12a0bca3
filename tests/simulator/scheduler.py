"""What happens next: lanes of work, simulated processes, and the choice between them."""

from __future__ import annotations

import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

Work = Callable[[], object]


class Violation(AssertionError):
    """A promise was broken."""


class Process:
    """A simulated operating-system process: runs, is frozen, or is gone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.dead = False

    @property
    def runs(self) -> bool:
        return not self.frozen and not self.dead

    def tick(self) -> None:
        """Time has passed."""


class Lane:
    """Work that is done in order; with ``width`` > 1 any of the first ``width`` pieces comes next (a pool of threads).

    Nothing in it happens while its process does not run, or while ``blocked``.
    """

    def __init__(self, process: Process, width: int = 1) -> None:
        self.process = process
        self.width = width
        self.blocked = False
        self.items: deque[tuple[float, Work]] = deque()

    @property
    def ready(self) -> bool:
        return bool(self.items) and not self.blocked and not self.process.frozen and not self.process.dead


class Kernel:
    """Time, chance, and all lanes. One step does one piece of work of one lane."""

    def __init__(self, seed: str) -> None:
        self.chance = random.Random(seed)
        self.now = 1000.0
        self.lanes: list[Lane] = []
        self.trace: Callable[[str], None] | None = None

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.now:8.1f}  {text}")

    def lane(self, process: Process, width: int = 1) -> Lane:
        lane = Lane(process, width)
        self.lanes.append(lane)
        return lane

    def put(self, lane: Lane, work: Work) -> None:
        lane.items.append((self.now, work))

    def step(self) -> bool:
        """Do one piece of work, chosen by chance. Returns False where there is none."""
        ready = [lane for lane in self.lanes if lane.ready]
        if not ready:
            return False
        self._do(self.chance.choice(ready))
        return True

    def _do(self, lane: Lane) -> None:
        at = 0 if lane.width == 1 else self.chance.randrange(min(lane.width, len(lane.items)))
        _, work = lane.items[at]
        del lane.items[at]
        work()

    def step_overdue(self, before: float) -> bool:
        """Do one piece of work that has waited since ``before`` or longer. Returns False where there is none."""
        late = [lane for lane in self.lanes if lane.ready and lane.items[0][0] <= before]
        if not late:
            return False
        self._do(self.chance.choice(late))
        return True

    def bury(self) -> None:
        """Forget the lanes of processes that are gone."""
        self.lanes = [lane for lane in self.lanes if not lane.process.dead]


class SimulatedExecutor(Executor):
    """A pool of threads whose work is done when the kernel says so."""

    def __init__(self, kernel: Kernel, process: Process, threads: int) -> None:
        self._kernel = kernel
        self._lane = kernel.lane(process, threads)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)
                if not isinstance(error, ExpectedError):
                    raise

        self._kernel.put(self._lane, work)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing to stop."""


class ExpectedError(Exception):
    """An error that a simulated surrounding raises on purpose."""


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` for a while."""
    before = inspect.getattr_static(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
