"""Processes for tests: forks of one that has imported torch and trained once, which takes seconds.

A group of several finds the environment that torchrun would give it. What the processes print goes to `out.{rank}`.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Group:
    """Processes that run."""

    def __init__(self, forks: Forks, pids: list[int], folder: Path) -> None:
        self.forks, self.pids, self.folder = forks, pids, folder

    def kill(self, number: int = signal.SIGKILL, ranks: list[int] | None = None) -> None:
        """Send a signal to all, or to some."""
        for pid in self.pids if ranks is None else [self.pids[rank] for rank in ranks]:
            os.kill(pid, number)

    def wait(self) -> list[int]:
        """Exit codes by rank, minus the signal where one ended the process."""
        codes: list[int] = self.forks.ask({"wait": self.pids})
        return codes

    def output(self, rank: int = 0) -> str:
        """What a process printed, errors included."""
        return (self.folder / f"out.{rank}").read_text(errors="replace")


class Forks:
    """Starts processes."""

    def __init__(self) -> None:
        paths = [str(ROOT), str(ROOT / "tests"), *(path for path in sys.path if path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        atexit.register(self.close)

    def start(self, call: str, folder: Path, *arguments: Any, world_size: int = 2) -> Group:
        """Start a group whose processes call `module.function(folder, *arguments)` and end as a script does."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        given = {"call": call, "folder": str(folder), "arguments": arguments, "world_size": world_size, "port": port}
        return Group(self, self.ask(given), folder)

    def run(self, call: str, folder: Path, *arguments: Any, world_size: int = 2) -> Group:
        """Start a group and wait for it to end well."""
        group = self.start(call, folder, *arguments, world_size=world_size)
        codes = group.wait()
        assert codes == [0] * world_size, "\n".join(group.output(rank)[-2000:] for rank in range(world_size))
        return group

    def ask(self, given: dict[str, Any]) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(given) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        atexit.unregister(self.close)
        self.server.communicate(timeout=30)


@functools.cache
def shared() -> Forks:
    """One for all tests of a session."""
    return Forks()


def serve() -> None:
    """What the process behind `Forks` does; in a fork it returns when the call has."""
    import torch

    torch.set_num_threads(1)
    warm_up()
    gc.collect()
    gc.freeze()  # collections in the forks need not look at all that was imported
    out = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        given = json.loads(line)
        if "wait" in given:
            found = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in given["wait"]]
        else:
            found = []
            for rank in range(given["world_size"]):
                found.append(os.fork())
                if found[-1] == 0:
                    run_call(rank, given)
                    return
        print(json.dumps(found), file=out, flush=True)


def warm_up() -> None:
    """Import what tests, training and configurations import when they first run."""
    for name in ("jsonargparse", "pytest"):
        importlib.import_module(name)
    for name in ("checkpoint", "device_mesh", "fsdp", "tensor", "checkpoint.state_dict"):
        importlib.import_module(f"torch.distributed.{name}")
    for name in ("cli", "evaluation", "testing", "train.parallel", "train.tasks"):
        importlib.import_module(f"mixformer.{name}")
    from mixformer.testing import sample_row, tiny_model
    from mixformer.train import TrainConfig, train

    model = tiny_model("cogagent")
    batch = sample_row(model, 1)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(steps=1, progress=False, state_path=f"{folder}/state.pt")
        train(model, [{**batch, "labels": batch["input_ids"]}], config)


def run_call(rank: int, given: dict[str, Any]) -> None:
    folder = Path(given["folder"])
    for descriptor, path, flags in ((0, Path(os.devnull), os.O_RDONLY), (1, folder / f"out.{rank}", os.O_WRONLY)):
        os.dup2(os.open(path, flags | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.dup2(1, 2)
    if given["world_size"] > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(given["world_size"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(given["port"]),
        )  # fmt: skip
    module, _, name = given["call"].rpartition(".")
    getattr(importlib.import_module(module), name)(folder, *given["arguments"])


if __name__ == "__main__":
    serve()
