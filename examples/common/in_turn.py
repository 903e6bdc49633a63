"""Several trainings in one process, one after the other: imports, documents and tokenizer are made once.

python examples/common/in_turn.py examples/finetune_llama.py <arguments> --then <arguments> --then ...
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

THEN = "--then"


def main(argv: list[str]) -> None:
    """The first argument is the script, the others are the arguments of its ``main``, divided by ``--then``."""
    path, *rest = argv
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look for their module
    spec.loader.exec_module(script)
    trainings: list[list[str]] = [[]]
    for argument in rest:
        if argument == THEN:
            trainings.append([])
        else:
            trainings[-1].append(argument)
    for arguments in trainings:
        script.main(arguments)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are those of a package
    main(sys.argv[1:])
