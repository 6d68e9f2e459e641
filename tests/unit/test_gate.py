"""The gate's verdicts: floors, drops judged on the same images, groups, costs, and its report."""

import html
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, bootstrap, permutation_test

from bench.gate_power import predictions, printed_drop, simulate
from facegender.errors import UserError
from facegender.evaluation.groups import holm
from facegender.evaluation.metrics import METRICS, classification_metrics, paired_interval
from facegender.gate.compare import parse_results
from facegender.gate.evidence import images_for_noninferiority
from facegender.gate.judge import judge
from facegender.gate.pairing import Results
from facegender.gate.promotion import judge_promotion, may_be_champion
from facegender.gate.significance import (
    Resampling,
    paired_difference,
    paired_ece_p,
    paired_f1_interval,
    unpaired_difference,
)
from facegender.gate.stricter_rules import Rules, combine_rules
from facegender.gate.verdict import Report, as_markdown, as_text
from facegender.params import AtLeast, AtMost, Gate, Params
from tools.compose_params import ROOT

MIN_GROUP_SIZE = 20


@pytest.fixture(scope="module")
def settings(params: Params) -> Gate:
    return params.gate


def results(predictions: pd.DataFrame, name: str = "candidate", **costs: float) -> Results:
    """Return the results that evaluate would leave of predictions."""
    metrics = classification_metrics(
        predictions["label"].to_numpy(dtype=int),
        predictions["probability"].to_numpy(dtype=float),
        threshold=0.5,
    )
    return Results(name, metrics, predictions, costs)


def wrong_at(*places: int, n: int = 400, **columns: Any) -> pd.DataFrame:
    """Return predictions that are wrong at these places, and sure everywhere."""
    right = np.ones(n, dtype=bool)
    right[list(places)] = False
    names = [f"{place:04}" for place in range(n)]
    named = {"path": [f"faces/{name}.png" for name in names], "sha256": names}
    return predictions(np.arange(n) % 2, right, named | columns)


def verdict(report: Report, metric: str) -> str:
    rows = [*report.floors, *report.costs, *report.groups, *report.comparisons]
    return {row.metric: row.verdict for row in rows}[metric]


@pytest.fixture
def compare(settings: Gate) -> Callable[..., Report]:
    def run(
        new: pd.DataFrame | Results,
        old: pd.DataFrame | Results,
        rules: dict[str, Any] | None = None,
        **options: Any,
    ) -> Report:
        return judge(
            new if isinstance(new, Results) else results(new),
            old if isinstance(old, Results) else results(old, "baseline"),
            settings.model_copy(update=rules),
            min_group_size=MIN_GROUP_SIZE,
            **options,
        )

    return run


@pytest.fixture(scope="module")
def sample() -> Results:
    """The committed results of the sample."""
    folder = ROOT / "metrics"
    return parse_results(
        "sample",
        (folder / "test.json").read_text(),
        predictions=(folder / "predictions.csv").read_text(),
        export_metrics=(folder / "export.json").read_text(),
        speed=(folder / "speed.csv").read_text(),
    )


# Promises about chance.


@pytest.mark.parametrize("n", [36, 1102])
def test_equal_models_seldom_fail(settings: Gate, n: int) -> None:
    assert simulate(settings, n, drop=0, pairs=100)[0] <= 5


@pytest.mark.parametrize("n", [36, 360])
def test_the_smallest_drop_that_is_printed_is_found_in_four_of_five(settings: Gate, n: int) -> None:
    drop = printed_drop(settings, n)
    assert drop is not None
    assert simulate(settings, n, drop, pairs=100)[1] == pytest.approx(80, abs=10)


def test_a_drop_of_five_points_fails(settings: Gate) -> None:
    assert simulate(settings, 1102, drop=0.05, pairs=50)[0] >= 45


# Floors.


def test_the_committed_results_reach_the_floors(sample: Results, compare: Callable) -> None:
    report = compare(sample, replace(sample, name="baseline"))
    assert (report.verdict, report.exit_code, report.warnings) == ("pass", 0, [])
    assert len(report.floors) == 5
    assert len(report.groups) > 50
    assert [row.ratio for row in report.costs] == [1] * 6


@pytest.mark.parametrize("value", ["absent", None, float("nan"), float("inf"), "0.99", True, -0.5])
@pytest.mark.parametrize("metric", ["accuracy", "recall_male", "f1", "ece"])
def test_a_metric_that_is_no_number_or_misses_its_floor_fails(
    settings: Gate, metric: str, value: object
) -> None:
    if (metric, value) == ("ece", -0.5):
        value = 0.5  # lower is better
    good = results(wrong_at(1, 2))
    metrics = {**good.metrics, metric: value}
    if value == "absent":
        del metrics[metric]
    report = alone(replace(good, metrics=metrics), settings)
    assert report.exit_code == 1
    assert [row.metric for row in report.floors if row.verdict == "fail"] == [metric]
    assert report.failures[0].startswith(metric)


