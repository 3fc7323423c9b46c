"""What happens beside a run's steps: its progress bar, its log, its end on a signal."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from types import FrameType

from transformers import ProgressCallback, TrainerCallback

METRICS_FILE = "metrics.jsonl"
SHOWN_PARTS = ("loss", "ce", "kd", "ot", "eval_loss")


class Progress(ProgressCallback):
    """Trainer's progress bar, with the parts of the loss on it instead of whole log entries.

    As a context manager it closes the bar of a run that stops, before anything else is printed.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        if self.training_bar is not None:
            self.training_bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        """Show the last values of SHOWN_PARTS."""
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: f"{logs[name]:.4g}" for name in SHOWN_PARTS if name in logs}
            if shown:
                self.training_bar.set_postfix(shown)


class MetricsFile(TrainerCallback):
    """Writes every log entry to metrics.jsonl; a resumed run first drops what came after its
    checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Begin with the entries of the checkpoint, none in a new run."""
        if state.is_world_process_zero:
            lines = [json.dumps(entry) + "\n" for entry in state.log_history]
            Path(args.output_dir, METRICS_FILE).write_text("".join(lines), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        """Append one entry."""
        if state.is_world_process_zero:
            with Path(args.output_dir, METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class Termination(TrainerCallback):
    """Lets the step end that a SIGTERM comes in, and saves. A context manager around training.

    requested: this process got the signal; agreed: some process did, known to all of them.
    """

    requested = False
    agreed = False

    def __enter__(self) -> None:
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._request)

    def __exit__(self, *exception: object) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Ask for a checkpoint and for the end."""
        if self.agreed:
            control.should_log = control.should_save = control.should_training_stop = True


class LogCheckpoints(TrainerCallback):
    """Logs the last step and every checkpoint's: a resumed run begins where a log entry ends."""

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Ask for a log entry where Trainer's own schedule has none."""
        if state.global_step >= state.max_steps or state.global_step % args.save_steps == 0:
            control.should_log = True
