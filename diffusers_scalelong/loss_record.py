"""The record of a training run's loss."""

import csv
import os
from pathlib import Path


class LossRecord:
    """The loss of every optimiser step, in a CSV file that survives interruptions.

    Args:
        path: of the file; rows are appended to it.
        last_step: drop the rows after this step: a resumed run computes them again.
    """

    def __init__(self, path: str | Path, last_step: int = 0) -> None:
        self.path = Path(path)
        self.steps: list[int] = []
        self.losses: list[float] = []
        rows = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= last_step]
        # Replaced in one step, lest a kill at this moment take the earlier rows along.
        aside = self.path.with_name(f".{self.path.name}.partial")
        self._file = aside.open("w", newline="", buffering=1)
        self._writer = csv.writer(self._file)
        self._writer.writerow(["step", "loss", "learning_rate"])
        for step, loss, learning_rate in rows:
            self.append(int(step), float(loss), float(learning_rate))
        self.flush()
        os.replace(aside, self.path)

    def append(self, step: int, loss: float, learning_rate: float) -> None:
        """Adds a row: optimiser step, mean loss of its batch, learning rate that it used."""
        self.steps.append(step)
        self.losses.append(loss)
        self._writer.writerow([step, repr(loss), repr(learning_rate)])

    def flush(self) -> None:
        """Writes the rows to the disk, through the system's buffers."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
