"""A task for runs that are to be stopped at a known place."""

import os
import signal
import time
from pathlib import Path

from mixformer.data.records import Record
from mixformer.train import TextTask


class HeldTextTask(TextTask):
    """Learns texts, and waits when it has made as many batches as the file `hold` says, until that file is gone.

    While the process of a rank waits, there is a file `hold.{rank}`. SIGTERM, once the loop has noted it, lets it go on
    as well.

    Raises:
        TimeoutError: nobody let it go on.
    """

    def __init__(self, file: str, hold: str, batch_size: int = 4) -> None:
        super().__init__(file, batch_size)
        self.hold, self.made = Path(hold), 0

    def batch(self, samples: list[Record], draws: list) -> dict:
        self.made += 1
        mark = self.hold.with_name(f"{self.hold.name}.{os.environ.get('RANK', 0)}")
        start = time.monotonic()
        while self.made > self._allowed() and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            mark.touch()
            time.sleep(0.005)
            if time.monotonic() - start > 90:
                raise TimeoutError(f"{self.hold} is still there.")
        mark.unlink(missing_ok=True)
        return super().batch(samples, draws)

    def _allowed(self) -> float:
        try:
            return int(self.hold.read_text())
        except FileNotFoundError:
            return float("inf")