def test_a_value_at_its_floor_reaches_it(settings: Gate) -> None:
    candidate = results(wrong_at(*range(28)))  # 372 of 400 are right
    floors = {"accuracy": AtLeast(at_least=0.93), "loss": AtMost(at_most=candidate.metrics["loss"])}
    report = alone(candidate, settings.model_copy(update={"floors": floors}))
    assert [row.verdict for row in report.floors] == ["pass"] * 2


def alone(candidate: Results, settings: Gate) -> Report:
    """Judge without a baseline: by floors alone."""
    why = ["there is no baseline"]
    return judge(candidate, None, settings, min_group_size=MIN_GROUP_SIZE, undecided=why)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"significance": "high"}, "gate.significance is not a number: high"),
        ({"significance": True}, "gate.significance is not a number: True"),
        ({"significance": math.nan}, "gate.significance is not a number: nan"),
        ({"significance": 7}, "significance: Input should be less than 1"),
        ({"test": "any"}, "gate.test is unknown: any"),
    ],
    ids=str,
)
def test_invalid_rules_of_the_baseline_are_named(settings: Gate, rules: dict, says: str) -> None:
    with pytest.raises(UserError, match=f"rules of the gate are invalid: {says}"):
        combine_rules(Rules(settings, MIN_GROUP_SIZE), {"gate": rules}, accept_change=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("test", ("difference", "noninferiority")),
        ("without_evidence", ("pass", "warn", "refuse_drops", "refuse")),
    ],
)
def test_of_two_words_the_stricter_applies(settings: Gate, name: str, words: tuple) -> None:
    for own, old in itertools.product(words, repeat=2):
        rules = Rules(settings.model_copy(update={name: own}), MIN_GROUP_SIZE)
        baseline = {"gate": settings.model_copy(update={name: old}).model_dump()}
        applied, _ = combine_rules(rules, baseline, accept_change=False)
        assert getattr(applied.gate, name) == max(own, old, key=words.index)


def test_other_groups_than_the_baselines_need_to_be_accepted(settings: Gate) -> None:
    own, old = Rules(settings, MIN_GROUP_SIZE, ["age"]), {"min_group_size": MIN_GROUP_SIZE}
    for groups, said in ((["hair"], "['hair']"), (None, "all columns")):
        baseline = {"gate": settings.model_dump(), "evaluate": {**old, "groups": groups}}
        rules, (note,) = combine_rules(own, baseline, accept_change=False)
        assert rules == replace(own, groups=groups)
        assert f"loosens the gate's rules: evaluate.groups from {said} to ['age']" in note
        rules, (note,) = combine_rules(own, baseline, accept_change=True)
        assert rules == own
        assert note.startswith("accepted: looser rules")
    baseline["evaluate"]["groups"] = ["hair"]
    _, (note,) = combine_rules(replace(own, groups=None), baseline, accept_change=True)
    assert note.endswith("evaluate.groups from ['hair'] to all columns")


def test_without_a_baseline_it_cannot_tell_but_floors_hold(settings: Gate) -> None:
    report = alone(results(wrong_at(1)), settings)
    assert (report.verdict, report.exit_code) == ("cannot tell", 2)
    assert list(report.undecided) == ["there is no baseline"]
    assert alone(results(wrong_at(*range(200))), settings).exit_code == 1


# Drops.


def test_one_image_passes_without_a_warning(sample: Results, compare: Callable) -> None:
    assert sample.predictions is not None
    right = sample.predictions["label"] == sample.predictions["predicted"]
    # Whichever image it is, of whatever small group.
    for place in np.flatnonzero(right.to_numpy())[::60]:
        worse = sample.predictions.copy()
        worse.loc[place, "predicted"] = 1 - worse.loc[place, "label"]
        worse.loc[place, "probability"] = 0.4 + 0.2 * int(worse.loc[place, "predicted"])
        report = compare(worse, replace(sample, name="baseline", costs={}))
        assert (report.verdict, report.warnings) == ("pass", [])
        assert list(report.flips["path"]) == [worse.loc[place, "path"]]
        assert not report.flips["right"].any()


@pytest.mark.parametrize("n", [24, 60])
def test_one_image_of_a_small_test_set_passes_without_a_warning(compare: Callable, n: int) -> None:
    report = compare(wrong_at(0, n=n), wrong_at(n=n))
    assert (report.verdict, report.warnings) == ("pass", [])


def test_a_significant_drop_fails(compare: Callable) -> None:
    report = compare(wrong_at(*range(24)), wrong_at(30))
    assert verdict(report, "accuracy") == "fail"
    assert report.exit_code == 1
    assert any("accuracy went from 0.9975 to 0.9400" in one for one in report.failures)
    # The other way round it is better.
    report = compare(wrong_at(30), wrong_at(*range(24)))
    assert (report.verdict, report.exit_code) == ("pass", 0)


