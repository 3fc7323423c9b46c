"""Distillation: models, texts and files. `python -m cot2align.train --help` lists the commands."""

import logging

# peft imports bitsandbytes wherever it is installed, which then warns of a kernel from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
