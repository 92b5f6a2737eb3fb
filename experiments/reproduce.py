"""python -m experiments reproduce E1: run all of a published comparison, resumably, and write its report."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.data import ENVIRONMENT, DataError, require
from experiments.report import plain, versions
from experiments.scheduler import Workers, kept, results_of, run_tasks
from experiments.studies import STUDIES, Study, load_study
from torch_bilevel.errors import BilevelError, ConfigError

NOTES = Path(__file__).resolve().parent / "studies" / "notes"


def reproduce(
    study: Study,
    quick: bool = False,
    jobs: int | None = None,
    data_dir: str | None = None,
    out: Path | None = None,
    fresh: bool = False,
    runs_dir: Path = Path("runs"),
    progress: bool = False,
    so_far: bool = False,
) -> Path:
    """Run the stages of `study`, then write out/NAME.md, out/NAME.json and out/figures/NAME_*.png.

    Args:
        quick: the small version; its report goes to runs_dir/reproduce/NAME-quick/report unless `out` is given.
        jobs: worker processes at most, default one per core. data_dir: where the data sets are.
        out: default docs/results. fresh: forget kept results. runs_dir: kept results go to runs_dir/reproduce/NAME.
        so_far: run nothing; report on what is kept, and say how much is missing.

    Returns:
        The path of the report.

    Raises:
        DataError: a data set is absent. ConfigError: no GPU where the study needs one; see also `run_tasks`. WorkerError.
    """
    for need in () if so_far else study.needs:
        _check_data(need, data_dir)
    if study.gpu and not (quick or so_far or torch.cuda.is_available()):
        raise ConfigError(f"{study.name} needs a CUDA device and this PyTorch sees none; --quick shows on a CPU that it runs")
    folder = runs_dir / "reproduce" / (f"{study.name}-quick" if quick else study.name)
    out = Path(out) if out is not None else folder / "report" if quick else Path("docs/results")
    if fresh and so_far:
        raise ConfigError("--fresh forgets what --so-far would report; give one of them")
    if fresh and folder.is_dir():
        shutil.rmtree(folder)
    if so_far and not any(folder.glob("*.json")):
        raise ConfigError(f"nothing of {study.name} is kept in {folder}; run it first, without --so-far")
    records: dict[str, dict[str, Any]] = {}
    missing = 0
    with Workers(jobs) as workers:
        for number, stage in enumerate(study.stages, 1):
            tasks = stage(quick, results_of(records))
            if so_far:
                missing += len(tasks)
                tasks = [task for task in tasks if kept(folder, task) is not None]
                missing -= len(tasks)
            label = f"{study.name} {number}/{len(study.stages)}" if progress else None
            records.update(run_tasks(tasks, folder, workers, data_dir, label))
    results, figures = results_of(records), out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    body = study.report(results, figures, quick)
    text = (
        "\n\n".join(
            part.strip()
            for part in (_header(study, records, quick, missing), _notes(study, quick), body, _failures(results))
            if part
        )
        + "\n"
    )
    path = out / f"{study.name}.md"
    path.write_text(text, encoding="utf-8")
    _write_numbers(out / f"{study.name}.json", records)
    return path


def _check_data(need: str, data_dir: str | None) -> None:
    if ":" not in need:
        require(need, data_dir)
        return
    module, name = need.split(":")
    getattr(importlib.import_module(module), name)(data_dir)


def _header(study: Study, records: Mapping[str, Mapping[str, Any]], quick: bool, missing: int) -> str:
    """What ran, on what: every number below it was made so."""
    values = records.values()
    machines = sorted({record["machine"] for record in values})
    revisions = sorted({str(record["revision"]) for record in values})
    seeds = sorted({record["arguments"]["seed"] for record in values if "seed" in record["arguments"]})
    jobs = " or ".join(sorted({str(record["jobs"]) for record in values}))
    minutes = sum(record["seconds"] for record in values) / 60
    packages = versions()["packages"]
    used = ", ".join(f"{name} {packages[name]}" for name in ("torch", "numpy", "scikit-learn") if packages.get(name))
    command = f"python -m experiments reproduce {study.name}{' --quick' if quick else ''} --data-dir DATA"
    lines = [
        f"# {study.name}. {study.title}" + (" (quick version: not a result)" if quick else ""),
        "",
        f"    {command}",
        "",
        f"- Machine: {'; '.join(machines)}, one thread a run, {jobs} at a time; {minutes:.0f} minutes in all.",
        f"- Versions: Python {versions()['python']}, {used}; source revision {', '.join(revisions)}.",
        f"- Seeds: {', '.join(map(str, seeds)) or 'none'}; {len(records)} runs. Every number below is made by the"
        " command above"
        f" from their records; those of each run are in [{study.name}.json]({study.name}.json), without the curves.",
    ]
    if missing:
        lines.append(f"- **Not finished: {missing} further runs of the study were not made when this was written.**")
    return "\n".join(lines)


def _notes(study: Study, quick: bool) -> str:
    """What was found, by hand: studies/notes/NAME.md; not under a quick report, which has other numbers."""
    path = NOTES / f"{study.name}.md"
    return path.read_text(encoding="utf-8") if path.is_file() and not quick else ""


def _failures(results: Mapping[str, Mapping[str, Any]]) -> str:
    failed = {key: result["failed"] for key, result in results.items() if "failed" in result}
    if not failed:
        return ""
    lines = [f"- `{key}`: {message}" for key, message in failed.items()]
    return "\n".join([f"## Runs that failed ({len(failed)} of {len(results)})", "", *lines])


def _write_numbers(path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a run: arguments and result, the curves (`records`) left out."""
    lines = []
    for key, record in records.items():
        result = {name: value for name, value in record["result"].items() if name != "records"}
        line = {"arguments": record["arguments"], "result": result, "seconds": round(record["seconds"], 2)}
        lines.append(f"{json.dumps(key)}: {json.dumps(plain(line))}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments reproduce", description=__doc__)
    parser.add_argument("study", help=f"one of: {', '.join(STUDIES)}")
    parser.add_argument("--quick", action="store_true", help="a minute's version that shows that everything runs")
    parser.add_argument("--jobs", type=int, metavar="N", help="worker processes at most (default: one per core)")
    parser.add_argument(
        "--data-dir", metavar="DIR", help=f"where the data sets are (default: ${ENVIRONMENT}, else ./data)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="of the report (default: docs/results; with --quick beside the kept results)",
    )
    parser.add_argument("--so-far", action="store_true", help="run nothing; report on the kept results there are")
    parser.add_argument("--fresh", action="store_true", help="forget kept results of this study")
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="of kept results (default: runs)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a worker died, 2 wrong arguments or missing data, 130 interrupted (then resume)."""
    args = _parser().parse_args(argv)
    try:
        study = load_study(args.study)
        path = reproduce(
            study,
            args.quick,
            args.jobs,
            args.data_dir,
            args.out,
            args.fresh,
            args.runs_dir,
            progress=not args.so_far,
            so_far=args.so_far,
        )
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept: the same command (without --fresh) goes on", file=sys.stderr)
        return 130
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BilevelError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"report: {path}")
    return 0
