"""Training on several devices or machines: who takes part, and who computes which share of a batch.

`tf.distribute` gives each device the whole network and a share of each batch, and sums the
gradients. Keras' `fit` fails with MultiWorkerMirroredStrategy (keras-team/keras issue 20585)
without the preparations in `facegender.training.train`; docs/scaling-training.md has the evidence.
"""

import faulthandler
import gc
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from facegender.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

_LOST = (
    "A worker is gone or does not answer, so the training stopped: {reason}. Worker 0 has saved "
    "the last complete epoch. To resume after it, start the other workers again with `facegender "
    "worker`, and worker 0 with `dvc repro`."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """The part of each batch that one process computes: `count` of `of` pieces.

    Attributes:
        first: index of the first piece.
        count: number of pieces, one per device.
        of: number of pieces in the whole batch.
    """

    first: int = 0
    count: int = 1
    of: int = 1


WHOLE = Share()


def distribute(
    strategy: "tf.distribute.Strategy", make: "Callable[[Share], tf.data.Dataset]"
) -> "tf.data.Dataset | tf.distribute.DistributedDataset":
    """Return the dataset that a strategy trains on; each process makes only its own share."""
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return make(WHOLE)

    def own(context: "tf.distribute.InputContext") -> "tf.data.Dataset":
        count = replicas // context.num_input_pipelines
        return make(Share(context.input_pipeline_id * count, count, replicas))

    return strategy.distribute_datasets_from_function(own)


@contextmanager
def open_strategy(name: str, wait: float) -> "Iterator[tf.distribute.Strategy]":
    """Yield the strategy that `train.strategy` names; call it before any other use of TensorFlow.

    Args:
        name: `none`, `mirrored` (all devices of this machine), or `multi_worker` (of TF_CONFIG).
        wait: seconds within which all workers must join TensorFlow's cluster, or the process ends.

    Raises:
        UserError: in the body, a worker is gone.
    """
    import tensorflow as tf

    if name == "none":
        yield tf.distribute.get_strategy()
    elif name == "mirrored":
        strategy = tf.distribute.MirroredStrategy()
        if strategy.num_replicas_in_sync == 1:
            _log.warning("train.strategy: mirrored finds only one device, so it gains nothing")
        yield strategy
    else:
        # TensorFlow waits in C++ for up to an hour and ignores signals. A worker that dies before
        # the cluster forms must not hang the others.
        faulthandler.dump_traceback_later(wait, exit=True, file=2)
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
            faulthandler.cancel_dump_traceback_later()
            yield strategy
        except tf.errors.OpError as error:
            if not _is_lost_worker(error):
                raise
            _free_frames(error)
            raise UserError(_LOST.format(reason=_first_reason(error))) from error
        finally:
            faulthandler.cancel_dump_traceback_later()


def _free_frames(error: BaseException | None) -> None:
    # The error's frames hold a thread pool that TensorFlow did not close. If it lives until the
    # process ends, it prints a traceback. Keras removed TensorFlow's own frames from the traceback,
    # but the frames that they called remain and hold them. The pool is also in a cycle.
    while error is not None:
        for inner, _ in traceback.walk_tb(error.__traceback__):
            for frame, _ in traceback.walk_stack(inner):
                with suppress(RuntimeError):  # the frame is still running
                    frame.clear()
        error = error.__context__
    gc.collect()


def _is_lost_worker(error: Exception) -> bool:
    text = str(error)
    return "Collective ops is aborted" in text or "CoordinationService" in text


def _first_reason(error: Exception) -> str:
    text = str(error).partition("Collective ops is aborted by: ")[2] or str(error)
    for rest in ("Additional GRPC error", "The tasks have crashed", "The error could be"):
        text = text.partition(rest)[0]
    return " ".join(text.split())[:300].rstrip(". ")
