"""Command line of the experiments: python -m experiments NAME [--config FILE] [key=value ...] [options].

`python -m experiments reproduce E1 ...` is read by `experiments.reproduce`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import config as configuration
from experiments import reproduce
from experiments.data import ENVIRONMENT, DataError
from experiments.report import check_run_dir, latest_run_dir, new_run_dir, versions, write_json
from torch_bilevel.errors import BilevelError, ConfigError, nearest

# A module each, with Config, RESUME_KEYS, run(config, run_dir, data_dir, resume) and describe(summary).
EXPERIMENTS = ("few_shot", "hyper_cleaning", "minimax", "rates", "saddle", "single_loop", "synthetic")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Run a published experiment.")
    parser.add_argument("experiment", help=f"one of: {', '.join(EXPERIMENTS)}; or reproduce")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the configuration")
    parser.add_argument("--config", metavar="FILE", help="YAML file, see configs/")
    parser.add_argument(
        "--data-dir", metavar="DIR", help=f"where the data sets are (default: ${ENVIRONMENT}, else ./data)"
    )
    parser.add_argument(
        "--runs-dir", metavar="DIR", default="runs", help="where run directories are made (default: runs)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_DIR",
        help="continue a run; without RUN_DIR the newest one",
    )
    return parser


def _prepare(args: argparse.Namespace, module: Any) -> tuple[Any, Path]:
    """The configuration and the (new or resumed) run directory."""
    parent = Path(args.runs_dir) / args.experiment
    if args.resume is None:
        config = configuration.load(module.Config, args.config, args.overrides)
        run_dir = new_run_dir(parent, config.name)
        (run_dir / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
        write_json(run_dir / "versions.json", versions())
        return config, run_dir
    for override in args.overrides:
        key = override.partition("=")[0]
        if key not in module.RESUME_KEYS:
            allowed = ", ".join(module.RESUME_KEYS)
            raise ConfigError(f"--resume continues the same run: {key!r} cannot change, only {allowed}")
    if args.resume:
        if args.config:
            raise ConfigError("--resume RUN_DIR brings its own configuration; leave --config out")
        run_dir = check_run_dir(Path(args.resume))
    else:
        name = configuration.load(module.Config, args.config).name if args.config else None
        run_dir = latest_run_dir(parent, name)
    return configuration.load(module.Config, run_dir / "config.yaml", args.overrides), run_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run failed, 2 wrong arguments or missing data, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["reproduce"]:
        return reproduce.main(argv[1:])
    args = _parser().parse_intermixed_args(argv)
    if args.resume and "=" in args.resume and not Path(args.resume).exists():
        # `--resume max_steps=9`: no directory was given
        args.overrides, args.resume = [args.resume, *args.overrides], ""
    run_dir = None
    try:
        if args.experiment not in EXPERIMENTS:
            raise ConfigError(
                f"unknown experiment {args.experiment!r}; {nearest(args.experiment, (*EXPERIMENTS, 'reproduce'))}"
            )
        module = importlib.import_module(f"experiments.{args.experiment}")
        config, run_dir = _prepare(args, module)
        print(f"run directory: {run_dir}", flush=True)
        summary = module.run(config, run_dir, args.data_dir, resume=args.resume is not None)
    except KeyboardInterrupt:
        if run_dir is not None:
            print(f"\ninterrupted; continue with: {_command(args, run_dir)}", file=sys.stderr)
        return 130
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BilevelError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        print(
            f"what was reached is in {run_dir}; after mending, continue with: {_command(args, run_dir)}",
            file=sys.stderr,
        )
        return 1
    print(module.describe(summary))
    print(f"run directory: {run_dir}")
    return 0


def _command(args: argparse.Namespace, run_dir: Path) -> str:
    data = f" --data-dir {args.data_dir}" if args.data_dir else ""
    return f"python -m experiments {args.experiment} --resume {run_dir}{data}"


if __name__ == "__main__":
    sys.exit(main())
