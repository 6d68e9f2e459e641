"""The gate's report, as sentences, text, Markdown and JSON."""

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pandas as pd
from tabulate import tabulate

from facegender.gate.evidence import Evidence

Verdict = Literal["pass", "warn", "fail", "info"]

NO_FLIPS = pd.DataFrame(columns=["path", "label", "old_probability", "new_probability", "right"])

# Longer lists are cut and say so; JSON is complete.
MAX_GROUPS = 40
MAX_FLIPS = 50


@dataclass(frozen=True)
class Floor:
    """A metric of the candidate and its limit; `value` is None if missing, `note` explains it."""

    metric: str
    value: float | None
    direction: Literal["at least", "at most"]
    limit: float
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """A metric of the candidate and of the baseline.

    Attributes:
        metric: name of the metric, or `column=group`.
        n: number of the candidate's images.
        difference: new minus old.
        low: lower end of the difference's 95 % interval; None if the metric has no interval.
        high: upper end.
        p: chance of a difference at least as large if neither model is better, adjusted for the
            number of tests; None if not tested.
        verdict: `info` if the row does not count.
        note: caveat, or "".
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
    """A cost of the candidate relative to the baseline's; None where not recorded."""

    metric: str
    old: float | None
    new: float | None
    ratio: float | None
    limit: float
    verdict: Verdict


