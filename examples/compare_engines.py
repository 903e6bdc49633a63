"""Whether several GPUs train as one does: DDP, FSDP2 and tensor parallelism beside a single GPU.

    python examples/compare_engines.py                                   # two GPUs, bf16, about three minutes
    ACCELERATE_USE_CPU=true python examples/compare_engines.py --engines cpu,cpu_ddp --steps 10

Trains the same LLaMA on the same rows with every configuration of ``configs/accelerate/`` that is named, the first of
which is the reference, and writes ``engines.json`` and ``engines.png``: losses, throughput, memory. The reference is
trained with sdpa, too: what two implementations are apart is the noise that engines are measured by. Options that this
script does not have go to ``finetune_llama.py``. Exit code 1: losses differ by more than noise, or a training failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml
from common.jobs import ROOT, Job, run_jobs

from hf_flash_plus.bench.environment import describe

KEYS = ("engine", "processes", "device", "providers", "tokens_per_second", "peak_memory_bytes", "bits_per_byte_end")
#: Losses of engines may be apart by this many times what two implementations of attention are apart on one device,
NOISE_FACTOR = 3.0
#: or by this part of the first loss: engines round other things than attention, and sum in another order.
RELATIVE = 0.01


def data_parallel(engine: str) -> int:
    """How many parts of a batch the processes of a configuration compute."""
    settings = yaml.safe_load((ROOT / f"configs/accelerate/{engine}.yaml").read_text())
    tensor_parallel = settings.get("parallelism_config", {}).get("parallelism_config_tp_size", 1)
    return settings["num_processes"] // tensor_parallel


def make_job(engine: str, args: argparse.Namespace, extra: list[str], reference: bool) -> Job:
    """One training of ``args.batch_size`` rows a step in all."""
    output = args.work / engine
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--config_file", str(ROOT / f"configs/accelerate/{engine}.yaml")]
    options = ["--max_steps", str(args.steps), "--batch_size", str(args.batch_size // data_parallel(engine))]
    options += ["--compare", "flash_plus,sdpa"] if reference else []
    script = [str(ROOT / "examples/finetune_llama.py"), str(args.settings), *options, "--output_dir", str(output)]
    return Job(engine, (*launcher, *script, *extra), output)


def judge(results: dict[str, dict], reference: str) -> dict:
    """The engines beside the reference: the largest distance of their losses at any step, and whether it is noise."""
    base = results[reference]["runs"]["flash_plus"]
    noise = results[reference]["largest_loss_gap"]
    tolerance = max(NOISE_FACTOR * noise, RELATIVE * base["losses"][0])
    engines = {}
    for name, result in results.items():
        run = base if name == reference else result
        gap = max(abs(a - b) for a, b in zip(run["losses"], base["losses"], strict=True))
        engines[name] = {"largest_gap": gap, "same": gap <= tolerance, **{key: run[key] for key in KEYS}}
        engines[name]["losses"] = [round(loss, 5) for loss in run["losses"]]
    return {"reference": reference, "noise": noise, "tolerance": tolerance, "engines": engines}


def draw(path: Path, found: dict) -> None:
    """The losses of all engines over the steps, and their throughput."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed (pip install matplotlib); --draw makes it later")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, speed) = pyplot.subplots(ncols=2, figsize=(12, 4.2))
    for i, (name, engine) in enumerate(found["engines"].items()):
        losses.plot(range(1, len(engine["losses"]) + 1), engine["losses"], label=name, linewidth=4 / (i + 1))
        speed.bar(f"{name}\n{engine['processes']} process(es)", engine["tokens_per_second"])
    losses.set(xlabel="step", ylabel="training loss")
    losses.legend()
    speed.set(ylabel="tokens/s, all processes together")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run with the arguments of the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="single_gpu,ddp,fsdp2,tp", help="of configs/accelerate; first: reference")
    parser.add_argument("--settings", type=Path, default=ROOT / "configs/train/llama_125m.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=32, help="rows a step, of all processes together")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which what still runs is stopped")
    parser.add_argument("--output_dir", type=Path, default=Path("examples/benchmark"))
    parser.add_argument("--work", type=Path, default=Path("outputs/engines"), help="folder of the single trainings")
    parser.add_argument("--draw", action="store_true", help="train nothing: draw the engines.json of an earlier run")
    args, extra = parser.parse_known_args(argv)
    if args.draw:
        draw(args.output_dir / "engines.png", json.loads((args.output_dir / "engines.json").read_text()))
        return 0
    names = args.engines.split(",")
    jobs = [make_job(name, args, extra, reference=name == names[0]) for name in names]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record = {"environment": describe(), "command": sys.argv[1:] if argv is None else argv}

    def save() -> dict | None:
        """The record of the engines that have run, once there is something to compare them with."""
        results = {job.name: result for job in jobs if (result := job.saved()) is not None}
        if names[0] not in results:
            return None
        found = judge(results, names[0])
        (args.output_dir / "engines.json").write_text(json.dumps({**record, **found}) + "\n")
        return found

    run_jobs(jobs, parallel=1, budget=args.budget, ended=save)
    found = save()
    if found is None:
        print(f"nothing to compare with: {names[0]} failed")
        return 1
    draw(args.output_dir / "engines.png", found)
    for name, engine in found["engines"].items():
        print(
            f"{name:12} {'same' if engine['same'] else 'OTHER'} losses (at most {engine['largest_gap']:.4f} apart, "
            f"noise {found['noise']:.4f}), {engine['tokens_per_second']:,.0f} tokens/s, "
            f"{engine['peak_memory_bytes'] / 2**20:,.0f} MiB a process"
        )
    missing = [name for name in names if name not in found["engines"]]
    if missing:
        print(f"failed: {', '.join(missing)}")
    return int(bool(missing) or not all(engine["same"] for engine in found["engines"].values()))


if __name__ == "__main__":
    sys.exit(main())