def test_a_drop_beyond_the_tolerance_that_may_be_chance_warns(compare: Callable) -> None:
    # Six images of 400 net, of sixty on which the two differ.
    report = compare(wrong_at(*range(33)), wrong_at(*range(100, 127)))
    accuracy = report.comparisons[0]
    assert (accuracy.difference, accuracy.verdict) == (pytest.approx(-0.015), "warn")
    assert report.exit_code == 0 or {row.metric for row in report.floors if row.verdict == "fail"}
    assert any("may be chance" in one for one in report.warnings)


def test_a_drop_within_the_tolerance_passes_however_significant(compare: Callable) -> None:
    # Nine images of 1,000, none gained: p is 0.004.
    report = compare(wrong_at(*range(0, 18, 2), n=1000), wrong_at(n=1000))
    assert report.comparisons[0].p == pytest.approx(2 * 2 * 0.5**9)
    assert report.verdict == "pass"


def test_a_drop_of_one_class_fails_though_accuracy_may_not(compare: Callable) -> None:
    # Twelve women lost, as many men gained.
    report = compare(wrong_at(*range(0, 24, 2)), wrong_at(*range(1, 25, 2)))
    assert verdict(report, "accuracy") == "pass"
    assert verdict(report, "recall_female") == "fail"
    assert verdict(report, "recall_male") == "pass"
    assert report.exit_code == 1


def test_f1_and_calibration_only_warn(compare: Callable) -> None:
    good = wrong_at(1, 2)
    unsure = good.assign(probability=np.where(good["predicted"] == 1, 0.92, 0.08))
    report = compare(unsure, good)
    shares = ["accuracy", "recall_female", "recall_male", "f1", "roc_auc"]
    assert [row.metric for row in report.comparisons] == [*shares, "loss", "ece"]
    assert verdict(report, "ece") == "warn"
    # In each of two bins of 200 images |6 - 1| and |16 - 1|, of 400; no draw of 2,000 differs so.
    assert report.warnings == ["ece went from 0.0250 to 0.0750 on 400 images (p = 0.0005)"]
    assert (report.verdict, report.exit_code) == ("pass with warnings", 0)
    assert compare(good, unsure).warnings == []


