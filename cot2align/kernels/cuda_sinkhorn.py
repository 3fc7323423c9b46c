"""The cluster-resident CUDA kernel of csrc/sinkhorn.cu, on tensors.

It takes problems of medium size on GPUs of compute capability 9 and 10, whose thread-block clusters
hold a whole matrix on the chip; `fits` says what it takes. It goes from the similarity to the loss
and dL/dS, without a synchronisation of the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cot2align.kernels.native import _native, missing

GRADIENTS = ("none", "unrolled", "implicit", "detached")
MAJORS = (9, 10)  # of the compute capabilities that it is written for


def fits(max_n: int, max_m: int, capability: tuple[int, int]) -> str | None:
    """None where the kernel solves problems of at most max_n rows and max_m columns on a GPU of
    this compute capability, else the reason why not."""
    if _native is None:
        return missing()
    archs = _native.build_info()["cuda_archs"].split()
    if not archs:
        return "the native module was built without CUDA"
    if capability[0] not in MAJORS:
        return f"compute capability {capability[0]}.{capability[1]} is neither 9 nor 10"
    if not any(runs(arch, capability) for arch in archs):
        return f"built for {', '.join(archs)}, not for {capability[0]}.{capability[1]}"
    if _native.cuda_cluster_size(max_n, max_m) == 0:
        return f"{max_n} x {max_m} does not fit in a cluster of 8 blocks"
    return None


def runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for arch, like "9.0" or "9.0+PTX", has clusters and runs on this capability."""
    major, minor = arch.removesuffix("+PTX").split(".")
    built = int(major), int(minor.rstrip("af"))
    same = major == str(capability[0]) if minor.isdigit() else built == capability
    return (9, 0) <= built <= capability and (same or (minor.isdigit() and "+PTX" in arch))


def solve(
    similarity: Tensor,  # float32, flat
    shapes: Tensor,  # [Q, 2] int32: rows, columns
    offsets: Tensor,  # [Q] int64
    order: Tensor,  # [Q] int32
    weights: Tensor,  # [Q] float32
    *,
    bounds: tuple[int, int],
    floor: tuple[int, int] = (0, 0),
    epsilon: float,
    num_iters: int,
    tol: float,
    gradient: str,  # "none" | "unrolled" | "implicit" | "detached"
    loss: Tensor,  # [Q] float32
    iterations: Tensor,  # [Q] int32
    marginal_error: Tensor,  # [Q] float32
) -> None:
    """Enqueue the kernel on the current stream of the tensors' device.

    Row i of problem q begins at similarity[offsets[q] + i * stride], stride the number of columns
    rounded up to a multiple of 4, as every offset is; what stands in the padding does not matter.
    Where a gradient is asked for, weights[q] * dL_q/dS takes the similarity's place. Problems are
    begun in this order. No problem is larger than `bounds`; those within `floor` are skipped, as
    are those without rows or columns: the caller zeroes loss, iterations and marginal_error.

    Raises ValueError for tensors or settings that the kernel cannot take, and RuntimeError where it
    was not built or CUDA refuses the launch.
    """
    if not hasattr(_native, "cuda_solve"):
        raise RuntimeError(missing() or "the native module was built without CUDA")
    count = len(weights)
    expected = {
        "similarity": (similarity, torch.float32, similarity.shape[:1]),
        "shapes": (shapes, torch.int32, (count, 2)),
        "offsets": (offsets, torch.int64, (count,)),
        "order": (order, torch.int32, (count,)),
        "weights": (weights, torch.float32, (count,)),
        "loss": (loss, torch.float32, (count,)),
        "iterations": (iterations, torch.int32, (count,)),
        "marginal_error": (marginal_error, torch.float32, (count,)),
    }
    device = similarity.device
    for name, (tensor, dtype, shape) in expected.items():
        if (
            tensor.dtype != dtype
            or tensor.shape != shape
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            layout = "contiguous" if tensor.is_contiguous() else "strided"
            raise ValueError(
                f"{name} must be a contiguous {dtype} tensor {tuple(shape)} on {device}, "
                f"got a {layout} {tensor.dtype} one {tuple(tensor.shape)} on {tensor.device}"
            )
    if device.type != "cuda":
        raise ValueError(f"similarity must be on a CUDA device, got {device}")
    if similarity.data_ptr() % 16:
        raise ValueError("similarity must begin at a multiple of 16 bytes")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    if num_iters < 1 or not epsilon > 0:
        raise ValueError(f"num_iters {num_iters} and epsilon {epsilon} must be positive")
    if reason := fits(*bounds, torch.cuda.get_device_capability(device)):
        raise ValueError(f"problems of at most {bounds[0]} x {bounds[1]}: {reason}")

    history = None
    if gradient == "unrolled":
        floats = count * _native.cuda_history_size(*bounds, num_iters)
        history = torch.empty(floats, dtype=torch.float32, device=device)
    with torch.cuda.device(device):
        _native.cuda_solve(
            similarity.data_ptr(),
            shapes.data_ptr(),
            offsets.data_ptr(),
            order.data_ptr(),
            weights.data_ptr(),
            count=count,
            max_n=bounds[0],
            max_m=bounds[1],
            small_n=floor[0],
            small_m=floor[1],
            epsilon=epsilon,
            tol=tol,
            num_iters=num_iters,
            gradient=gradient,
            loss=loss.data_ptr(),
            iterations=iterations.data_ptr(),
            marginal_error=marginal_error.data_ptr(),
            history=0 if history is None else history.data_ptr(),
            device=device.index,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
