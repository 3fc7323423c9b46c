"""CoT2Align: distil a language model into one with another tokenizer by optimal transport.

The names below are resolved on first use, so that importing the package (and the command line's
``--help``) does not load PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cot2align.kernels.ot_loss import OTLoss as OTLoss
    from cot2align.kernels.ot_loss import fused_ot_loss as fused_ot_loss
    from cot2align.kernels.ot_loss import fused_ot_loss_varlen as fused_ot_loss_varlen
    from cot2align.kernels.ot_loss import sinkhorn_plan as sinkhorn_plan
    from cot2align.kernels.reference import OTPlan as OTPlan

_HOME = {
    "OTLoss": "cot2align.kernels.ot_loss",
    "fused_ot_loss": "cot2align.kernels.ot_loss",
    "fused_ot_loss_varlen": "cot2align.kernels.ot_loss",
    "sinkhorn_plan": "cot2align.kernels.ot_loss",
    "OTPlan": "cot2align.kernels.reference",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
