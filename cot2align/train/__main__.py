"""The command line: `python -m cot2align.train COMMAND [FILE] [--key value]...`.

A command is a config class and a `run(config)`, each imported only when it is asked for, so that
`--help` needs no torch. A user's mistake, or a disk that takes no more, is one line on stderr and
exit code 2, never a traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cot2align.train.config import UserError, nearest, parse_command_line
from cot2align.train.files import refused_write

# command: (what it does, module and class of its config, module of its run)
COMMANDS = {
    "prepare": ("make rows from a published data set", "config:PrepareConfig", "prepare"),
    "sft": ("fine-tune a model", "config:SFTConfig", "trainer"),
    "augment": ("let the teacher write a rationale per row", "config:AugmentConfig", "augment"),
    "check": ("what a run needs, before it is paid for", "config:CheckConfig", "check"),
    "cache": ("write a teacher's states, for distill", "config:CacheConfig", "teacher"),
    "distill": ("train a student from a teacher", "config:DistillConfig", "trainer"),
    "evaluate": ("generate for test rows and score", "config:EvaluateConfig", "evaluate"),
    "judge": ("let a language model compare two systems", "config:JudgeConfig", "judge"),
    "run": ("a whole study from one recipe, to one table", "config:RecipeConfig", "study"),
    "new-model": ("an untrained small model from rows", "config:NewModelConfig", "new_model"),
    "demo": ("the whole chain on generated data", "demo:DemoConfig", "demo"),
}
TRAININGS = ("sft", "distill")
PROG = "python -m cot2align.train"
INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    config: Any = None
    # bitsandbytes warns at every product of 8-bit weights, and of an extra package when imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_usage())
            return 0 if argv else 2
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}")
        processes = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else None
        if argv[0] not in TRAININGS and int(processes or 1) > 1:
            raise UserError(
                f"{argv[0]} runs in one process, WORLD_SIZE is {processes}; only sft and distill "
                "take several"
            )
        config = parse_command_line(config_class(argv[0]), f"{PROG} {argv[0]}", argv[1:])
        run_module(argv[0]).run(config)
    except UserError as error:
        if _while_interrupted(error):
            return _interrupted()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception as error:
        if _while_interrupted(error):
            return _interrupted()
        reason = refused_write(error)
        if reason is None:
            raise
        file = getattr(error, "filename", None) or getattr(config, "output", "output")
        # On a line of its own, after a progress bar that was cut short.
        print(f"\nerror: {file}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as exit_:  # argparse's --help
        return int(exit_.code or 0)
    return 0


def _while_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C led to an error, as where a half-written checkpoint cannot be closed."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


def config_class(command: str) -> Any:
    """The dataclass of a command's settings."""
    module, name = COMMANDS[command][1].split(":")
    return getattr(importlib.import_module(f"cot2align.train.{module}"), name)


def run_module(command: str) -> Any:
    """The module whose `run(config)` is the command."""
    with interrupt_ends_process():
        return importlib.import_module(f"cot2align.train.{COMMANDS[command][2]}")


def interrupt_ends_process() -> contextlib.AbstractContextManager[None]:
    """Ctrl-C while libraries are imported: an exception would leave half-made modules behind, some
    libraries turn it into others, and nothing is open that it would have to close."""

    def leave(number: int, frame: Any) -> None:
        sys.stdout.flush()
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    # By nohup, or a shell's background job.
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return contextlib.nullcontext() if is_ignored else handled(signal.SIGINT, leave)


@contextlib.contextmanager
def handled(number: int, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """The handler of a signal, for a while; only the main thread can have one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


def _usage() -> str:
    lines = [f"usage: {PROG} COMMAND [FILE] [--key value]...", "", "commands:"]
    lines += [f"  {name:<10}{what}" for name, (what, _, _) in COMMANDS.items()]
    return "\n".join([*lines, "", f"{PROG} COMMAND --help lists a command's settings."])


if __name__ == "__main__":
    code = main()
    # A second Ctrl-C has nothing left to stop, and would only show a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
