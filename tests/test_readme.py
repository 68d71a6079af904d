"""The README: its code runs, its hook table is what the code prints, its commands and links lead somewhere."""

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mixformer.cli import JOBS, main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
GOLDEN = ROOT / "tests" / "golden"


def blocks(text: str) -> list[tuple[str, str]]:
    """[(language, code)] of the fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(code: str, names: dict[str, Any], where: str) -> str:
    """Execute a block; what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, where, "exec"), names)
    return printed.getvalue()


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with small stand-ins for the files that the README loads."""
    shutil.copytree(GOLDEN / "cogvlm-hf", tmp_path / "cogvlm-chat-hf")
    (tmp_path / "vicuna-7b-v1.5").mkdir()
    shutil.copy(GOLDEN / "prompts" / "tokenizer.model", tmp_path / "vicuna-7b-v1.5")
    shutil.copy(GOLDEN / "cogvlm-hf" / "image.png", tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_code_block_runs_and_prints_the_table_that_follows_it(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    names = vars(module)
    printed, compared = "", 0
    for number, (language, code) in enumerate(blocks(TEXT)):
        if language == "python":
            printed = run(code, names, f"README block {number}")
        elif language == "text":
            assert printed == code
            compared += 1
    assert compared == 1


def test_the_variant_takes_twelve_lines_and_its_mixin_five() -> None:
    code = next(code for language, code in blocks(TEXT) if language == "python")
    assert sum(bool(line.strip()) for line in code.splitlines()) == 12
    (mixin,) = (node for node in ast.parse(code).body if isinstance(node, ast.ClassDef))
    assert mixin.end_lineno is not None and mixin.end_lineno - mixin.lineno + 1 == 5


def test_the_two_commands_are_one_line_each_and_name_files_that_exist() -> None:
    commands = [line for line in blocks(TEXT)[0][1].splitlines() if not line.startswith("#")]
    assert commands == [
        "pip install -e . && python -m models.cogagent --config examples/configs/cogagent-mini.yaml",
        'pip install -e ".[test]" && python -m pytest -n 2',
    ]
    configs = set(re.findall(r"examples/configs/[\w.-]+", TEXT))
    assert configs and all((ROOT / path).is_file() for path in configs)


def test_the_other_commands_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    classes = {"models.cogagent": "CogAgent", "models.llava": "LLaVA"}
    shells = [code for language, code in blocks(TEXT)[1:] if language == "bash"]
    commands = [shlex.split(line) for code in shells for line in code.splitlines()]
    assert commands
    for python, flag, module, *arguments in commands:
        assert (python, flag) == ("python", "-m")
        if "train" in arguments:
            main(f"{module}:{classes[module]}", [*arguments, "--train.output", str(tmp_path / module)])
            assert (tmp_path / module / "model.safetensors").is_file()
            capsys.readouterr()
        else:
            main(f"{module}:{classes[module]}", arguments)
            assert capsys.readouterr().out.startswith(f"{classes[module]}: ")


def test_the_jobs_named_are_the_jobs_there_are() -> None:
    sentence = next(line for line in TEXT.splitlines() if line.startswith("The jobs are"))
    assert re.findall(r"`(\w+)`", sentence) == list(JOBS)


def test_the_commands_of_the_continuous_check_are_those_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ('pip install -e ".[test]"', "python -m pytest -n 2"):
        assert command in script.splitlines()


def test_links_and_pictures_lead_to_files_and_headings() -> None:
    for target in re.findall(r"\]\(([^)#]*)(?:#[\w-]+)?\)", TEXT):
        assert (ROOT / target).exists(), target
    for target, heading in re.findall(r"\]\(([^)#]+)#([\w-]+)\)", TEXT):
        titles = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


def test_the_scores_in_the_readme_are_the_recorded_ones() -> None:
    recorded = json.loads((ROOT / "examples/cogagent-mini/evaluation.json").read_text())["page"]
    found = re.search(r"On (\d+) held-out pages it finds\n([\d.]+)% .*reads ([\d.]+)% of the words", TEXT)
    assert found is not None
    said = [float(number) for number in found.groups()]
    assert said == [recorded["pages"], recorded["grounding"], recorded["reading"]]


def test_what_is_said_about_the_zoo_is_so() -> None:
    from models.weights import HF_FORMATS

    assert len(HF_FORMATS) == 20 and "twenty types" in TEXT
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    listed = TEXT[TEXT.index("## The zoo") : TEXT.index(" and more are files")].split("\n", 1)[1]
    assert len(names := re.split(r",\s+", listed.strip())) > 15
    assert all(f"[{name}" in page for name in names)
