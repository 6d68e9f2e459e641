"""The gate's report: what it found, in sentences, as text, as Markdown and for JSON."""

import html
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pandas as pd
from tabulate import tabulate

Verdict = Literal["pass", "warn", "fail", "info"]

NO_FLIPS = pd.DataFrame(columns=["path", "label", "old_probability", "new_probability", "right"])

# Longer lists end with how many there are; JSON has them all.
MAX_GROUPS = 40
MAX_FLIPS = 50


@dataclass(frozen=True)
class Floor:
    """A metric of the candidate beside what it must reach; `value` is None if it is missing."""

    metric: str
    value: float | None
    direction: Literal["at least", "at most"]
    limit: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """A metric of the candidate beside the baseline's.

    Attributes:
        metric: its name, or `column=group`.
        n: images it is computed from, in the candidate.
        old: the baseline's value.
        new: the candidate's.
        difference: new less old.
        low: lower end of the difference's 95 % interval.
        high: upper end.
        p: chance of a difference at least as large if neither were better, adjusted for all that is
            tested; None if it is not tested.
        verdict: info if it does not enter the verdict.
        note: what limits the figure, or nothing.
    """

    metric: str
    n: int
    old: float | None
    new: float | None
    difference: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    verdict: Verdict = "info"
    note: str = ""


@dataclass(frozen=True)
class CostRatio:
    """A cost of the candidate as a ratio to the baseline's; None where it is not recorded."""

    metric: str
    old: float | None
    new: float | None
    ratio: float | None
    limit: float
    verdict: Verdict


@dataclass(frozen=True)
class Report:
    """All that the gate found.

    Attributes:
        candidate: name of the results that are judged.
        baseline: name of those they are compared with, or None.
        floors: a row for each floor.
        undecided: why the two cannot be compared; empty if they are.
        paired: whether the same images are compared.
        comparisons: over all images and by class.
        groups: by group of the metadata.
        costs: ratios.
        flips: images whose prediction changed: `path`, `label`, `old_probability`,
            `new_probability`, `right` (whether the candidate is).
        notes: further warnings, a sentence each.
    """

    candidate: str
    baseline: str | None
    floors: Sequence[Floor]
    undecided: Sequence[str] = ()
    paired: bool = True
    comparisons: Sequence[Comparison] = ()
    groups: Sequence[Comparison] = ()
    costs: Sequence[CostRatio] = ()
    flips: pd.DataFrame = field(default_factory=NO_FLIPS.copy)
    notes: Sequence[str] = ()

    @property
    def failures(self) -> list[str]:
        """Why the candidate is refused, a sentence each."""
        return [
            *(_floor_sentence(row) for row in self.floors if row.verdict == "fail"),
            *(
                f"{_drop_sentence(row)}, which is significant"
                for row in (*self.comparisons, *self.groups)
                if row.verdict == "fail"
            ),
        ]

    @property
    def warnings(self) -> list[str]:
        """What to look at, a sentence each."""
        return [
            *self.notes,
            *(
                f"{_drop_sentence(row)}, which may be chance"
                if row.p is not None
                else _drop_sentence(row)
                for row in (*self.comparisons, *self.groups)
                if row.verdict == "warn"
            ),
            *(_cost_sentence(row) for row in self.costs if row.verdict == "warn"),
        ]

    @property
    def verdict(self) -> Literal["pass", "pass with warnings", "fail", "cannot tell"]:
        """The whole in a word or three."""
        if self.failures:
            return "fail"
        if self.undecided:
            return "cannot tell"
        return "pass with warnings" if self.warnings else "pass"

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 cannot tell."""
        return {"fail": 1, "cannot tell": 2}.get(self.verdict, 0)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold; a value that is not defined is None."""
        content = asdict(replace(self, flips=pd.DataFrame()))
        content["flips"] = self.flips.to_dict("records")
        summary = {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "failures": self.failures,
            "warnings": self.warnings,
        }
        return summary | content


def _floor_sentence(row: Floor) -> str:
    if row.value is None:
        return f"{row.metric} is missing or NaN, and must be {row.direction} {row.limit:g}"
    return f"{row.metric} is {row.value:.4f}, and must be {row.direction} {row.limit:g}"


def _drop_sentence(row: Comparison) -> str:
    text = f"{row.metric} went from {row.old:.4f} to {row.new:.4f} on {row.n} images"
    if row.p is not None:
        return f"{text} (p = {row.p:.2g})"
    return text


def _cost_sentence(row: CostRatio) -> str:
    return f"{row.metric} is {row.ratio:.2f} times the baseline's; {row.limit:g} is the tolerance"


def as_text(report: Report) -> str:
    """Return the report for a terminal."""
    parts = [f"gate: {report.verdict}", _about(report)]
    for title, sentences in _findings(report):
        parts.append("\n".join([f"{title}:", *(f"  - {one}" for one in sentences)]))
    for title, headers, rows, left_out in _tables(report, str):
        table = [tabulate(rows, headers, tablefmt="simple", disable_numparse=True)] * bool(rows)
        parts.append("\n".join([title, *table, *_ending(left_out)]))
    return "\n\n".join(parts) + "\n"