@pytest.mark.parametrize(("n", "enough"), [(36, False), (400, False), (4000, True)])
def test_what_a_small_test_set_can_show_is_said_and_can_be_required(
    compare: Callable, n: int, enough: bool
) -> None:
    def run(choice: str, lost: int = 1) -> Report:
        rules = {"without_evidence": choice, "floors": {}}
        return compare(wrong_at(*range(lost), n=n), wrong_at(n - 1, n=n), rules)

    report = run("pass")
    assert report.evidence is not None
    assert report.evidence.enough == enough
    sentence = report.evidence.sentence
    # Not "show a drop", which reads as if there were one.
    found = "can detect a drop of accuracy of 0." if enough else "cannot detect a drop of accuracy "
    assert sentence.startswith(f"{n} images {found}")
    assert sentence in as_text(report)
    assert sentence in as_markdown(report).replace("&#126;", "~")
    assert (report.exit_code, report.warnings) == (0, [])
    warned = run("warn")
    assert (warned.exit_code, warned.warnings) == (0, [] if enough else [sentence])
    refused = run("refuse")
    assert refused.exit_code == (0 if enough else 3)
    assert refused.not_shown == ([] if enough else [sentence])
    assert enough or refused.verdict == "not enough evidence"
    assert len(refused.comparisons) == len(report.comparisons)
    content = json.loads(json.dumps(refused.to_json()))
    assert (content["evidence"]["n"], content["not_shown"]) == (n, refused.not_shown)
    # A failure stays one.
    assert run("refuse", lost=n // 4).exit_code == 1


@pytest.mark.parametrize(("n", "lost", "code"), [(36, 0, 0), (36, 5, 3), (360, 3, 0), (360, 6, 3)])
def test_a_drop_that_too_few_images_can_show_is_not_passed(
    compare: Callable, n: int, lost: int, code: int
) -> None:
    new, old = wrong_at(*range(lost), n=n), wrong_at(n=n)
    report = compare(new, old, {"without_evidence": "refuse_drops", "floors": {}})
    assert report.exit_code == code
    assert [one.startswith("accuracy fell by more") for one in report.not_shown] == [True] * (
        code > 0
    )
    assert compare(new, old, {"without_evidence": "pass", "floors": {}}).exit_code == 0


@pytest.mark.parametrize(
    ("n", "lost", "code"), [(36, 0, 3), (300, 0, 3), (4000, 0, 0), (4000, 35, 3), (4000, 90, 1)]
)
def test_noninferiority_passes_only_what_is_shown(
    compare: Callable, n: int, lost: int, code: int
) -> None:
    new, old = wrong_at(*range(lost), n=n), wrong_at(n=n)
    report = compare(new, old, {"test": "noninferiority", "floors": {}})
    assert report.exit_code == code
    judged = zip(report.comparisons[:3], (0.01, 0.02, 0.02), strict=True)
    shown = [row.low > -tolerance for row, tolerance in judged]
    assert len(report.not_shown) == shown.count(False)
    if code == 3:
        assert "Not enough evidence" in as_text(report)
        assert report.not_shown[0].startswith("it is not shown that accuracy drops by less than ")
    # The other form judges the drop that is shown.
    assert (compare(new, old).exit_code == 1) == (code == 1)


def test_the_images_that_a_recall_needs_follow_from_its_own_class(compare: Callable) -> None:
    new = wrong_at(0, 2, 4, n=360)  # all of them female
    report = compare(new, wrong_at(n=360), {"test": "noninferiority", "floors": {}})
    needed = [images_for_noninferiority(0.01, 3 / 360)]
    needed += [images_for_noninferiority(0.02, share) for share in (3 / 180, 0)]
    for sentence, n in zip(report.not_shown, needed, strict=True):
        assert f"of equally good models {n:,} such images" in sentence


@pytest.mark.parametrize(("tolerance", "differing"), [(0.01, 0.0), (0.01, 0.03), (0.05, 0.1)])
def test_as_many_images_as_it_names_show_noninferiority(tolerance: float, differing: float) -> None:
    n = images_for_noninferiority(tolerance, differing)
    assert n is not None
    rates = [differing / 2, differing / 2, 1 - differing]

    def share_shown(n: int) -> float:
        draws = np.random.default_rng(4).multinomial(n, rates, size=400).tolist()
        return float(np.mean([paired_interval(*won, n)[0] > -tolerance for *won, _ in draws]))

    assert share_shown(n) >= 0.76
    assert share_shown(n // 2) < 0.7
    assert images_for_noninferiority(0, differing) is None


# Groups.


def test_a_group_that_drops_fails_alone(compare: Callable) -> None:
    ages = np.where(np.arange(400) < 40, 25, 30 + np.arange(400) % 40)
    old = wrong_at(*range(100, 116), age=ages)
    new = wrong_at(*range(0, 16), age=ages)
    report = compare(new, old)
    assert verdict(report, "accuracy") == "pass"
    assert verdict(report, "age=20-29") == "fail"
    assert report.exit_code == 1


def test_small_groups_are_shown_with_a_caveat_and_not_judged(compare: Callable) -> None:
    country = np.where(np.arange(400) < 19, "few", "many")
    report = compare(
        wrong_at(*range(12), country=country), wrong_at(*range(100, 112), country=country)
    )
    (few,) = (row for row in report.groups if row.metric == "country=few")
    assert few.difference == pytest.approx(-12 / 19)
    assert few.p is None
    assert few.verdict == "info"
    assert few.note == "fewer than 20 images: not judged"
    assert few.note in as_text(report)
    assert few.note in as_markdown(report)


def test_many_groups_do_not_fail_by_their_number(compare: Callable) -> None:
    # One group in twenty loses six images and gains none: p is 0.03 for it alone.
    group = [f"group {place % 20}" for place in range(400)]
    gained = [place for place in range(400) if place % 20][:6]
    report = compare(wrong_at(*range(0, 120, 20), g=group), wrong_at(*gained, g=group))
    assert verdict(report, "g=group 0") == "warn"
    assert report.exit_code == 0


def test_metadata_that_disappears_is_told(compare: Callable) -> None:
    report = compare(wrong_at(1), wrong_at(1, age=np.arange(400)))
    assert report.warnings == ["the metadata no longer has age: the baseline's is used"]


@pytest.mark.parametrize("blank", [None, "other"])
def test_metadata_that_the_candidate_blanks_change_nothing(
    compare: Callable, blank: str | None
) -> None:
    ages = np.where(np.arange(400) < 40, 25, 30 + np.arange(400) % 40)
    old = wrong_at(*range(100, 116), age=ages)
    new = wrong_at(*range(0, 16), age=pd.Series(ages).astype(object).where(ages != 25, blank))
    report = compare(new, old)
    assert verdict(report, "age=20-29") == "fail"
    assert list(report.notes) == ["age changed for 40 images: the baseline's is used"]


def test_nuisance_columns_do_not_hide_a_loss_in_a_group_that_is_named(compare: Callable) -> None:
    # Without evaluate.groups Holm's method corrects for 125 groups.
    generator = np.random.default_rng(1)
    nuisance = {f"n{number}": generator.integers(0, 15, 400) for number in range(8)}
    columns = {"age": np.where(np.arange(400) < 50, "young", "old"), **nuisance}
    old, new = (wrong_at(*places, **columns) for places in (range(100, 109), range(9)))
    assert verdict(compare(new, old), "age=young") == "warn"
    report = compare(new, old, chosen=["age"])
    assert verdict(report, "age=young") == "fail"
    assert {row.metric for row in report.groups} == {"age=young", "age=old"}
    assert "not in evaluate.groups: n0, n1" in as_text(report)
    assert "not in evaluate.groups: n0, n1" in as_markdown(report)


def test_nuisance_columns_that_the_candidate_adds_do_not_hide_a_loss(compare: Callable) -> None:
    generator = np.random.default_rng(1)
    nuisance = {f"n{number}": generator.integers(0, 15, 400) for number in range(8)}
    age = np.where(np.arange(400) < 50, "young", "old")
    old, new = wrong_at(*range(100, 109), age=age), wrong_at(*range(9), age=age, **nuisance)
    report = compare(new, old)
    assert verdict(report, "age=young") == "fail"
    assert report.groups == compare(new[old.columns], old).groups
    assert report.notes[0].startswith("new in the metadata: n0, n1, n2, n3, n4, n5, n6, n7; groups")
    # Named, or where no group was judged before, they count.
    for named in (compare(new, old, chosen=["n0"]), compare(new, old.drop(columns="age"))):
        assert "n0=1" in {row.metric for row in named.groups}


def test_nuisance_columns_do_not_save_the_worst_group_of_another_test_set(
    compare: Callable,
) -> None:
    generator = np.random.default_rng(1)
    nuisance = {f"n{number}": generator.integers(0, 15, 400) for number in range(8)}
    age = np.where(np.arange(400) < 50, "young", "old")
    new = wrong_at(*range(11), age=age, **nuisance)  # of the 50 young
    fair, rules = new[20:], {"floors": {"worst_group": AtLeast(at_least=0.9)}}
    for chosen, expected in ((None, "fail"), (["age", *nuisance], "warn")):
        report = compare(
            new, fair.drop(columns=nuisance), rules, compared=results(fair), chosen=chosen
        )
        assert verdict(report, "worst_group") == expected


@pytest.mark.parametrize("chosen", [["hair"], ["age"], [["age", "hair"]]])
def test_groups_that_the_metadata_lack_are_left_out_and_named(
    compare: Callable, settings: Gate, chosen: list
) -> None:
    new, old = wrong_at(age=["a", "b"] * 200), wrong_at(hair=["c", "d"] * 200)
    new["sha256"] += " new"
    report = compare(new, old, chosen=chosen, accept_data_change=True)
    assert (report.exit_code, report.groups) == (0, [])
    left_out = "; ".join(report.left_out)
    for name, result in (("age", "baseline"), ("hair", "candidate")):
        said = f"the metadata lack {name}, which evaluate.groups names ({result})"
        assert (said in left_out) == (name in np.ravel(chosen))
    floor = settings.model_copy(update={"floors": {"worst_group": AtLeast(at_least=0.5)}})
    alone = judge(results(new), None, floor, min_group_size=20, chosen=["hair"])
    assert alone.failures == [
        "worst_group has no value (no group is large enough); it must be at least 0.5"
    ]


def test_a_loss_where_two_groups_meet_fails(compare: Callable) -> None:
    # Old women alone; of women and of the old it is too small a share.
    columns = {
        "age": np.where(np.arange(400) % 4 < 2, "young", "old"),
        "sex": np.where(np.arange(400) % 2 == 0, "female", "male"),
    }
    lost, gained = range(2, 62, 4), [*range(0, 32, 4), *range(3, 31, 4)]
    old, new = wrong_at(*gained, **columns), wrong_at(*lost, **columns)
    assert {row.verdict for row in compare(new, old, chosen=["age", "sex"]).groups} <= {
        "pass",
        "warn",
    }
    report = compare(new, old, chosen=["age", ["age", "sex"]])
    assert verdict(report, "age x sex=old, female") == "fail"


@pytest.mark.parametrize(("wrong", "expected"), [(2, "pass"), (7, "warn"), (20, "fail")])
def test_the_worst_group_has_a_floor(params: Params, wrong: int, expected: str) -> None:
    floor = AtLeast(at_least=0.9)
    settings = params.gate.model_copy(update={"floors": {"worst_group": floor}})
    country = np.where(np.arange(400) < 50, "few", "many")
    candidate = results(wrong_at(*range(wrong), country=country))
    report = alone(candidate, settings)
    assert report.floors[0].value == 1 - wrong / 50
    assert report.floors[0].verdict == expected
    assert "country=few, 50 images" in report.floors[0].note
    # In percent by mistake: no group can reach it.
    floors = {"worst_group": AtLeast(at_least=90)}
    report = alone(candidate, settings.model_copy(update={"floors": floors}))
    assert report.failures[0].endswith("; it must be at least 90")
    # Not by images that are too few to judge, of whom none is right.
    tiny = np.where(np.arange(400) < 19, "few", "many")
    report = alone(results(wrong_at(*range(19), country=tiny)), settings)
    assert (report.floors[0].value, report.floors[0].verdict) == (1, "pass")
    # No group: a floor that nothing can reach.
    assert alone(results(wrong_at()), settings).exit_code == 1


def test_a_floor_of_the_worst_group_names_the_group_that_decides(params: Params) -> None:
    settings = params.gate.model_copy(update={"floors": {"worst_group": AtLeast(at_least=0.9)}})
    country = np.where(np.arange(400) < 20, "few", "many")
    # Of the few 4 of 20 are wrong, which chance explains; of the many 57 of 380, which it does not.
    report = alone(results(wrong_at(*range(4), *range(20, 77), country=country)), settings)
    assert report.floors[0].value == 16 / 20
    assert report.failures == [
        "worst_group is 0.8000 (country=few, 20 images; significant is country=many with 0.8500, "
        "380 images); it must be at least 0.9"
    ]


@pytest.mark.parametrize("n", [36, 360, 1102])
def test_a_calibrated_model_seldom_fails_the_floor_of_calibration(params: Params, n: int) -> None:
    floor = AtMost(at_most=0.02)
    settings = params.gate.model_copy(update={"floors": {"ece": floor}, "bootstrap_samples": 200})
    generator = np.random.default_rng(9)
    verdicts = []
    for shift in (0.0, 0.4):
        for _ in range(100):
            probability = generator.beta(0.4, 0.4, n)
            table = wrong_at(n=n).assign(
                label=(generator.random(n) < probability).astype(int),
                probability=np.clip(probability + shift * (0.5 - probability), 0, 1),
            )
            table["predicted"] = (table["probability"] >= 0.5).astype(int)
            verdicts.append(alone(results(table), settings).floors[0].verdict)
    assert verdicts[:100].count("fail") <= 5
    # A model that is far off is found, given enough images.
    assert n < 360 or verdicts[100:].count("fail") >= 90


# Results that cannot be compared.


def relabelled(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    swapped = frame.copy()
    swapped.loc[: count - 1, "label"] = 1 - swapped.loc[: count - 1, "label"]
    swapped.loc[: count - 1, "predicted"] = 1 - swapped.loc[: count - 1, "predicted"]
    swapped.loc[: count - 1, "probability"] = 1 - swapped.loc[: count - 1, "probability"]
    return swapped


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda frame: frame[10:], "test sets differ: 390 images in candidate, 400 in baseline"),
        (lambda frame: frame.assign(sha256="new " + frame["sha256"]), "0 in both"),
        (lambda frame: relabelled(frame, 7), "labels differ: 7 of 400"),
        (lambda frame: relabelled(frame, 400), "label mapping differs"),
        (None, "no predictions of candidate"),
    ],
    ids=["smaller", "others", "relabelled", "mapping", "missing"],
)
def test_other_data_need_to_be_accepted(
    compare: Callable, change: Callable | None, says: str
) -> None:
    old = results(wrong_at(1, 2, 3), "baseline")
    assert old.predictions is not None
    new = (
        replace(old, name="candidate", predictions=None)
        if change is None
        else results(change(old.predictions))
    )
    report = compare(new, old)
    assert (report.exit_code, list(report.comparisons)) == (2, [])
    assert says in " ".join(report.undecided)
    text = as_text(report)
    assert says in text
    assert "candidate, not compared with baseline\n" in text
    shown = [title for title in ("Metrics", "Floors", "Groups", "Cost") if f"\n{title}" in text]
    assert shown == ["Floors"]
    accepted = compare(new, old, accept_data_change=True)
    assert accepted.exit_code == 0
    assert not accepted.paired
    assert "unpaired" in as_text(accepted)
    assert "prediction changed" in as_text(compare(old, old))
    assert "prediction changed" not in as_text(accepted)
    assert says in " ".join(accepted.warnings)


