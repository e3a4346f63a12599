"""``metrics.csv``, whole at any moment."""

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from tercet.notice import say_once


class Curves(CSVLogger):
    """Lightning's, but written beside and renamed. ``keep``: a run that goes on keeps the rows up to where it begins.

    Where the disk is full that is said, training goes on, and the rows are written once there is room.
    """

    def __init__(
        self, save_dir: str, name: str, version: str, prefix: str, flush_logs_every_n_steps: int, keep: bool
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)
        self.earlier: list[dict[str, str]] = []
        file, self.aside = Path(self.log_dir, "metrics.csv"), Path(self.log_dir, ".metrics-before.csv")
        if keep and file.is_file():  # Lightning's writer begins with removing it
            self.aside.write_bytes(file.read_bytes())
        if keep and self.aside.is_file():
            with self.aside.open(newline="", encoding="utf-8") as there:
                self.earlier = list(csv.DictReader(there))

    @rank_zero_only
    def save(self) -> None:
        """The file is there whole, or as it was."""
        writer = self.experiment
        file, keys = Path(writer.metrics_file_path), list(writer.metrics_keys)
        partial = file.with_name(f".{file.name}")
        rows: list[dict[str, Any]] = list(writer.metrics)
        try:
            if self.earlier and rows:
                begin = min(int(row["step"]) for row in rows)
                kept = [row for row in self.earlier if int(row["step"]) < begin]
                writer.metrics = [*({k: v for k, v in row.items() if v} for row in kept), *rows]
            if file.is_file():
                partial.write_bytes(file.read_bytes())
            writer.metrics_file_path = str(partial)
            super().save()
            if partial.is_file():
                partial.replace(file)
            if rows:
                self.earlier = []
                self.aside.unlink(missing_ok=True)
        except OSError as error:
            writer.metrics, writer.metrics_keys = rows, keys
            partial.unlink(missing_ok=True)
            say_once(f"{file} could not be written ({error}); training goes on, and it is tried again.")
        finally:
            writer.metrics_file_path = str(file)
