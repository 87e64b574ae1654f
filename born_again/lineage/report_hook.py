"""The report of a lineage, written between its generations by a function that the runner is handed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from born_again.lineage.folders import REPORT_NAME, REPORT_PICTURE_NAME

logger = logging.getLogger(__name__)


class ReportHook:
    """Writes the report on the first process; what goes wrong with it is logged, and ends no training.

    Args:
        write: from output_dir to the written report; None writes none.
        output_dir: of the lineage.

    Attributes:
        links: what the cards in the folders of a lineage are given of it, {} without a report.
        is_due: whether something has changed since it was written last.
    """

    def __init__(self, write: Callable[[Path], Any] | None, output_dir: Path) -> None:
        self.write = write
        self.output_dir = output_dir
        self.links = {} if write is None else {"report": f"../{REPORT_NAME}", "picture": f"../{REPORT_PICTURE_NAME}"}
        self.is_due = True

    def __call__(self) -> None:
        self.is_due = False
        if self.write is None or not PartialState().is_main_process:
            return
        try:
            self.write(self.output_dir)
        except Exception as error:
            logger.warning(
                "The report of %s is not written (%s: %s); the training goes on, and born-again report writes it.",
                self.output_dir,
                type(error).__name__,
                error,
                exc_info=True,
            )