@pytest.mark.parametrize("confusion", [{}, None, {"female_as_female": "many"}], ids=str)
def test_without_counts_by_label_there_is_no_unpaired_comparison(
    compare: Callable, confusion: object
) -> None:
    new = results(wrong_at(1))
    old = Results("baseline", {**new.metrics, "confusion": confusion}, None, {})
    report = compare(new, old, accept_data_change=True)
    assert report.exit_code == 2
    assert report.undecided[0].startswith("the metrics have no confusion matrix")


def test_an_accepted_change_of_data_can_still_fail(compare: Callable) -> None:
    old, new = wrong_at(1), wrong_at(*range(30))
    new["sha256"] = "new " + new["sha256"]
    report = compare(new, old, accept_data_change=True)
    assert verdict(report, "accuracy") == "fail"
    assert report.exit_code == 1


def test_order_and_names_of_files_do_not_matter(compare: Callable) -> None:
    old = wrong_at(1, 2)
    new = old.sample(frac=1, random_state=0).assign(path=lambda frame: "moved/" + frame["path"])
    report = compare(new, old)
    assert (report.verdict, len(report.flips), report.comparisons[0].p) == ("pass", 0, 1)


def test_copies_of_an_image_are_paired(compare: Callable) -> None:
    old = wrong_at(1, 2)
    old["sha256"] = [f"{place // 4}-{place % 2}" for place in range(400)]
    report = compare(old[::-1], old)
    assert (report.verdict, len(report.flips), report.comparisons[0].n) == ("pass", 0, 400)


