"""What is wrong with files of samples, with file and line: `mixformer data check FILE`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mixformer.data.processor import Processor, load_processor
from mixformer.data.readers import FORMATS, Source, open_records
from mixformer.data.records import Record, RecordError, mistakes, training_sample
from mixformer.images import load_image

_SLOW = 2.0  # seconds after which a progress bar is shown


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: where.
        line: its number, from 1; 0 for the file as a whole.
        reason: what it is.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


def check(
    files: Iterable[Source | str | Path] | Source | str | Path, processor: Processor | None = None,
    max_length: int | None = None, supervise: str = "last",
) -> list[Problem]:
    """Look at every sample of some files, and at every picture that they name.

    Args:
        files: what `open_records` opens, or several of it.
        processor: makes a training row of every sample; None to leave that out.
        max_length: most tokens in a row, with a processor.
        supervise: see `TrainingSample`, with a processor.

    Returns:
        all that is wrong, in the order of the files; an empty list if nothing is.
    """
    return list(_problems(files, processor, max_length, supervise))


def _problems(
    files: Iterable[Source | str | Path] | Source | str | Path, processor: Processor | None, max_length: int | None,
    supervise: str,
) -> Iterator[Problem]:
    for source in [files] if isinstance(files, (Source, str, Path)) else files:
        try:
            records = open_records(source)
        except RecordError as error:
            yield _problem(error)
            continue
        except ValueError as error:
            yield Problem(source.file if isinstance(source, Source) else str(source), 0, str(error))
            continue
        for file in records.files():
            for index in tqdm(range(len(file)), desc=file.name, delay=_SLOW, leave=False):
                try:
                    record = file[index]
                except RecordError as error:
                    yield _problem(error)
                    continue
                reasons = [*mistakes(record.content), *_picture_problems(record)]
                if not reasons and processor is not None and {"messages", "text"} & set(record.content):
                    reasons = _row_problems(record, processor, max_length, supervise)
                yield from (Problem(record.file, record.line, reason) for reason in reasons)


def _problem(error: RecordError) -> Problem:
    return Problem(error.file, error.line, error.reason.removeprefix(":").strip())


def _picture_problems(record: Record) -> list[str]:
    found = []
    for number, image in enumerate(record.images):
        try:
            load_image(image)
        except (ValueError, OSError) as error:
            found.append(f"picture {number} cannot be read: {error}")
    return found


def _row_problems(record: Record, processor: Processor, max_length: int | None, supervise: str) -> list[str]:
    try:
        processor.training_batch([training_sample(record, processor.config, supervise)], max_length)
    except ValueError as error:
        return [str(error).removeprefix("sample 0: ")]
    return []


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which files are meant, and how their samples become rows."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="files or folders of samples, in any format")
    parser.add_argument("--format", choices=FORMATS, help="their format; by default it follows from the name")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the pictures, if not that of the file")
    parser.add_argument("--labels", metavar="NAME", help="name of the folder of labels (cogvlm-sft)")
    parser.add_argument("--processor", metavar="FOLDER", help="checkpoint whose processor makes rows of the samples")
    parser.add_argument("--max-length", type=int, help="most tokens in a row (with --processor)")
    parser.add_argument("--supervise", choices=("last", "all"), default="last", help="which answers are learnt")


def given_sources(options: argparse.Namespace) -> tuple[Sequence[Source], Processor | None]:
    """What the arguments of `add_source_arguments` name.

    Raises:
        ValueError: a processor that cannot be loaded, or options that need one.
    """
    if options.max_length is not None and options.processor is None:
        raise ValueError("--max-length counts tokens: give --processor FOLDER as well.")
    files = [Source(name, None, options.format, options.images, options.labels) for name in options.files]
    return files, None if options.processor is None else load_processor(options.processor)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mixformer data check`."""
    add_source_arguments(parser)


def check_command(options: argparse.Namespace) -> None:
    """Print all that is wrong.

    Raises:
        SystemExit: 1 if anything is wrong.
        ValueError: options that do not go together.
    """
    files, processor = given_sources(options)
    count = 0
    for problem in _problems(files, processor, options.max_length, options.supervise):
        tqdm.write(str(problem))
        count += 1
    print(f"{count} problem(s)" if count else "no problems")
    if count:
        raise SystemExit(1)
