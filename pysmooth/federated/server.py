"""The server: asks clients, leaves out those that fail, and moves with what the others sent."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .clients import Client, Task
from .method import Method, Outcome, Upload
from .uploads import UploadError, Uploads


class NotEnoughClientsError(RuntimeError):
    """Too few clients answered as they should. The server's state is that before the round."""


class Server:
    """Runs a method, round by round, with clients that may fail.

    A client that raises, that does not answer within `timeout`, or that sends a NaN, an infinity, a
    wrong shape or dtype is left out of the round, with a warning, and counted in `excluded`. The
    round goes on with the others.

    Args:
        method: such as `CLERR(...)`.
        x: the parameters to begin with, a vector in float32 or float64.
        min_clients: answers without which there is no round.
        timeout: seconds for all clients of a round. Each then has a thread of its own; one that is
            late goes on, and its answer is dropped: until it is through with it, it is left out of
            further rounds without being asked. None: clients are asked one after another.
        folder: where to hold what clients sent, instead of in memory.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        method: Method,
        x: Tensor,
        *,
        min_clients: int = 1,
        timeout: float | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if x.dim() != 1:
            raise ValueError(f"x must be a vector; got the shape {tuple(x.shape)}")
        if min_clients < 1:
            raise ValueError(f"min_clients must be at least 1; got {min_clients}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be greater than 0; got {timeout}")
        self.method, self.state = method, method.start(x)
        self.min_clients, self.timeout, self.folder = min_clients, timeout, folder
        self.excluded: Counter[str] = Counter()
        self.taken: dict[int, int] = {}
        self._busy: set[int] = set()  # clients that have not yet answered, of any round
        self.uploads()  # refuses what it cannot hold

    @property
    def x(self) -> Tensor:
        """The parameters."""
        return self.state.x

    def uploads(self) -> Uploads:
        """An empty round."""
        x = self.state.x
        return Uploads(len(x), x.dtype, parts=self.method.parts, folder=self.folder)

    def round(self, clients: Mapping[int, Client]) -> Outcome:
        """One round with some of the clients, as the method draws them.

        Raises:
            NotEnoughClientsError: fewer than `min_clients` answers could be taken.
        """
        asked = self.method.participants(self.state, sorted(clients))
        uploads = self.uploads()
        received = self.method.sent(self.state)

        def ask(number: int) -> Upload:
            return self.method.reply(self.task(number), received, clients[number])

        ways = (
            _one_by_one(asked, ask)
            if self.timeout is None
            else _all_at_once(asked, ask, self.timeout, self._busy)
        )
        for number, answer in ways:
            self.take(uploads, number, answer, clients[number].samples)
        return self.finish(uploads, len(asked))

    def task(self, number: int) -> Task:
        """What a client is asked in this round."""
        return Task(number, self.state.rounds, self.taken.get(number, -1))

    def take(
        self, uploads: Uploads, number: int, answer: Upload | BaseException, samples: int = 1
    ) -> None:
        """Takes in one client's answer; or the reason why there is none."""
        try:
            if isinstance(answer, BaseException):
                raise UploadError(
                    "timeout" if isinstance(answer, TimeoutError) else "failure",
                    f"client {number} failed: {type(answer).__name__}: {answer}",
                )
            uploads.add(number, answer, samples)
        except UploadError as error:
            self.leave_out(error.reason, str(error))

    def leave_out(self, reason: str, why: str) -> None:
        """Counts a client that is left out of a round, and warns."""
        self.excluded[reason] += 1
        warnings.warn(f"{why}; it is left out of this round", RuntimeWarning, stacklevel=4)

    def finish(self, uploads: Uploads, asked: int) -> Outcome:
        """Moves with what was taken in."""
        if len(uploads) < self.min_clients:
            raise NotEnoughClientsError(
                f"round {self.state.rounds}: {len(uploads)} of {asked} clients answered as they "
                f"should, at least {self.min_clients} must (left out so far: "
                f"{dict(self.excluded)})"
            )
        taken = dict.fromkeys(uploads.clients, self.state.rounds)
        outcome = self.method.update(self.state, uploads)
        self.taken |= taken  # not if the update fails: its round has then not been
        return outcome

    def state_dict(self) -> dict[str, Any]:
        """Everything that a server must know to go on, to the bit."""
        return {
            "state": self.state.state_dict(),
            "excluded": dict(self.excluded),
            "taken": dict(self.taken),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes the values of `state_dict`.

        Raises:
            ValueError: it is that of another method, or of other sizes. Nothing has changed.
        """
        if missing := sorted({"state", "excluded", "taken"} ^ saved.keys()):
            raise ValueError(f"the saved state does not fit: {', '.join(missing)}")
        self.state.load_state_dict(saved["state"])
        self.excluded, self.taken = Counter(saved["excluded"]), dict(saved["taken"])


_Answers = Any  # an iterator of (number, answer)


def _one_by_one(asked: list[int], ask: Callable[[int], Upload]) -> _Answers:
    for number in asked:
        yield number, _attempt(ask, number)


def _all_at_once(
    asked: list[int], ask: Callable[[int], Upload], timeout: float, busy: set[int]
) -> _Answers:
    answers: queue.SimpleQueue[tuple[int, Upload | Exception]] = queue.SimpleQueue()
    deadline = time.monotonic() + timeout

    def run(number: int) -> None:
        try:
            answer = _attempt(ask, number)
        finally:
            busy.discard(number)
        answers.put((number, answer))

    # Two rounds at once would write over each other's parameters.
    late = [number for number in asked if number in busy]
    waiting = set(asked).difference(late)
    for number in sorted(waiting):
        busy.add(number)
        # A daemon: a client that never ends must not keep the process from ending.
        threading.Thread(target=run, args=(number,), daemon=True).start()
    for number in late:
        yield number, TimeoutError("it has not yet answered an earlier round")
    while waiting:
        try:
            number, answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        waiting.discard(number)
        yield number, answer
    for number in sorted(waiting):
        yield number, TimeoutError(f"no answer within {timeout} s")


def _attempt(ask: Callable[[int], Upload], number: int) -> Upload | Exception:
    try:
        return ask(number)
    except Exception as error:  # whatever it is, it is the client's
        return error
