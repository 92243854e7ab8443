"""A plan as a table for people."""

from collections.abc import Mapping
from typing import Any


def table(numbers: Mapping[str, Any]) -> str:
    """The table of a plan's numbers (`TrainPlan.numbers`)."""
    lines = [*_place(numbers), "", *_memory(numbers), ""]
    if numbers["step_seconds_estimate"] is None:
        lines.append("time: not estimated, because the compiler refused the program for want of memory")
        return "\n".join(lines)
    return "\n".join([*lines, *_time(numbers), "", *_categories(numbers), "", *_top(numbers), "", *_unknown(numbers)])


def _place(n: Mapping[str, Any]) -> list[str]:
    slices = f"{n['slices']} slices of " if n["slices"] > 1 else ""
    mesh = " ".join(f"{axis}={size}" for axis, size in n["mesh"].items() if size > 1) or "one device"
    return [
        f"{n['experiment']}, {n['step']} step on {slices}{n['topology']}: {n['chips']} chips, mesh {mesh}",
        f"parameters {n['params_total']:,} ({n['params_active']:,} active, {n['params_multiplied']:,} multiplied)",
        f"batch {n['rows']:,} rows of {n['row_slots']:,} positions ({n['rows_per_chip']:g} rows a chip); each row has "
        f"places for {n['tile_places_per_row']:,} image tiles ({n['tile_places_per_row'] / n['row_slots']:.0%})",
    ]


def _memory(n: Mapping[str, Any]) -> list[str]:
    gb = {name: n[f"{name}_bytes_per_chip"] / 1e9 for name in ("argument", "output", "temporary", "hbm")}
    verdict = "fits" if n["fits"] else "DOES NOT FIT"
    over = n["state_bytes_per_chip"] / n["least_state_bytes_per_chip"] - 1
    return [
        f"memory a chip, GB: {gb['hbm']:.2f} of {n['hbm_bytes_of_chip'] / 1e9:.0f}: {verdict}",
        f"  arguments {gb['argument']:.2f}, outputs {gb['output']:.2f}, temporaries {gb['temporary']:.2f}",
        f"  state {n['state_bytes_per_chip'] / 1e9:.3f}, {over:+.1%} of the least "
        f"({n['least_state_bytes_per_chip'] / 1e9:.3f})",
        f"compiled in {n['compile_seconds']:.0f} s on this machine",
    ]


def _time(n: Mapping[str, Any]) -> list[str]:
    return [
        f"step {n['step_seconds_estimate']:.4g} s estimated, at least {n['step_seconds_lower']:.4g} s "
        f"(bound by {n['lower_limit']})",
        f"MFU {n['mfu_estimate']:.1%} estimated, at most {n['mfu_bound']:.1%}; {n['tokens_per_s']:,.0f} tokens/s",
        f"  ({n['mfu_convention']})",
        f"{n['num_tokens_of_run']:.3g} tokens: {n['days_of_run']:,.1f} days, {n['chip_hours_of_run']:,.0f} chip-hours",
    ]


def _categories(n: Mapping[str, Any]) -> list[str]:
    step = n["step_seconds_estimate"]
    head = f"{'category':<26}{'ms':>10}{'share':>8}{'TFLOP':>10}{'GB memory':>11}{'GB received':>13}{'hidden ms':>11}"
    rows = [head]
    for line in n["categories"]:
        hidden = max(0.0, line["link_seconds"] - line["exposed_seconds"])
        rows.append(
            f"{line['category']:<26}{line['seconds'] * 1e3:>10.2f}{line['seconds'] / step:>8.1%}"
            f"{line['flops'] / 1e12:>10.2f}{line['hbm_bytes'] / 1e9:>11.2f}{line['transfer_bytes'] / 1e9:>13.2f}"
            f"{hidden * 1e3:>11.2f}"
        )
    return rows


def _top(n: Mapping[str, Any]) -> list[str]:
    rows = ["largest costs"]
    for line in n["top_costs"]:
        where = line["source"] or line["name"]
        rows.append(
            f"  {line['seconds'] * 1e3:>9.2f} ms  {line['category']:<24} x{line['count']:<6.0f} {where}  "
            f"{line['scope'][-70:]}"
        )
    return rows


def _unknown(n: Mapping[str, Any]) -> list[str]:
    known = [
        "contention between collectives of different groups, and between links and memory",
        "the time of the vector units beside that of the bytes they read",
        "chips that wait for each other, the loader, checkpoints, restarts",
    ]
    return ["not in these numbers", *(f"  {text}" for text in [*n["unknown"], *known])]
