"""Whether a run's model may become the champion: its results against the champion's."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from facegender.errors import UserError
from facegender.gate.compare import (
    add_reference,
    judge_on_the_same_images,
    merge_base,
    parse_results,
    paths_of,
    read_params,
    rescore_commit,
    rescore_work_tree,
)
from facegender.gate.pairing import Results
from facegender.gate.rescoring import Rescored, StoredModel, images_seen
from facegender.gate.stricter_rules import Rules, combine_rules
from facegender.gate.verdict import Report
from facegender.params import Gate, Params
from facegender.runtime.git import resolve

NO_CHAMPION = "there is no champion to compare with"


def judge_promotion(
    root: Path,
    candidate: Path,
    champion: Path | None,
    params: Params,
    *,
    champion_model: Callable[[Path], Path],
    champion_commit: str | None = None,
    champion_manifests: Collection[str] = (),
    manifests: Collection[str] = (),
    accept_rule_change: bool = False,
) -> Report:
    """Judge a run's results against the champion's.

    The strictest rules of the work tree, HEAD, the merge base with main and the champion's commit
    apply.

    Args:
        candidate: folder with `test.json` and, optionally, `predictions.csv` and `export.json`.
        champion: the same for the champion; None if the floors alone count.
        champion_model: function that fetches the champion's `.tflite` file into a folder.
        champion_commit: commit that the champion's run records, or None.
        champion_manifests: beginnings of the SHA-256 of the manifests that its run records.
        manifests: the same for the candidate's run.
        accept_rule_change: whether the work tree's rules apply even where they are looser.

    Raises:
        UserError: a file is not what its stage writes.
    """
    rules = Rules(params.gate, params.evaluate.min_group_size, params.evaluate.groups)
    notes: list[str] = []
    undecided = [NO_CHAMPION] if champion is None else []
    try:
        sources = {resolve(root, "HEAD"): "HEAD"}
        if base := merge_base(root):
            sources.setdefault(base, "the merge base with main")
        if champion is not None:
            try:
                sources.setdefault(resolve(root, champion_commit or ""), "the champion")
            except UserError:
                notes.append(
                    f"the champion's commit, {champion_commit or 'not recorded'}, is not in this "
                    "clone: its rules cannot be read; those of HEAD apply"
                )
        for commit, name in sources.items():
            rules, changes = combine_rules(
                rules, read_params(root, commit), accept_change=accept_rule_change
            )
            notes += [f"against the rules of {name} ({commit[:10]}): {one}" for one in changes]
    except UserError as error:
        undecided.append(f"the committed rules cannot be read: {error}")
    results = _read_folder(candidate, "the run")

    def rescored(against: Results | None, significance: float) -> Rescored:
        if against is None or against.commit:  # the reference
            return rescore_commit(root, results, against, significance, manifests)
        try:
            commit = resolve(root, champion_commit or "")
            paths = paths_of(root, commit, "the champion")
            seen, unknown = images_seen(root, commit, paths, champion_manifests), ""
        except UserError as error:
            seen, unknown = None, str(error)
        with TemporaryDirectory() as folder:
            path = champion_model(Path(folder))
            stored = StoredModel(path, params.evaluate.threshold, seen, unknown)
            return rescore_work_tree(root, results, against, stored, significance, manifests)

    def judged(against: Results | None, gate: Gate, why: Sequence[str]) -> Report:
        return judge_on_the_same_images(
            results,
            against,
            gate,
            lambda: rescored(against, gate.significance),
            min_group_size=rules.min_group_size,
            chosen=rules.groups,
            undecided=why,
            notes=notes if gate is rules.gate else [],
        )

    former = None if champion is None else _read_folder(champion, "the champion")
    return add_reference(judged(former, rules.gate, undecided), root, rules.gate, judged)


def may_be_champion(report: Report) -> bool:
    """Return whether a report of `judge_promotion` allows promotion.

    The first champion is excused from a comparison with a champion, and from nothing else.
    """
    others = report.failures or report.not_shown
    alone = list(report.undecided) == [NO_CHAMPION] and not others
    return alone or report.exit_code == 0


def _read_folder(folder: Path, name: str) -> Results:
    predictions, export = folder / "predictions.csv", folder / "export.json"
    return parse_results(
        name,
        (folder / "test.json").read_text(encoding="utf-8"),
        predictions=predictions.read_text(encoding="utf-8") if predictions.is_file() else None,
        export_metrics=export.read_text(encoding="utf-8") if export.is_file() else None,
    )
