"""Whose rules the gate applies: the baseline's, or the candidate's where those are stricter.

A candidate that brought its own rules could pass by loosening them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from facegender.errors import UserError
from facegender.evaluation.groups import Chosen
from facegender.params import Gate, faults_of

_Path = tuple[str, ...]
_FLOORS = ("gate", "floors")
_GROUPS = ("evaluate", "groups")
_REFERENCE = ("gate", "reference")
# Rules that are words, from the loosest to the strictest.
_WORDS: Mapping[_Path, Sequence[str]] = {
    ("gate", "test"): ("difference", "noninferiority"),
    ("gate", "without_evidence"): ("pass", "warn", "refuse_drops", "refuse"),
}


@dataclass(frozen=True)
class Rules:
    """The parameters that decide a verdict: `gate`, and two of `evaluate`."""

    gate: Gate
    min_group_size: int
    groups: Chosen = None


def combine_rules(
    own: Rules, baseline: Mapping[str, Any], *, accept_change: bool
) -> tuple[Rules, list[str]]:
    """Return the rules that apply, and a warning for each kind of change.

    Args:
        own: rules of the candidate.
        baseline: params.yaml of the baseline; without `gate`, the candidate's rules apply.
        accept_change: whether the candidate's rules apply even where they are looser.

    Raises:
        UserError: the baseline's rules are invalid.
    """
    old = {path: Gate.model_fields[path[1]].default for path in _WORDS}
    old |= _flatten({"gate": baseline.get("gate"), "evaluate": baseline.get("evaluate")})
    new = _flatten(
        {
            "gate": own.gate.model_dump(),
            "evaluate": {"min_group_size": own.min_group_size, "groups": own.groups},
        }
    )
    if not isinstance(baseline.get("gate"), Mapping):
        return own, []
    applied, looser, stricter = dict(new), [], []
    for path, value in old.items():
        if (path[:2] != _FLOORS and path not in new) or new.get(path) == value:
            continue
        if path not in new:
            # A floor of the other direction does not replace it.
            applied = {key: kept for key, kept in applied.items() if key[:3] != path[:3]}
        if _is_stricter(path, new.get(path), value):
            stricter.append(_change(path, value, new[path]))
        else:
            looser.append(_change(path, value, new.get(path)))
            applied[path] = value
    stricter += [
        _change(path, None, value)
        for path, value in new.items()
        if path[:2] == _FLOORS and path not in old and path in applied
    ]
    notes = []
    if stricter:
        notes.append(f"the gate's rules are stricter than the baseline's: {', '.join(stricter)}")
    if looser and accept_change:
        return own, [*notes, f"accepted: looser rules than the baseline's: {', '.join(looser)}"]
    if looser:
        notes.append(
            f"the work tree loosens the gate's rules: {', '.join(looser)}. The baseline's rules "
            "apply; --accept-rule-change accepts the new ones"
        )
    return _unflatten(applied), notes


def _is_stricter(path: _Path, own: Any, baseline: Any) -> bool:
    """Return whether the candidate's value of a rule, None if it has none, is the stricter one.

    Raises:
        UserError: the baseline's value is invalid.
    """
    if path == _REFERENCE:
        return baseline is None  # a later reference would forget the drops before it
    if path == _GROUPS:
        return False  # more groups, each judged less sharply: neither choice is stricter
    if path in _WORDS:
        if baseline not in _WORDS[path]:
            raise _invalid(f"{'.'.join(path)} is unknown: {baseline}")
        return _WORDS[path].index(own) > _WORDS[path].index(baseline)
    if not isinstance(baseline, int | float) or isinstance(baseline, bool) or math.isnan(baseline):
        raise _invalid(f"{'.'.join(path)} is not a number: {baseline}")
    if own is None:
        return False
    if path[-1] in ("at_least", "significance", "min_speed_ratio"):
        return own > baseline
    if path[:2] == ("gate", "max_drop"):
        return own < baseline
    # min_group_size, bootstrap_samples and seed have no stricter direction.
    return path[-1] in ("at_most", "max_size_ratio", "max_time_ratio") and own < baseline


def _change(path: _Path, old: object, new: object) -> str:
    name = ".".join(path)
    if path == _GROUPS:
        return f"{name} from {old or 'all columns'} to {new or 'all columns'}"
    if old is None:
        return f"{name} {new} is new"
    return f"{name} {old} is gone" if new is None else f"{name} from {old} to {new}"


def _flatten(content: object, path: _Path = ()) -> dict[_Path, Any]:
    if not isinstance(content, Mapping):
        return {path: content}
    flat: dict[_Path, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, (*path, str(key)))
    return flat


def _unflatten(flat: Mapping[_Path, Any]) -> Rules:
    content: dict[str, Any] = {"gate": {"floors": {}}}
    for path, value in flat.items():
        branch = content
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = value
    try:
        size = int(content["evaluate"]["min_group_size"])
        groups = content["evaluate"].get("groups")
        return Rules(Gate.model_validate(content["gate"]), size, groups)
    except ValidationError as error:
        raise _invalid(faults_of(error)) from error


def _invalid(fault: str) -> UserError:
    return UserError(
        f"The baseline's rules of the gate are invalid: {fault}. Correct them in a new commit, or "
        "choose another baseline."
    )
