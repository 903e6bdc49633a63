"""What warpgroups compute of a regular window (``Config.halves``): each row gets the keys of its window, each once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from hf_flash_plus.kernels.hopper import config, forward_launch

if forward_launch.gluon_reason() is not None:
    pytest.skip(forward_launch.gluon_reason(), allow_module_level=True)

from hf_flash_plus.kernels.hopper import schedule


def parts(w: int, warpgroups: int, n_blocks: int, first: int) -> list[tuple[int, int, str]]:
    """``(first key, keys, mask)`` of what warpgroup ``w`` computes of a tile: as ``forward._consume_window``."""
    step = 1 if warpgroups == 3 and w < 2 else 0
    found = [(first + (n_blocks - 1 - step) * 128, 64 if w % 2 == 0 else 128, "late")]
    for _ in range(warpgroups - 1, n_blocks - 1):
        step += 1
        found.append((first + (n_blocks - 1 - step) * 128, 128, ""))
    if w == 2:
        for i in range(2 if -128 < first < 0 else 1):
            found.append((first + (1 - i) * 128, 128, "early"))
    elif w == 1:
        found.append((first + 64, 64, "early"))
    else:
        found.append((first, 128, "early"))
    return found


@pytest.mark.parametrize("dims", list(config.HALVES))
@pytest.mark.parametrize("left", [127, 128, 255, 511, 1023, 1024])
def test_each_key_once(dims: tuple[int, int], left: int) -> None:
    warpgroups, served = config.HALVES[dims], 0
    for offset in (0, 1, 37, 64, 65, 128, 192, 1000, 1024, 1333):
        if not config.regular_window(dims, left, 0, offset):
            continue
        served += 1
        problem = SimpleNamespace(window_left=left, offset=offset)
        for first_row in range(0, 1700, 64 * warpgroups):
            n_blocks, first = schedule._regular_blocks.fn(first_row, problem, SimpleNamespace(consumers=warpgroups))
            assert n_blocks >= warpgroups
            for row in range(first_row, first_row + 64 * warpgroups):
                w, r = divmod(row - first_row, 64)
                start, end = max(row + offset - left, 0), row + offset + 1
                seen = []
                for at, (key, n_keys, mask) in enumerate(parts(w, warpgroups, n_blocks, first)):
                    low = max(key, start) if mask == "early" else key
                    high = min(key + n_keys, key + r + w % 2 * 64 + 1) if mask == "late" else key + n_keys
                    assert at > 0 or high > max(low, 0)  # no row begins with nothing
                    seen += range(low, high)
                assert sorted(seen) == list(range(start, end))
    assert served


def test_which_windows_are_regular() -> None:
    small, large = (64, 64), (128, 128)
    assert config.regular_window(small, 1023, 0, 0) and config.regular_window(large, 1024, 0, 128)
    for left, right, offset in ((999, 0, 0), (1023, 1, 0), (63, 0, 0), (1023, 0, -128), (1023, 0, 100)):
        assert not config.regular_window(small, left, right, offset)
        assert not config.regular_window(large, left, right, offset)
    assert config.regular_window(large, 1023, 0, 37) and not config.regular_window(small, 1023, 0, 37)
    assert not config.regular_window((256, 256), 1023, 0, 0)