@pytest.mark.parametrize("metric", METRICS)
def test_one_metric_of_another_evaluation_decides_nothing(compare: Callable, metric: str) -> None:
    good = results(wrong_at(1, 2))
    value = good.metrics[metric]
    mixed = replace(good, metrics={**good.metrics, metric: value + 2e-6})
    for accept in (False, True):
        report = compare(mixed, good, accept_data_change=accept)
        assert (report.exit_code, len(report.undecided)) == (2, 1)
        assert f"report {metric} {value:.4f} on 400 images" in report.undecided[0]
        assert "different evaluations" in report.undecided[0]


def test_the_first_champion_is_excused_for_having_none_before_it_alone(
    tmp_path: Path, params: Params
) -> None:
    settings = params.gate.model_copy(update={"floors": {}})
    for name in ("test.json", "predictions.csv"):
        shutil.copy(ROOT / "metrics" / name, tmp_path)
    params = params.model_copy(update={"gate": settings})
    alone = judge_promotion(ROOT, tmp_path, None, params, champion_model=Path)
    assert may_be_champion(alone)
    metrics = json.loads((tmp_path / "test.json").read_text())
    (tmp_path / "test.json").write_text(json.dumps(metrics | {"accuracy": 0.999}))
    report = judge_promotion(ROOT, tmp_path, None, params, champion_model=Path)
    assert (report.exit_code, report.failures) == (2, [])
    assert not may_be_champion(report)
    lacking = replace(alone, unproven=["too few images"])
    assert not may_be_champion(replace(alone, reference=lacking))


