"""The command `facegender`: its parser, and where each subcommand lives."""

import argparse
import os
import sys
from importlib import import_module

from facegender.runtime.entry_points import run_command
from facegender.runtime.user_settings import restart_without_early_settings

# Each command: the function that adds its arguments, and its line in `facegender --help`. Only the
# module of the command that runs is imported.
COMMANDS = {
    "predict": ("predict:add_predict", "print the label and P(male) of images"),
    "demo": ("demo:add_demo", "show a page on which to try a model"),
    "gate": ("gate:add_gate", "refuse a model that is worse than the previous one"),
    "audit-labels": ("audit_labels:add_audit_labels", "list images whose label may be wrong"),
    "report": ("report:add_report", "write one page of results, compared with a commit"),
    "sweep": ("sweep:add_sweep", "run a grid of parameters as DVC experiments, in one MLflow run"),
    "seeds": (
        "seeds:add_seeds",
        "train with several seeds, and print how far chance moves results",
    ),
    "relocate": ("relocate:add_relocate", "fix MLflow's paths after moving the folder"),
    "verify": ("verify:add_verify", "find and remove damaged data and models"),
    "worker": ("worker:add_worker", "join the training of worker 0, as a worker of TF_CONFIG"),
    "promote": ("registry:add_promote", "make a run's model the champion if it passes the gate"),
    "rollback": ("registry:add_rollback", "bring the previous champion back"),
    "models": ("registry:add_models", "list the registered models and show the champion"),
    "score": ("score:add_score", "label millions of images on Spark, into Parquet"),
}


# Neither 0 nor 1, which are verdicts of `facegender gate`.
_SIGPIPE_EXIT_CODE = 128 + 13


def main() -> None:
    """Run the command line; the entry point of the installed command."""
    restart_without_early_settings()
    _replace_closed_streams()
    # Text that the terminal cannot show is escaped.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    run_command(_run_until_reader_leaves)


def _replace_closed_streams() -> None:
    """Replace streams that the caller has closed, as daemons do, by the null device."""
    # In this order: each file opened gets the lowest free descriptor, that of the closed stream.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


def _run_until_reader_leaves() -> int:
    """Run the command. If the reader of standard output leaves, as `head` does, end quietly."""
    try:
        code = _run(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGPIPE_EXIT_CODE


def _run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="facegender",
        description="Label face photos by perceived gender with the model of `dvc repro`, judge "
        "models, and choose the one to serve.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line)
        if arguments[:1] == [name]:
            module, _, add_arguments = function.partition(":")
            getattr(import_module(f"facegender.cli.{module}"), add_arguments)(command)
    args = parser.parse_args(arguments)
    return args.run(args)
