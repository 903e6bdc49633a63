"""Launches of a compiled kernel that was launched before, without what Triton does anew for each launch.

Triton's launcher takes tensor descriptors apart argument by argument, encodes each for the hardware and asks the driver
about every pointer: 25 us of a launch with four descriptors. Here descriptors are encoded once for each address and
shape (the encoding holds nothing else), and pointers are numbers. This reaches into Triton 3.6, the one version that
these kernels are used with; what is not as expected there makes :func:`direct` return None, and launches go the
ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

#: Encoded descriptors that are kept, by plan and argument. Training sees the same addresses again and again.
_MOST_DESCRIPTORS = 4096


class Descriptors:
    """Encoded descriptors of one argument: what the launcher takes instead of a ``TensorDescriptor``."""

    def __init__(self, fill: Callable[..., Any], how: dict[str, Any], dtype: int) -> None:
        self._fill = fill
        self._how = (how["swizzle"], how["elem_size"], dtype, how["block_size"])
        self._known: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Any, ...]:
        """``(encoded, *shape, *strides)`` of a tensor at ``address``; strides of its elements, as a descriptor has."""
        key = (address, shape, strides)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _MOST_DESCRIPTORS:
                self._known.clear()
            encoded = self._fill(address, *self._how, list(shape), list(strides), 0)
            found = self._known[key] = (encoded, *shape, *strides)
        return found


class Direct:
    """One compiled kernel, ready to be launched.

    Attributes:
        descriptors: encoders of its descriptor arguments, in order.
    """

    def __init__(self, compiled: Any, launch: Callable[..., None], descriptors: tuple[Descriptors, ...]) -> None:
        self.descriptors = descriptors
        launcher = compiled.run
        self._launch = launch
        self._fixed = (
            compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
            compiled.packed_metadata, None, None, None,
        )  # fmt: skip

    def __call__(self, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None:
        """Launch. ``arguments`` are the kernel's, constexprs included (of any value), with pointers as numbers and
        descriptors as :class:`Descriptors` give them."""
        self._launch(*grid, stream, *self._fixed, *arguments)


def hooked() -> bool:
    """Whether somebody (a profiler) wants to hear of launches, which the ordinary way tells."""
    runtime = knobs.runtime
    return _calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook)


def _calls(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def direct(compiled: Any) -> Direct | None:
    """A compiled kernel that has been launched, for direct launches; None where Triton is not as expected."""
    try:
        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size or launcher.num_ctas != 1:
            return None
        hows = tuple(compiled.metadata.tensordesc_meta or ())
        launch = launcher.launch
        if hows:
            if any(how is None or how["fp4_padded"] for how in hows):
                return None
            # The function that takes descriptors apart, and in it the one from C.
            launch = dict(zip(launch.__code__.co_freevars, launch.__closure__))["launcher"].cell_contents
        fill = driver.active.utils.fill_tma_descriptor
        types = nvidia.TMA_DTYPE_DEVICE_TO_HOST
        return Direct(compiled, launch, tuple(Descriptors(fill, how, types[how["elem_type"]]) for how in hows))
    except (AttributeError, KeyError, TypeError):
        return None