# Cost.


def test_costs_warn_beyond_their_tolerance(compare: Callable) -> None:
    frame = wrong_at(1)
    costs = {"size_float32_bytes": 100, "latency_int8_ms": 1, "training_images_per_second": 100}
    old = results(frame, "baseline", **costs)
    report = compare(results(frame, **costs), old)
    assert report.verdict == "pass"
    assert {row.ratio for row in report.costs} == {1}
    worse = {"size_float32_bytes": 120, "latency_int8_ms": 2, "training_images_per_second": 50}
    report = compare(results(frame, **worse), old)
    assert [row.verdict for row in report.costs] == ["warn"] * 3
    assert report.warnings[0] == "size_float32_bytes is 1.20 times the baseline (limit 1.1)"
    assert (report.verdict, report.exit_code) == ("pass with warnings", 0)
    limit = {"size_float32_bytes": 110, "latency_int8_ms": 1.5, "training_images_per_second": 67}
    assert compare(results(frame, **limit), old).verdict == "pass"
    # Cheaper is no reason to warn, and what is not recorded is not compared.
    cheaper = {"size_float32_bytes": 10, "latency_int8_ms": 0.1}
    report = compare(results(frame, **cheaper), old)
    assert [row.verdict for row in report.costs] == ["pass", "pass", "info"]
    assert as_text(report).splitlines()[-1].split()[1:] == ["100", *["unknown"] * 2, "info"]


# The report.


