"""Distillation: models, texts and files. `python -m cot2align.train --help` lists the commands."""
