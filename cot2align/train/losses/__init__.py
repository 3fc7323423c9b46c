"""The terms of the objective: TokenStates in; a scalar, its parts and its metrics out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KDLoss(NamedTuple):
    """L_KD as a sum over a batch's positions: `total`, connected; what it consists of, by name,
    detached; metrics name -> [sum, count], to be averaged."""

    total: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, Tensor]
