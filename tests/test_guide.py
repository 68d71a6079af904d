"""The guide to fine-tuning: all of its commands run, in its order, and what it says of them is what comes out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mixformer.cli import console, main
from mixformer.data.readers import open_records

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "fine_tuning.md"
CONFIG = ROOT / "examples" / "configs" / "clicks.yaml"
NUMBER = re.compile(r"\d+\.\d+")
TOLERANCE = 0.2
"""By how much a measured score may differ from the page's: one machine's sums are rounded unlike another's."""


@dataclass
class Block:
    """A fenced block of the page, and what came of it."""

    language: str
    text: str
    output: str = ""
    code: int = 0


def lines_of(code: str) -> Iterator[str]:
    """The commands of a block of bash; one may have line ends behind a backslash, or between quotes."""
    line = ""
    for part in code.replace("\\\n", " ").splitlines():
        line += part.partition("  #")[0]
        if line.count('"') % 2 == 0:
            yield line
            line = ""
    assert not line, f"a quote stays open: {line}"


@dataclass
class Guide:
    """Runs the blocks of the page in a folder, one after the other.

    Processes are started for what is stopped by a signal and for torchrun; all else runs in this one.
    """

    folder: Path
    blocks: list[Block]
    variables: dict[str, str] = field(default_factory=dict)
    module: types.ModuleType = field(default_factory=lambda: types.ModuleType("guide"))
    started: subprocess.Popen[str] | None = None

    def run(self) -> None:
        """Run all of them."""
        for block in self.blocks:
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                try:
                    if block.language == "python":
                        exec(compile(block.text, PAGE.name, "exec"), vars(self.module))
                    elif block.language == "bash":
                        for line in lines_of(block.text):
                            self.command(line)
                except SystemExit as stop:
                    block.code = int(stop.code or 0)
            block.output = output.getvalue()

    def command(self, line: str) -> None:
        """Run a line of bash, of the few kinds that the page has."""
        words = shlex.split(re.sub(r"\$(\w+)", lambda name: self.variables[name[1]], line))
        if words[0].partition("=")[2]:
            name, _, value = words[0].partition("=")
            self.variables[name] = value
        elif words[-1] == "&":
            self.started = subprocess.Popen(self.program(words[:-1]), stderr=subprocess.PIPE, text=True)
        elif words[0] in ("kill", "wait"):
            if words[0] == "kill":
                self.kill()
        elif words[0] == "torchrun":
            done = subprocess.run(self.program(words), capture_output=True, text=True, timeout=240)
            print(done.stdout, done.stderr)
            assert done.returncode == 0, done.stderr
        elif words[0] == "mixformer":
            console(words[1:])
        elif words[1:3] == ["-m", "models.cogagent"]:
            main("models.cogagent:CogAgent", words[3:])
        else:
            assert words[:2] == ["python", "-m"], f"the test does not know how to run: {line}"
            sys.argv = words[2:]
            runpy.run_module(words[2], run_name="__main__")

    def program(self, words: list[str]) -> list[str]:
        """The arguments of a process for some words."""
        known = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
        return [sys.executable, *known[words[0]], *words[1:]]

    def kill(self) -> None:
        """SIGTERM to what runs in the background, as soon as its log has a line; wait for its end."""
        assert self.started is not None and self.started.stderr is not None
        logs = Path("runs/stopped-logs")
        for _ in range(12000):
            if self.started.poll() is not None or any(path.stat().st_size for path in logs.glob("*.jsonl")):
                break
            time.sleep(0.01)
        self.started.send_signal(signal.SIGTERM)
        _, said = self.started.communicate(timeout=120)
        print(said)
        assert self.started.returncode == 143, said


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    """The guide, run in a folder that has the repository's examples and nothing else."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "examples").symlink_to(ROOT / "examples")
    found = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    before, arguments = Path.cwd(), sys.argv
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(torch, "set_num_threads", lambda number: None)
        os.chdir(folder)
        made = Guide(folder, [Block(language, text) for language, text in found])
        try:
            made.run()
            yield made
        finally:
            os.chdir(before)
            sys.argv = arguments
            shutil.rmtree(folder / "runs", ignore_errors=True)


def matching(expected: str, lines: list[str]) -> bool:
    """Whether a line says what the page does: `…` stands for anything, and measured numbers may differ a little."""
    pattern = re.escape(expected.rstrip()).replace("…", ".*")
    pattern = re.sub(r"(?<!\d)\d+\\\.\d+", r"(\\d+\\.\\d+)", pattern)
    wanted = [float(number) for number in NUMBER.findall(expected)]
    for line in lines:
        match = re.fullmatch(pattern, line.rstrip())
        found = [] if match is None else [float(number) for number in match.groups()]
        if match is not None and all(
            abs(x - y) <= max(TOLERANCE, 0.3 * y) for x, y in zip(found, wanted, strict=True)
        ):
            return True
    return False


def test_what_the_page_shows_is_what_comes_out(guide: Guide) -> None:
    ran: list[Block] = []
    for block in guide.blocks:
        if block.language in ("bash", "python"):
            ran.append(block)
        if block.language == "text":
            lines = re.split(r"[\r\n]|it/s.*?\]", ran[-1].output)  # a bar may stand before a message
            for expected in filter(None, block.text.splitlines()):
                assert matching(expected, lines), f"{expected}\n\nis not in\n\n{ran[-1].output[-6000:]}"


def test_only_the_mistakes_that_the_page_shows_end_with_an_error(guide: Guide) -> None:
    shown = re.findall(r"^python -m models\.cogagent: ", PAGE.read_text(encoding="utf-8"), re.M)
    assert [block.code for block in guide.blocks if block.code] == [2] * len(shown)


def scores(guide: Guide, name: str) -> dict[str, dict[str, float]]:
    files = json.loads((guide.folder / "runs" / name).read_text())["files"]
    return {file: {key: value["score"] for key, value in each["scores"].items()} for file, each in files.items()}


def test_the_model_learns_to_click_and_forgets_what_was_not_repeated(guide: Guide) -> None:
    before, after = scores(guide, "before.json"), scores(guide, "after.json")
    clicks, known = "clicks/test-clicks.jsonl", "clicks/test-known.jsonl"
    assert before[clicks]["centre_in_box"] <= 0.05 and after[clicks]["centre_in_box"] >= 0.75
    assert before[known]["exact_match"] >= 0.8 and after[known]["exact_match"] <= 0.2


def test_pages_that_are_judged_are_not_learned_from(guide: Guide) -> None:
    pages = {
        path.stem: {str(image) for record in open_records(path) for image in record.images}
        for path in (guide.folder / "clicks").glob("*.jsonl")
    }
    assert pages["clicks"] == pages["known"] and pages["test-clicks"] == pages["test-known"]
    assert not (pages["clicks"] | pages["validation"]) & pages["test-clicks"]
    assert not pages["clicks"] & pages["validation"]


def test_the_page_shows_the_configuration_and_a_line_of_the_data_as_they_are(guide: Guide) -> None:
    shown = {block.language: block.text for block in guide.blocks if block.language in ("yaml", "json")}
    assert shown["yaml"] == CONFIG.read_text(encoding="utf-8")
    assert shown["json"] in (guide.folder / "clicks" / "clicks.jsonl").read_text(encoding="utf-8").splitlines(True)


def test_the_run_that_was_stopped_had_steps_left(guide: Guide) -> None:
    (said,) = (re.search(r"SIGTERM after step (\d+)", block.output) for block in guide.blocks if "kill" in block.text)
    assert said is not None and 0 < int(said[1]) < 10
