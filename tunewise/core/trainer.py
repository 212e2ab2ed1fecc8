"""The events of a run, fired from `transformers.Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .handle import Handle

__all__ = ["trainer_callback"]


def trainer_callback(handle: Handle) -> Any:
    """A `transformers.TrainerCallback`: steps through the optimizer's hooks, epochs and the end by Trainer's events."""
    from transformers import TrainerCallback

    class Events(TrainerCallback):
        """Tunewise's events inside transformers.Trainer."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"]
            handle.watch(getattr(optimizer, "optimizer", optimizer))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert handle.run is not None
            handle.run.fire("boundary", "epoch")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert handle.run is not None
            handle.run.fire("finish")

    return Events()
