"""SIGTERM and SIGINT during training: noted, so that a checkpoint can be saved before the end."""

import atexit
import multiprocessing
import os
import signal
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """From its construction to `release`, notes the first SIGTERM or SIGINT; a second one ends the process.

    Attributes:
        received: whether there has been one.
    """

    def __init__(self) -> None:
        self.received = False
        self._earlier_handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = True

    def release(self) -> None:
        """Gives the signals back to who handled them before."""
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)


def leave_signals_to_the_main_process(worker_id: int) -> None:
    """The `worker_init_fn` of a data loader."""

    # A scheduler signals every process of a job; a worker that died of it would take the last checkpoint along. So the
    # first signal is ignored, and the second, from the main process at its own end, ends the worker.
    def ignore_once(number: int, frame: Any) -> None:
        signal.signal(number, lambda number, frame: os._exit(0))

    for number in _SIGNALS:
        signal.signal(number, ignore_once)


@atexit.register
def _send_the_first_signal() -> None:
    for worker in multiprocessing.active_children():
        worker.terminate()  # multiprocessing sends the second