def test_markdown_shows_old_and_new_and_what_flipped(compare: Callable) -> None:
    report = compare(wrong_at(*range(24)), wrong_at(30))
    text = as_markdown(report)
    assert text.startswith("## Gate: fail\n")
    line = next(line for line in text.splitlines() if line.startswith("| accuracy "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    low, high = paired_interval(1, 24, 400)
    # p is 2 * (C(25,0) + C(25,1)) / 2^25, times the two questions.
    assert cells == [
        *("accuracy", "400", "0.9975", "0.9400", "-0.0575"),
        *(f"{low:+.4f} to {high:+.4f}", "3.1e-06", "fail"),
    ]
    assert "Images whose prediction changed: 25, 1 of them now right" in text
    assert "| <code>faces/0000.png</code> | female" in text
    assert "0.0300 " in text


def test_names_from_the_data_cannot_break_the_markdown(compare: Callable) -> None:
    old = wrong_at()
    evil = "a|b`</details><script>@someone [x](http://y)\n# *_\\ 'it's \"so\"'"
    old.loc[0, "path"] = evil
    new = old.copy()
    new.loc[0, ["predicted", "probability"]] = [1, 0.9]
    text = as_markdown(compare(new, old))
    (line,) = (line for line in text.splitlines() if "someone" in line)
    assert line.count("|") == 6
    assert not any(mark in line for mark in ("<script", "</details", "@", "`", "[x]", "*"))
    assert html.unescape(line).count(" ".join(evil.split())) == 1


def test_a_long_list_is_cut_and_says_so(compare: Callable) -> None:
    report = compare(wrong_at(*range(80)), wrong_at())
    assert "and 30 more" in as_markdown(report)
    assert len(report.to_json()["flips"]) == 80


def test_json_has_it_all_and_no_nan(compare: Callable, settings: Gate) -> None:
    ages = 18 + np.arange(400) % 60
    new = results(wrong_at(*range(24), age=ages), latency_int8_ms=1)
    old = results(wrong_at(30, age=ages), "baseline", latency_int8_ms=math.nan)
    cost = settings.cost.model_copy(update={"max_time_ratio": math.inf})
    report = compare(new, old, {"cost": cost})
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["verdict"] == "fail"
    assert content["exit_code"] == 1
    assert content["comparisons"][0]["metric"] == "accuracy"
    assert content["flips"][0]["path"] == "faces/0000.png"
    assert content["groups"]
    assert (content["costs"][0]["old"], content["costs"][0]["limit"]) == (None, None)


# Statistics, against what others compute.


def test_mcnemar_counts_only_where_the_models_differ() -> None:
    # 1 gained and 7 lost: 2 * (C(8,0) + C(8,1)) / 2^8
    old, new = np.ones(100, dtype=bool), np.ones(100, dtype=bool)
    old[0] = new[1:8] = False
    found = paired_difference(old, new)
    assert found.p == pytest.approx(2 * 9 / 256)
    assert found.difference == pytest.approx(-0.06)
    assert paired_difference(old, old).p == 1


def models() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, and P(male) by two models that see much the same."""
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 2, 300)
    logits = 3 * (labels - 0.5) + generator.normal(0, 1, 300)
    old, new = (1 / (1 + np.exp(-logits - generator.normal(0, 0.7, 300))) for _ in range(2))
    return labels, old, new


def test_the_interval_of_f1_agrees_with_scipys_paired_bootstrap() -> None:
    labels, *probabilities = models()
    old, new = ((one > 0.5).astype(int) for one in probabilities)

    def f1(labels: np.ndarray, guess: np.ndarray) -> float:
        return 2 * (labels * guess).sum() / (labels.sum() + guess.sum())

    found = bootstrap(
        (labels, old, new),
        lambda y, a, b: f1(y, b) - f1(y, a),
        paired=True,
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        rng=1,
    )
    ours = paired_f1_interval(labels, old, new)
    assert ours == pytest.approx(tuple(found.confidence_interval), abs=0.005)


def test_the_calibration_error_has_the_p_of_scipys_permutation_test() -> None:
    labels, old, new = models()
    worse = old**2 / (old**2 + (1 - old) ** 2)  # twice the logit
    error = METRICS["ece"].compute

    def difference(one: np.ndarray, other: np.ndarray) -> float:
        return (error(labels, other, labels) or 0) - (error(labels, one, labels) or 0)

    for candidate in (new, worse):
        theirs = permutation_test(
            (old, candidate), difference, permutation_type="samples", n_resamples=1000, rng=1
        ).pvalue
        ours = paired_ece_p(labels, old, candidate, Resampling(1000, 0))
        assert ours == pytest.approx(theirs, abs=0.04)
    assert paired_ece_p(labels, old, old, Resampling(50, 0)) == 1
    assert paired_ece_p(labels, old, worse, Resampling(1000, 0)) < 0.05


def test_unpaired_differences_are_wider_than_paired_ones() -> None:
    labels, old, new = models()
    old_right, new_right = ((one > 0.5) == labels for one in (old, new))
    paired = paired_difference(old_right, new_right)
    counts = [(int(right.sum()), len(right)) for right in (old_right, new_right)]
    unpaired = unpaired_difference(*counts)
    assert unpaired.difference == pytest.approx(paired.difference)
    assert unpaired.high - unpaired.low > paired.high - paired.low
    assert unpaired_difference((9, 10), (1, 10)).high < 0


def test_a_paired_interval_is_that_of_the_score_test() -> None:
    # No image tells the models apart: z^2 / (n + z^2), as Wilson's for 0 of n.
    low, high = paired_interval(0, 0, 36)
    assert (low, high) == pytest.approx(
        (-high, binomtest(0, 36).proportion_ci(method="wilson").high)
    )
    assert paired_interval(3, 9, 50) == pytest.approx(
        tuple(-bound for bound in reversed(paired_interval(9, 3, 50)))
    )
    assert paired_interval(0, 20, 20)[0] == -1
    assert paired_interval(20, 0, 20)[1] == 1


def test_holm_adjusts_by_rank() -> None:
    assert holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm([]) == []
