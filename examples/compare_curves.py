"""Whether flash_plus trains as the other attention implementations do: loss curves over several seeds.

    python examples/compare_curves.py                                    # one GPU, bf16, 6 trainings at a time
    python examples/compare_curves.py --devices 0,1                      # the same over two
    python examples/compare_curves.py --models llama --seeds 0,1 --parallel 2 --steps 20 --hidden_size 64 ...

Trains a LLaMA of 125 million parameters and a BERT-base (configs/train/) from scratch with every implementation, every
seed, with and without dropout, and writes ``curves.json`` and ``curves.png``. Options that this script does not have go
to the training scripts. The record is written as trainings end, and what has run before is not run again, so an
interrupted record can be completed.
Exit code 1: a curve of flash_plus leaves the spread of the others, or a training failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from common.jobs import Job, run_jobs

from hf_flash_plus.bench.environment import describe

OURS = "flash_plus"
MODELS = {
    "llama": ("examples/finetune_llama.py", "configs/train/llama_125m.yaml"),
    "bert": ("examples/finetune_bert.py", "configs/train/bert_base.yaml"),
}
#: Steps of the moving average that curves are compared by.
WINDOW = 20
#: A mean that leaves the others' band does so by chance where curves dealt at random do it at least this often.
SIGNIFICANT = 0.05
#: Losses that differ by less are equal: rounding in fp32 over a few hundred steps.
ROUNDING = 1e-4

Curves = dict[str, dict[str, list[float]]]


def judge(curves: Curves) -> dict:
    """How far ``flash_plus`` is from the others, beside how far they are from each other.

    Args:
        curves: losses by implementation and seed. A seed fixes data and weights: its curves can be compared step by
            step, and without rounding and dropout they would be one.

    Returns:
        ``nearest``: the largest distance of a curve of ``flash_plus`` to the nearest other one of the same seed;
        ``others_apart``: the largest distance between two others of one seed; ``inside``: the part of the steps at
        which the mean over the seeds is within the band of all other curves; ``chance``: of :func:`by_chance`;
        ``end``: mean loss of the last steps.
        ``within``: ``nearest`` is at most ``others_apart``, and the mean leaves the band nowhere or by chance.
    """
    smooth = {name: np.stack([_smooth(losses) for losses in seeds.values()]) for name, seeds in curves.items()}
    others = [lines for name, lines in smooth.items() if name != OURS]
    nearest = float(np.min([np.abs(smooth[OURS] - lines) for lines in others], axis=0).max())
    apart = max((float(np.abs(a - b).max()) for a, b in itertools.combinations(others, 2)), default=0.0)
    band = np.concatenate(others)
    mean = smooth[OURS].mean(axis=0)
    inside = (mean >= band.min(axis=0) - ROUNDING) & (mean <= band.max(axis=0) + ROUNDING)
    chance = by_chance(smooth)
    return {
        "nearest": nearest,
        "others_apart": apart,
        "inside": float(inside.mean()),
        "chance": chance,
        "end": {name: float(lines[:, -1].mean()) for name, lines in smooth.items()},
        "within": bool(nearest <= max(apart, ROUNDING) and (inside.all() or chance > SIGNIFICANT)),
    }


def by_chance(smooth: dict[str, np.ndarray]) -> float:
    """How often curves dealt at random would be as far from the rest as those of ``flash_plus`` are.

    A permutation test: if implementations train alike, which of a seed's curves is whose does not matter. Of all ways
    to name one curve of each seed, the part whose mean is at least as far from the mean of all other curves, at the
    step where it is farthest. Noise (of dropout, of small batches) is in both; a real difference is rare among them.
    """
    names = list(smooth)
    curves = np.stack([smooth[name] for name in names])  # implementation, seed, step
    seeds = range(curves.shape[1])

    def distance(chosen: tuple[int, ...]) -> float:
        ours = sum(curves[chosen[seed], seed] for seed in seeds)
        rest = (curves.sum(axis=(0, 1)) - ours) / (curves.shape[0] * curves.shape[1] - len(seeds))
        return float(np.abs(ours / len(seeds) - rest).max())

    found = distance((names.index(OURS),) * len(seeds))
    others = [distance(chosen) for chosen in itertools.product(range(len(names)), repeat=len(seeds))]
    return sum(other >= found - ROUNDING / 100 for other in others) / len(others)


def _smooth(losses: list[float]) -> np.ndarray:
    width = min(WINDOW, len(losses))
    return np.convolve(losses, np.full(width, 1 / width), mode="valid")


def draw(path: Path, cases: dict[str, dict]) -> None:
    """One panel a case: the mean over the seeds, and the band between the lowest and the highest."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed (pip install matplotlib); --draw makes it later")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(cases))
    rows = -(-len(cases) // columns)
    size = (7 * columns, 4.2 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (title, case) in zip(axes.flat, cases.items()):
        for name, seeds in case["curves"].items():
            lines = np.stack([_smooth(losses) for losses in seeds.values()])
            steps = np.arange(lines.shape[1]) + len(next(iter(seeds.values()))) - lines.shape[1] + 1
            (line,) = axis.plot(steps, lines.mean(axis=0), label=name, linewidth=1)
            axis.fill_between(steps, lines.min(axis=0), lines.max(axis=0), alpha=0.15, color=line.get_color())
        axis.set(title=title, xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps")
        axis.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def folder_of(args: argparse.Namespace, model: str, dropout: str, seed: str) -> Path:
    """Where the trainings of a case and seed write."""
    return args.work / f"{model}-seed{seed}" / f"dropout{dropout}"


def make_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    """One process for each model and seed: it trains with all implementations, one after the other, first without
    dropout.

    Each seed begins with another implementation: all at once they would compile the same kernels many times over.
    """
    jobs = []
    for seed, model in itertools.product(args.seeds, args.models):
        script, settings = MODELS[model]
        first = args.seeds.index(seed) % len(args.implementations)
        order = [*args.implementations[first:], *args.implementations[:first]]
        command = ["examples/common/in_turn.py", script]
        folders = tuple(folder_of(args, model, dropout, seed) for dropout in args.dropouts)
        for dropout, folder in zip(args.dropouts, folders):
            command += [] if dropout == args.dropouts[0] else ["--then"]
            command += [settings, "--compare", ",".join(order), "--resume", "--seed", seed, "--dropout", dropout]
            command += ["--max_steps", str(args.steps), "--mixed_precision", args.mixed_precision]
            command += ["--output_dir", str(folder), *extra]
        name = f"{model}-seed{seed}"
        jobs.append(Job(name, tuple(command), args.work / name, folders))
    return jobs


def collect(args: argparse.Namespace) -> dict[str, dict]:
    """The curves by case (a model and a dropout) that have been trained so far, and the verdict on each.

    Seeds that some implementation has not been trained with yet are left out; a job that was stopped has written
    those trainings that it finished.
    """
    cases: dict[str, dict] = {}
    for model, dropout, seed in itertools.product(args.models, args.dropouts, args.seeds):
        folder = folder_of(args, model, dropout, seed)
        runs = {name: folder / f"{name}.json" for name in args.implementations}
        if not all(path.exists() for path in runs.values()):
            continue
        for name, path in runs.items():
            run = json.loads(path.read_text())
            case = cases.setdefault(f"{model}, dropout {dropout}", {"parameters": run["parameters"], "curves": {}})
            case.setdefault("device", run["device"])
            case.setdefault("providers", {})[name] = run["providers"]
            case.setdefault("seconds", {}).setdefault(name, {})[seed] = round(run["train_seconds"], 1)
            case["curves"].setdefault(name, {})[seed] = [round(loss, 5) for loss in run["losses"]]
    return {title: {"verdict": judge(case["curves"]), **case} for title, case in cases.items()}


def main(argv: list[str] | None = None) -> int:
    """Run with the arguments of the command line; the exit code."""

    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names, default=list(MODELS))
    parser.add_argument("--seeds", type=names, default=["0", "1", "2"])
    parser.add_argument("--implementations", type=names, default=[OURS, "sdpa", "eager"])
    parser.add_argument("--dropouts", type=names, default=["0", "0.1"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--mixed_precision", default="bf16")
    parser.add_argument("--parallel", type=int, default=6, help="trainings at a time (about 4 GB of GPU memory each)")
    parser.add_argument(
        "--devices", type=names, default=[], help="GPUs to spread them over, as 0,1; default: the first"
    )
    parser.add_argument("--budget", type=float, default=1800, help="seconds after which what still runs is stopped")
    parser.add_argument("--output_dir", type=Path, default=Path("examples/benchmark"))
    parser.add_argument("--work", type=Path, default=Path("outputs/curves"), help="folder of the single trainings")
    parser.add_argument("--draw", action="store_true", help="train nothing: draw the curves.json of an earlier run")
    args, extra = parser.parse_known_args(argv)
    if args.draw:
        draw(args.output_dir / "curves.png", json.loads((args.output_dir / "curves.json").read_text())["cases"])
        return 0
    if OURS not in args.implementations or len(args.implementations) < 2:
        parser.error(f"--implementations needs {OURS} and another one")
    jobs = make_jobs(args, extra)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record = {"environment": describe(), "command": sys.argv[1:] if argv is None else argv}

    def save() -> dict[str, dict]:
        cases = collect(args)
        (args.output_dir / "curves.json").write_text(json.dumps({**record, "cases": cases}) + "\n")
        return cases

    results = run_jobs(jobs, args.parallel, args.budget, args.devices, ended=save)
    cases = save()
    if cases:
        draw(args.output_dir / "curves.png", cases)
    for title, case in cases.items():
        verdict = case["verdict"]
        print(
            f"{title}: {OURS} {'stays within' if verdict['within'] else 'LEAVES'} the spread of the others: "
            f"at most {verdict['nearest']:.4f} from the nearest, the others {verdict['others_apart']:.4f} apart; "
            f"mean inside their band in {verdict['inside']:.0%} of the steps, as far by chance: {verdict['chance']:.0%}"
        )
    missing = len(jobs) - len(results)
    if missing:
        print(f"{missing} of {len(jobs)} processes did not finish their trainings")
    return int(missing > 0 or not all(case["verdict"]["within"] for case in cases.values()))


if __name__ == "__main__":
    sys.exit(main())
