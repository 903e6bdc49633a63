"""``hf-flash-plus info``: versions, devices, settings, and every provider with the reasons why it cannot serve."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .console import make_console


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, devices, settings and providers."""
    report = collect()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def collect() -> dict[str, Any]:
    """Everything ``info`` shows, as data."""
    from ..bench.environment import devices, versions

    return {
        "versions": versions(),
        "devices": devices(),
        "settings": _settings(),
        "paths": _paths(),
        "providers": _providers(),
        "known_bad": _known_bad(),
    }


def _settings() -> list[dict[str, Any]]:
    import os

    from .. import settings

    return [
        {
            "name": setting.name,
            "value": os.environ.get(setting.name),
            "default": setting.default,
            "values": setting.values,
            "meaning": setting.meaning,
        }
        for setting in settings.SETTINGS
    ]


def _paths() -> dict[str, Any]:
    from .. import dispatch, settings

    report: dict[str, Any] = {
        str(path).upper(): [provider.name for provider in dispatch.path_providers(path)] for path in dispatch.PATHS
    }
    try:
        report["current"] = str(settings.use_flaggems()).upper()
        report["forced"] = settings.forced_provider()
        if report["forced"]:
            dispatch.check_provider_name(report["forced"])
    except ValueError as error:
        report["error"] = str(error)
    return report


def _providers() -> list[dict[str, Any]]:
    from ..providers import PROVIDERS

    report = []
    for provider in PROVIDERS.values():
        try:
            reason = provider.unavailable_reason()
        except Exception as error:  # must not happen; `info` is where one looks when it does
            reason = f"{type(error).__name__}: {error}"
        report.append(
            {
                "name": provider.name,
                "summary": provider.summary,
                "usable": reason is None,
                "reason": reason,
                "version": provider.version(),
                "devices": sorted(provider.device_types) if provider.device_types else "any",
                "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in provider.dtypes),
                "features": sorted(provider.features),
            }
        )
    return report


def _known_bad() -> list[dict[str, Any]]:
    from ..providers.flaggems import KNOWN_BAD

    return [
        {"library": "flag_gems", "entry_point": bad.entry_point, "versions": list(bad.versions), "reason": bad.reason}
        for bad in KNOWN_BAD
    ]


def _print(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = make_console()
    versions = Table("component", "version", title="Versions", title_justify="left")
    for name, version in report["versions"].items():
        versions.add_row(name, version or "[dim]not installed[/dim]")
    console.print(versions)

    devices = Table("device", "name", "capability", "memory", title="Devices", title_justify="left")
    for device in report["devices"]:
        memory = f"{device['memory_gib']:.0f} GiB" if device["memory_gib"] else "-"
        devices.add_row(device["device"], device["name"], device["capability"] or "-", memory)
    console.print(devices)

    settings = Table("variable", "now", "default", "meaning", title="Settings", title_justify="left")
    for setting in report["settings"]:
        now = "[dim]unset[/dim]" if setting["value"] is None else escape(setting["value"])
        settings.add_row(setting["name"], now, setting["default"] or "(empty)", setting["meaning"])
    console.print(settings)

    paths = report["paths"]
    for path in ("TRUE", "FALSE"):
        mark = " (current)" if paths.get("current") == path else ""
        console.print(f"FLASH_ATTENTION_USE_FLAGGEMS={path}{mark}: {' > '.join(paths[path])}", highlight=False)
    if paths.get("forced"):
        console.print(f"forced provider: {paths['forced']}")
    if paths.get("error"):
        console.print(f"[red]{escape(paths['error'])}[/red]")

    providers = Table("provider", "usable", "version", "what, or why not", title="Providers", title_justify="left")
    for provider in report["providers"]:
        words = provider["summary"] if provider["usable"] else provider["reason"]
        usable = "[green]yes[/green]" if provider["usable"] else "[red]no[/red]"
        providers.add_row(provider["name"], usable, provider["version"] or "-", escape(words))
    console.print(providers)

    known = Table("flag_gems", "never used, because", title="Known-bad entry points", title_justify="left")
    for bad in report["known_bad"]:
        known.add_row(escape(f"{', '.join(bad['versions'])}: {bad['entry_point']}"), escape(bad["reason"]))
    console.print(known)
