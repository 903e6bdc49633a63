"""What the launches of all Hopper kernels share: tensor descriptors, and launches that skip Triton's look-up."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

#: What a tensor descriptor can say: 16-byte strides below 2^40 bytes.
_MAX_STRIDE_BYTES = 2**40


def layout_reason(tensor: Tensor) -> str | None:
    """Why no descriptor can be made of a (batch, seqlen, heads, head dim) tensor of 2-byte numbers; None if one can."""
    if tensor.data_ptr() & 15:
        return "not aligned to 16 bytes"
    sizes, strides = tensor.shape, tensor.stride()
    if strides[3] != 1:
        return "last dimension not contiguous"
    limit = _MAX_STRIDE_BYTES // tensor.itemsize
    for i in range(3):
        stride = strides[i]
        if sizes[i] > 1 and (stride & 7 or not 0 < stride < limit):
            return f"stride {stride}"
    return None


def descriptor(tensor: Tensor, block: list[int], layout: Any) -> Any:
    """A tensor descriptor, without the checks of its constructor: :func:`layout_reason` has made them."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shape = tensor.shape
    # A dimension of size 1 may have any stride, also one that the hardware does not take.
    strides = [
        8 if size == 1 and (stride & 7 or stride <= 0) else stride for size, stride in zip(shape, tensor.stride())
    ]
    strides[-1] = 1
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(
        base=tensor, shape=list(shape), strides=strides, block_shape=block, layout=layout, padding="zero"
    )
    return found


def described_anew(descriptor: Any, base: Any) -> Any:
    """The same description of a tensor elsewhere; ``base`` has to have a ``data_ptr()``."""
    found = object.__new__(type(descriptor))
    found.__dict__.update(descriptor.__dict__, base=base)
    return found


def stride_classes(strides: tuple[int, ...]) -> tuple[int, ...]:
    """What Triton compiles anew for in integers: multiples of 16, 1, and those that need 64 bits."""
    return tuple((s & 15 == 0) + 2 * (s == 1) + 4 * (s >= 2**31) for s in strides)


class Plan:
    """A kernel with its compile-time options, and what was compiled with them, by :attr:`Launch.key`."""

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = options
        self.constexprs = tuple(options[name] for name in kernel.arg_names if name in options)
        self.compiled: dict[tuple[Any, ...], Any] = {}


class Launch(NamedTuple):
    """A launch of a plan. ``key`` says all that Triton would compile anew for, beside the options; the kernels are told
    not to specialise other arguments. ``arguments`` come before the constexprs among the options."""

    plan: Plan
    n_programs: int
    arguments: tuple[Any, ...]
    key: tuple[Any, ...]

    def run(self) -> None:
        plan = self.plan
        compiled = plan.compiled.get(self.key)
        if compiled is not None:
            compiled[self.n_programs, 1, 1](*self.arguments, *plan.constexprs)
            return
        plan.compiled[self.key] = plan.kernel[self.n_programs, 1, 1](*self.arguments, **plan.options)

    def warm_up(self) -> Any:
        """Compile, and launch nothing."""
        return self.plan.kernel.warmup(*self.arguments, grid=(self.n_programs,), **self.plan.options)