def as_markdown(report: Report) -> str:
    """Return the report for a pull request; names from the data cannot break its form."""
    parts = [f"## Gate: {report.verdict}", _escaped(_about(report))]
    for title, sentences in _findings(report):
        parts.append(f"**{title}**")
        parts.append("\n".join(f"- {_escaped(one)}" for one in sentences))
    for title, headers, rows, left_out in _tables(report, _code):
        table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
        if title == _METRICS:
            parts += [f"**{title}**", table]
        elif rows:
            summary = f"<details><summary>{title}</summary>"
            parts += [summary, table, *_ending(left_out), "</details>"]
        else:
            parts.append(title)
    return "\n\n".join(parts) + "\n"


_METRICS, _FLOORS = "Metrics", "Floors"


def _about(report: Report) -> str:
    if report.baseline is None:
        return f"{report.candidate}, with no baseline"
    if report.undecided:
        return f"{report.candidate}, not compared with {report.baseline}"
    how = "image by image" if report.paired else "unpaired, as two independent samples"
    return f"{report.candidate}, compared with {report.baseline} {how}"


def _findings(report: Report) -> list[tuple[str, list[str]]]:
    """Return titles with their sentences, where there are any."""
    found = [
        ("Refused", report.failures),
        ("Cannot be compared", list(report.undecided)),
        ("Warnings", report.warnings),
    ]
    return [(title, sentences) for title, sentences in found if sentences]


_Table = tuple[str, list[str], list[list[str]], int]


def _tables(report: Report, name: Callable[[str], str]) -> list[_Table]:
    """Return title, headers, rows and the number of rows left out, of each table.

    Args:
        report: what is shown.
        name: how a text from the data is written.
    """
    headers = ["metric", "images", "old", "new", "difference", "95 % interval", "p", "verdict"]
    groups = sorted((row for row in report.groups if row.difference), key=_importance)
    small = sum(bool(row.note) for row in report.groups)
    tables: list[_Table] = [
        (_METRICS, headers, [_comparison_cells(row, str) for row in report.comparisons], 0),
        (
            _FLOORS,
            ["metric", "value", "must be", "verdict"],
            [
                [row.metric, _number(row.value), f"{row.direction} {row.limit:g}", row.verdict]
                for row in report.floors
            ],
            0,
        ),
        (
            f"Groups: {len(report.groups)}, of which {small} are too small to judge; "
            f"{len(groups)} changed",
            ["group", *headers[1:]],
            [_comparison_cells(row, name) for row in groups[:MAX_GROUPS]],
            len(groups[MAX_GROUPS:]),
        ),
        (
            f"Images whose prediction changed: {len(report.flips)}, of which "
            f"{int(report.flips['right'].sum())} are now right",
            ["image", "label", "old P(male)", "new P(male)", "now"],
            [
                [
                    name(row["path"]),
                    row["label"],
                    _number(row["old_probability"]),
                    _number(row["new_probability"]),
                    "right" if row["right"] else "wrong",
                ]
                for row in report.flips.head(MAX_FLIPS).to_dict("records")
            ],
            max(0, len(report.flips) - MAX_FLIPS),
        ),
        (
            "Cost",
            ["cost", "old", "new", "ratio", "verdict"],
            [
                [row.metric, *map(_short, (row.old, row.new)), _short(row.ratio), row.verdict]
                for row in report.costs
            ],
            0,
        ),
    ]
    compared = bool(report.comparisons)
    return [table for table in tables if compared or table[0] == _FLOORS]


def _importance(row: Comparison) -> tuple[bool, int, float]:
    """Sort groups that are judged first, by verdict, the largest drop first."""
    return bool(row.note), ("fail", "warn", "pass", "info").index(row.verdict), row.difference or 0


def _comparison_cells(row: Comparison, name: Callable[[str], str]) -> list[str]:
    interval = "" if row.low is None else f"{row.low:+.4f} to {row.high:+.4f}"
    return [
        name(row.metric),
        str(row.n),
        _number(row.old),
        _number(row.new),
        "" if row.difference is None else f"{row.difference:+.4f}",
        interval,
        "" if row.p is None else f"{row.p:.2g}",
        row.note or row.verdict,
    ]


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4f}"


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _ending(left_out: int) -> list[str]:
    return [f"and {left_out} more: --format json has them all"] * bool(left_out)


def _code(text: str) -> str:
    """Write a text from the data so that Markdown takes nothing in it for its own."""
    return f"<code>{_escaped(text)}</code>"


def _escaped(text: str) -> str:
    plain = html.escape(" ".join(text.split()), quote=False)
    for character in "|`*_[]@~#\\":
        plain = plain.replace(character, f"&#{ord(character)};")
    return plain
