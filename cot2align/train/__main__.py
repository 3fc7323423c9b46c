"""The command line: `python -m cot2align.train COMMAND --config FILE [--key value]...`.

A command is a config class and a `run(config)`, each imported only when it is asked for, so that
`--help` needs no torch. A user's mistake is one line on stderr and exit code 2, never a traceback.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cot2align.train.config import UserError, nearest, parse_command_line

# command: (what it does, module and class of its config, module of its run)
COMMANDS = {
    "sft": ("fine-tune a model", "config:SFTConfig", "trainer"),
    "augment": ("let the teacher write a rationale per row", "config:AugmentConfig", "augment"),
    "check": ("what a run needs, before it is paid for", "config:CheckConfig", "check"),
    "cache": ("write a teacher's states, for distill", "config:CacheConfig", "teacher"),
    "distill": ("train a student from a teacher", "config:DistillConfig", "trainer"),
    "evaluate": ("generate for test rows and score", "config:EvaluateConfig", "evaluate"),
    "demo": ("the whole chain on generated data", "demo:DemoConfig", "demo"),
}
PROG = "python -m cot2align.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_usage())
            return 0 if argv else 2
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}")
        _, config_class, run_module = COMMANDS[argv[0]]
        config_module, class_name = config_class.split(":")
        cls = getattr(importlib.import_module(f"cot2align.train.{config_module}"), class_name)
        config = parse_command_line(cls, f"{PROG} {argv[0]}", argv[1:])
        importlib.import_module(f"cot2align.train.{run_module}").run(config)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as exit_:  # argparse's --help
        return int(exit_.code or 0)
    return 0


def _usage() -> str:
    lines = [f"usage: {PROG} COMMAND --config FILE [--key value]...", "", "commands:"]
    lines += [f"  {name:<10}{what}" for name, (what, _, _) in COMMANDS.items()]
    return "\n".join([*lines, "", f"{PROG} COMMAND --help lists a command's settings."])


if __name__ == "__main__":
    sys.exit(main())
