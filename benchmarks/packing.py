"""Training without padding against padding to the longest text and to 512 tokens:

    python -m benchmarks.packing [FILE] [--rows N] [--repeats N] [--layers N] [--width N]

A GPT-2-shaped model is trained on the standard and chain-of-thought texts of rows; a step is
forward and backward of the cross entropy. FILE is a JSON Lines file of rows; without one the texts
have random tokens and the lengths that Dolly's have in the prompts of the paper, by GPT-2's
tokenizer: see LENGTHS. The ways take turns on the same batches. Only tokens of texts are counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cot2align.train.data import Text, model_batch
from cot2align.train.losses.cross_entropy import cross_entropy
from cot2align.train.token_states import token_states

MAX_LENGTH = 512
VOCABULARY = 8192
