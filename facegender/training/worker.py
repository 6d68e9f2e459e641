"""A worker of a training on several machines: it computes its share and writes nothing."""

from pathlib import Path

from pydantic import ValidationError

from facegender.data.processed import ProcessedSplit
from facegender.params import Params
from facegender.training.checkpoints import Checkpoint, inputs_digest
from facegender.training.rendezvous import WorkerGroup, join_chief
from facegender.training.strategy import open_strategy
from facegender.training.train import new_network, train_network


def run_worker(cluster: WorkerGroup, processed: Path, wait: float) -> int:
    """Train with the other workers; the chief runs the pipeline.

    Args:
        cluster: worker group in which this process is a worker, not the chief.
        processed: directory of the processed data.
        wait: seconds within which the chief must send the job.

    Returns:
        The number of epochs of the training.

    Raises:
        UserError: the chief or another worker is missing or gone, or has other data or code.
    """
    train, validation = (ProcessedSplit(processed / name) for name in ("train", "validation"))

    def digest(text: str) -> str:
        try:
            return inputs_digest(Params.model_validate_json(text), [train, validation])
        except ValidationError:
            # Not a digest, so the chief refuses this worker, whose code is another version.
            return "none: this code does not know the parameters"

    job = join_chief(cluster, digest, wait)
    params = Params.model_validate_json(job.params)
    with open_strategy("multi_worker", wait) as strategy:
        result = train_network(
            new_network(params, strategy),
            train,
            validation,
            params.train,
            strategy=strategy,
            checkpoint=Checkpoint.received(job.checkpoint),
        )
    return len(result.history)
