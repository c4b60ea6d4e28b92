"""Files of other programs' settings into one of our recipes: which program they are of, and what becomes of them."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...models_impl.parsing import from_json, from_yaml
from ..config import data_sets, objective, rules
from ..config.load import from_toml, read
from . import aitoolkit, families, kohya, onetrainer, rows, simpletuner
from .rows import Absent, Draft, flat
from .settle import settle

PROGRAMS = (onetrainer, simpletuner, aitoolkit, kohya)
LARGEST = 2**22  # bytes of a file of settings


def imported(files: Sequence[Path]) -> tuple[Draft, str]:
    """(the recipe, the program's name) of its file, with those that lie beside it. Raises ValueError with one sentence
    for what is no such file."""
    contents = {file: content(file) for file in files}
    found = next(((file, program) for file, raw in contents.items() for program in PROGRAMS
                  if program.recognises(raw) and not alone(raw)), None)
    if found is None:
        only = next(((file, program) for file, raw in contents.items() for program in PROGRAMS
                     if program.recognises(raw)), None)
        if only is None:
            raise ValueError(f"{files[0].name}: these are no settings of "
                             f"{', '.join(program.NAME for program in PROGRAMS)}.")
        found = only
    file, program = found
    others = {path: raw for path, raw in contents.items() if path != file}
    try:
        trained = program.trained(contents[file])
        draft = families.begun(trained)
        draft.set("name", file.stem)
        apply(draft, program, contents[file], reader(file, others))
    except Absent as error:
        named = next((f"{key}: " for key, value in entries(contents[file]) if same(value, error.given)), "")
        raise ValueError(f"{file.name} ({program.NAME}): {named}{error}, which that program wants there.") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{file.name} ({program.NAME}): {error}") from None
    except (AttributeError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"{file.name} ({program.NAME}): an entry has another form than that program gives it "
                         f"({type(error).__name__}).") from error
    finish(draft, trained)
    return draft, program.NAME


def entries(raw, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of everything in nested tables and lists."""
    inside = raw.items() if isinstance(raw, Mapping) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in inside:
        yield f"{prefix}{key}", value
        yield from entries(value, f"{prefix}{key}.")


def same(value, given) -> bool:
    return type(value) is type(given) and value == given


def alone(raw) -> bool:
    """Whether a file has data sets only."""
    return simpletuner.is_backends(raw) or isinstance(raw, dict) and kohya.is_datasets(raw) and \
        "pretrained_model_name_or_path" not in kohya.flattened(raw)


def content(file: Path):
    """The tables of a TOML, JSON or YAML file; of another, its text."""
    data = file.read_bytes()
    if len(data) > LARGEST:
        raise ValueError(f"{file.name} has {len(data):,} bytes: settings have a few thousand.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file.name} is no text in UTF-8, as settings are.") from None
    if file.suffix == ".toml":
        try:
            return from_toml(text)
        except ValueError as error:
            raise ValueError(f"{file.name} is not valid TOML: {error}.") from None
    if file.suffix in (".yaml", ".yml"):
        return from_yaml(text, file.name)
    return text if file.suffix == ".txt" else from_json(text, file.name)


def reader(file: Path, others: dict):
    """What reads a file that the settings name: one of those that were given, or one that lies where they say."""
    def beside(name):
        if not name:
            return next((raw for raw in others.values() if isinstance(raw, list) or kohya.recognises(raw)), None)
        name = str(name).replace("\\", "/")
        given = next((raw for path, raw in others.items() if path.name == Path(name).name), None)
        if given is not None:
            return given
        for place in (Path(name).expanduser(), file.parent / name, file.parent / Path(name).name):
            if place.is_file() and place.suffix in (".json", ".toml", ".yaml", ".yml", ".txt"):
                return content(place)
        return next((raw for raw in others.values() if isinstance(raw, list) or alone(raw)), None)

    return beside


def apply(draft: Draft, program, raw, read_beside):
    """The program's own part, and its table for everything else."""
    plain = program.bare(raw) if program is simpletuner else raw
    plain = kohya.flattened(raw) if program is kohya else aitoolkit.process(raw) if program is aitoolkit else plain
    flattened = flat(plain)
    said = rows.said(flattened)
    draft.off += len(flattened) - len(said)
    given = {**program.DEFAULTS, **said}
    program.own(draft, given, plain if program is not aitoolkit else raw, read_beside)
    for key, value in given.items():
        row = program.ROWS.get(key)
        if row is None and (key.startswith(program.SILENT) or key.endswith(program.SILENT_ENDS)):
            draft.off += 1
        else:
            draft.apply(key, value, row, said=key in said or key not in program.DEFAULTS)


def finish(draft: Draft, trained: families.Trained):
    """What is to be filled in, and what the recipe says of the rest."""
    if draft.get("samples.every") and not draft.get("samples.prompts"):
        draft.set("samples.every", 0)
        draft.missing.append("samples.prompts: samples are drawn every so many steps, and there are no prompts here.")
    draft.missing = [*families.files(draft, trained), *draft.missing]
    config, problems = read(draft.settings)
    if config and config.recipe and not problems:
        settle(draft, config)
        config, problems = read(draft.settings)
        problems += [*data_sets.problems(config.data), *rules.problems(config), *data_sets.of_run(config),
                     *objective.problems(config), *config.recipe.problems(config)]
    named = {line.partition(" = ")[0] for line in draft.missing} | {line.partition(":")[0] for line in draft.missing}
    draft.missing += [problem for problem in problems
                      if "there is no such" not in problem and not any(problem.startswith(name) for name in named)]


def report(draft: Draft, program: str, files: Sequence[Path]) -> list[str]:
    """Lines on what became of the settings."""
    names = ", ".join(file.name for file in files)
    lines = [f"From {names} of {program}: a recipe {draft.settings['recipe']['name']}."]
    for title, entries in (
        ("To fill in:", draft.missing), ("Changed in meaning:", draft.changed),
        ("Without counterpart:", [f"{key} = {shown(value)}: {why}" for key, value, why in draft.absent]),
    ):
        lines += ["", title, *(f"- {entry}" for entry in entries)] if entries else []
    if draft.off:
        lines += ["", f"{draft.off} settings that are off, or are about the program itself, are not listed."]
    return lines


def shown(value) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else text[:100] + "..."
