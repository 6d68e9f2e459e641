"""Training on several devices or machines: who takes part, and which share of a batch is whose.

The engine is `tf.distribute`: each device holds the whole network and computes a share of each
batch, and the gradients are summed. Keras' `fit` does not take MultiWorkerMirroredStrategy as it
comes (keras-team/keras issue 20585); with what `facegender.training.train` does for it, it does.
docs/scaling-training.md tells which, and how that was found out.
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
    "A worker is gone, or does not answer, so the training stopped: {reason}. Worker 0 keeps each "
    "epoch that ended. Start the other workers again with `facegender worker`, and worker 0 with "
    "`dvc repro`: training goes on after the last epoch."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """The part of each batch that the devices of one process compute: `count` of `of` pieces.

    Attributes:
        first: the number of the first piece, from 0.
        count: pieces, one a device.
        of: pieces that the whole batch is cut into.
    """

    first: int = 0
    count: int = 1
    of: int = 1


WHOLE = Share()


def distribute(
    strategy: "tf.distribute.Strategy", make: "Callable[[Share], tf.data.Dataset]"
) -> "tf.data.Dataset | tf.distribute.DistributedDataset":
    """Return the dataset that a strategy trains on: each process makes its own share alone."""
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return make(WHOLE)

    def own(context: "tf.distribute.InputContext") -> "tf.data.Dataset":
        count = replicas // context.num_input_pipelines
        return make(Share(context.input_pipeline_id * count, count, replicas))

    return strategy.distribute_datasets_from_function(own)


@contextmanager
def open_strategy(name: str, wait: float) -> "Iterator[tf.distribute.Strategy]":
    """Yield the strategy that `train.strategy` names; make it before anything else of TensorFlow.

    Args:
        name: `none`, `mirrored` (all devices of this machine), or `multi_worker` (of TF_CONFIG).
        wait: seconds in which all workers must be in TensorFlow's cluster, or the process ends.

    Raises:
        UserError: in the body, a worker is gone.
    """
    import tensorflow as tf

    if name == "none":
        # TensorFlow's default, which does nothing.
        yield tf.distribute.get_strategy()
    elif name == "mirrored":
        strategy = tf.distribute.MirroredStrategy()
        if strategy.num_replicas_in_sync == 1:
            _log.warning("train.strategy: mirrored finds one device, and gains nothing")
        yield strategy
    else:
        # TensorFlow waits in C++, for up to an hour, deaf to signals. Who came to the meeting
        # and died before the cluster stood must not hang the others.
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
    # They hold a pool of threads that TensorFlow did not close, which, if it lives until the
    # process ends, complains then with a traceback. Keras took TensorFlow's own frames out of the
    # error's traceback, but those that they called are there, and hold them. The pool is in a
    # cycle, too.
    while error is not None:
        for inner, _ in traceback.walk_tb(error.__traceback__):
            for frame, _ in traceback.walk_stack(inner):
                with suppress(RuntimeError):  # it still runs
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
