"""The documentation: code runs and prints what the page says, links lead somewhere, the hooks are up to date."""

import contextlib
import importlib.util
import io
import math
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import pytest

from mixformer.cli import console, main

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
# tests/test_guide.py runs fine_tuning.md
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "fine_tuning"]


def blocks(page: Path) -> list[tuple[str, str]]:
    """[(language, code)] of the fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with small stand-ins for the checkpoints that pages name."""
    shutil.copytree(GOLDEN / "cogvlm-hf", tmp_path / "cogvlm-chat-hf")
    shutil.copytree(GOLDEN / "cogvlm-sat", tmp_path / "cogvlm-sat")
    (tmp_path / "vicuna-7b-v1.5").mkdir()
    shutil.copy(GOLDEN / "prompts" / "tokenizer.model", tmp_path / "vicuna-7b-v1.5")
    shutil.copy(GOLDEN / "cogvlm-hf" / "image.png", tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run_and_print_what_follows_them(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed: str | None = None
    for number, (language, code) in enumerate(blocks(page)):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, f"{page.name}, block {number}", "exec"), vars(module))
            printed = output.getvalue()
        elif language == "bash":
            for python, flag, module_name, *arguments in map(shlex.split, code.splitlines()):
                assert (python, flag, module_name) == ("python", "-m", "models.cogvlm")
                main("models.cogvlm:CogVLM", [*arguments, "--chat.max_new_tokens=4"])
        elif language == "yaml":
            (folder / "variant.yaml").write_text(code, encoding="utf-8")
        elif language == "text":
            assert printed == code


def test_the_page_of_hooks_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    console(["hooks"])
    assert capsys.readouterr().out == (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target


def run_example(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    specification = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.main()
    return capsys.readouterr().out


def test_the_example_composes_saves_loads_and_leaves_no_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run_example("compose_variant", capsys, monkeypatch)
    assert re.search(r"mlp_forward +layers 1, 3 +default <- mlp_gate\n", text)
    assert "loaded again, same logits: True" in text and "both removed, plain again: True" in text


def test_a_variant_that_no_paper_has_is_composed_trained_and_described(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = run_example("compose_vlm", capsys, monkeypatch)
    assert float(re.findall(r"'language': ([\d.]+)", text)[0]) < 4.6 < math.log(119), "it learned nothing"
    assert re.search(r"qkv_forward +layers 0, 4 +default <- expert\n", text)
    assert re.search(r"cross_attention_forward +all layers +default <- cross <- cross_gate\n", text)
    source = (ROOT / "examples" / "compose_vlm.py").read_text(encoding="utf-8")
    assert len([line for line in source[source.index("class ") :].splitlines() if line.strip()]) < 30