@dataclass(frozen=True)
class Report:
    """Everything the gate found.

    Attributes:
        candidate: name of the results judged.
        baseline: name of the results compared with, or None.
        floors: one row per floor.
        undecided: reasons why the two were not compared.
        unproven: what the rules want shown and the test set does not show.
        paired: whether the comparison is image by image.
        groups: accuracy by group of the metadata.
        left_out: images and metadata that belong to no group.
        flips: images whose prediction changed: `path`, `label`, `old_probability`,
            `new_probability`, `right` (whether the candidate is right).
        notes: further warnings, one sentence each.
        evidence: power of the paired comparison.
        reference: the candidate judged against the fixed reference, without floors; or None.
    """

    candidate: str
    baseline: str | None
    floors: Sequence[Floor]
    undecided: Sequence[str] = ()
    unproven: Sequence[str] = ()
    paired: bool = True
    comparisons: Sequence[Comparison] = ()
    groups: Sequence[Comparison] = ()
    left_out: Sequence[str] = ()
    costs: Sequence[CostRatio] = ()
    flips: pd.DataFrame = field(default_factory=NO_FLIPS.copy)
    notes: Sequence[str] = ()
    evidence: Evidence | None = None
    reference: "Report | None" = None

    @property
    def failures(self) -> list[str]:
        """Reasons for refusing the candidate, one sentence each."""
        return [
            *(_floor_sentence(row) for row in self.floors if row.verdict == "fail"),
            *(
                f"{_drop_sentence(row)}, which is significant"
                for row in (*self.comparisons, *self.groups)
                if row.verdict == "fail"
            ),
            *self._against_reference(self.reference.failures if self.reference else []),
        ]

    @property
    def not_shown(self) -> list[str]:
        """What the rules want shown and the test set does not show, one sentence each."""
        lacking = self.reference.not_shown if self.reference else []
        return [*self.unproven, *self._against_reference(lacking)]

    @property
    def warnings(self) -> list[str]:
        """Things to look at, one sentence each."""
        return [
            *self.notes,
            *(
                f"{_floor_sentence(row)}, which may be chance"
                for row in self.floors
                if row.verdict == "warn"
            ),
            *(
                f"{_drop_sentence(row)}, which may be chance"
                if row.p is not None and row.low is not None
                else _drop_sentence(row)
                for row in (*self.comparisons, *self.groups)
                if row.verdict == "warn"
            ),
            *(_cost_sentence(row) for row in self.costs if row.verdict == "warn"),
            *self._against_reference(self.reference.warnings if self.reference else []),
        ]

    def _against_reference(self, sentences: Sequence[str]) -> list[str]:
        name = self.reference.baseline if self.reference else None
        return [f"against the reference {name}: {one}" for one in sentences]

    @property
    def verdict(
        self,
    ) -> Literal["pass", "pass with warnings", "fail", "cannot tell", "not enough evidence"]:
        """The verdict in words."""
        if self.failures:
            return "fail"
        if self.undecided:
            return "cannot tell"
        if self.not_shown:
            return "not enough evidence"
        return "pass with warnings" if self.warnings else "pass"

    @property
    def findings(self) -> list[tuple[str, list[str]]]:
        """The sentences by their titles, without titles that have none."""
        found = [
            ("Refused", self.failures),
            ("Cannot tell" if self.comparisons else "Cannot be compared", list(self.undecided)),
            ("Not enough evidence", self.not_shown),
            ("Warnings", self.warnings),
        ]
        return [(title, sentences) for title, sentences in found if sentences]

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 cannot tell, 3 not enough evidence."""
        return {"fail": 1, "cannot tell": 2, "not enough evidence": 3}.get(self.verdict, 0)

    def to_json(self) -> dict[str, Any]:
        """Return the whole report, ready for JSON; a number that JSON lacks is None."""
        content = asdict(replace(self, flips=pd.DataFrame(), evidence=None, reference=None))
        content["flips"] = self.flips.to_dict("records")
        content["evidence"] = self.evidence.to_json() if self.evidence else None
        content["reference"] = self.reference.to_json() if self.reference else None
        summary = {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "failures": self.failures,
            "not_shown": self.not_shown,
            "warnings": self.warnings,
        }
        # NaN and infinities, such as a limit of .inf in params.yaml.
        return dict(json.loads(json.dumps(summary | content), parse_constant=lambda _: None))


def _floor_sentence(row: Floor) -> str:
    if row.value is None:
        why = row.note or "it is missing or NaN"
        return f"{row.metric} has no value ({why}); it must be {row.direction} {row.limit:g}"
    note = f" ({row.note})" if row.note else ""
    return f"{row.metric} is {row.value:.4f}{note}; it must be {row.direction} {row.limit:g}"


def _drop_sentence(row: Comparison) -> str:
    p = "" if row.p is None else f" (p = {row.p:.2g})"
    return f"{row.metric} went from {row.old:.4f} to {row.new:.4f} on {row.n} images{p}"


def _cost_sentence(row: CostRatio) -> str:
    return f"{row.metric} is {row.ratio:.2f} times the baseline (limit {row.limit:g})"


def as_text(report: Report) -> str:
    """Return the report for a terminal."""
    parts = [f"gate: {report.verdict}", _about(report)]
    for title, sentences in report.findings:
        parts.append("\n".join([f"{title}:", *(f"  - {one}" for one in sentences)]))
    if report.left_out and report.comparisons:
        parts.append("\n".join(["Not in groups:", *(f"  - {one}" for one in report.left_out)]))
    for title, headers, rows, left_out in _tables(report, str):
        table = [tabulate(rows, headers, tablefmt="simple", disable_numparse=True)] * bool(rows)
        parts.append("\n".join([title, *table, *_ending(left_out)]))
    return "\n\n".join(parts) + "\n"


def as_markdown(report: Report) -> str:
    """Return the report for a pull request; names from the data are escaped."""
    parts = [f"## Gate: {report.verdict}", _escaped(_about(report))]
    for title, sentences in report.findings:
        parts.append(f"**{title}**")
        parts.append("\n".join(f"- {_escaped(one)}" for one in sentences))
    if report.left_out and report.comparisons:
        parts.append("Not in groups: " + _escaped("; ".join(report.left_out)))
    for title, headers, rows, left_out in _tables(report, _code):
        table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
        if title.startswith("Metrics"):
            parts += [f"**{title}**", table]
        elif rows:
            summary = f"<details><summary>{title}</summary>"
            parts += [summary, table, *_ending(left_out), "</details>"]
        else:
            parts.append(title)
    return "\n\n".join(parts) + "\n"


def _about(report: Report) -> str:
    if report.reference:
        name = f"the reference {report.reference.baseline}"
        same = replace(report.reference, candidate="The same results", baseline=name)
        return f"{_about(replace(report, reference=None))}. {_about(same)}"
    if report.baseline is None:
        return f"{report.candidate}, with no baseline"
    if not report.comparisons:
        return f"{report.candidate}, not compared with {report.baseline}"
    how = "image by image" if report.paired else "unpaired, as two independent samples"
    evidence = f". {report.evidence.sentence}" if report.evidence else ""
    return f"{report.candidate}, compared with {report.baseline} {how}{evidence}"


_Table = tuple[str, list[str], list[list[str]], int]


def _tables(report: Report, name: Callable[[str], str]) -> list[_Table]:
    """Return title, headers, rows and number of omitted rows of each table; `name` escapes text."""
    headers = [
        *("metric", "images", "baseline", "candidate"),
        *("difference", "95 % interval", "p", "verdict"),
    ]
    groups = sorted((row for row in report.groups if row.difference), key=_importance)
    small = sum(bool(row.note) for row in report.groups)
    tables: list[_Table] = [
        ("Metrics", headers, [_comparison_cells(row, str) for row in report.comparisons], 0),
        (
            "Floors",
            ["metric", "value", "must be", "verdict"],
            [
                [row.metric, _number(row.value), f"{row.direction} {row.limit:g}", row.verdict]
                for row in report.floors
            ],
            0,
        ),
        (
            f"Groups: {len(report.groups)}, {small} of them too small to judge; "
            f"{len(groups)} changed",
            ["group", *headers[1:]],
            [_comparison_cells(row, name) for row in groups[:MAX_GROUPS]],
            len(groups[MAX_GROUPS:]),
        ),
        # Unpaired, no prediction is compared with another.
        *([_flips_table(report, name)] if report.paired else []),
        (
            "Cost",
            ["cost", "baseline", "candidate", "ratio", "verdict"],
            [
                [row.metric, *map(_short, (row.old, row.new)), _short(row.ratio), row.verdict]
                for row in report.costs
            ],
            0,
        ),
    ]
    shown = tables if report.comparisons else tables[1:2]
    if report.reference is None:
        return shown
    about = f", against the reference {name(report.reference.baseline or '')}"
    metrics, _, by_group, *_ = _tables(report.reference, name)
    return [
        *shown,
        *((f"{title}{about}", head, rows, cut) for title, head, rows, cut in (metrics, by_group)),
    ]


def _flips_table(report: Report, name: Callable[[str], str]) -> _Table:
    return (
        f"Images whose prediction changed: {len(report.flips)}, "
        f"{int(report.flips['right'].sum())} of them now right",
        ["image", "label", "baseline P(male)", "candidate P(male)", "now"],
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
    )


def _importance(row: Comparison) -> tuple[bool, int, float]:
    """Sort key: judged groups first, by verdict, then by size of the drop."""
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
    return [f"and {left_out} more: --format json lists them all"] * bool(left_out)


def _code(text: str) -> str:
    """Escape text from the data for Markdown."""
    return f"<code>{_escaped(text)}</code>"


def _escaped(text: str) -> str:
    plain = html.escape(" ".join(text.split()), quote=False)
    for character in "#|`*_[]@~\\":  # first the one that the others insert
        plain = plain.replace(character, f"&#{ord(character)};")
    return plain
