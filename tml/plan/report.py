"""A plan as a table for people."""

from collections.abc import Callable, Mapping
from typing import Any


def train_table(numbers: Mapping[str, Any]) -> str:
    """The table of `TrainPlan.numbers`."""
    return _table(numbers, [*_place(numbers), _batch(numbers)], _state(numbers), _train_time)


def decode_table(numbers: Mapping[str, Any]) -> str:
    """The table of `DecodePlan.numbers`."""
    return _table(numbers, [*_place(numbers), _turn(numbers)], _caches(numbers), _decode_time)


def search_line(n: Mapping[str, Any]) -> str:
    """One variant of a search."""
    mesh = " ".join(f"{axis}={size}" for axis, size in n["mesh"].items() if size > 1)
    gb = f"{n['hbm_bytes_per_chip'] / 1e9:7.2f} GB"
    what = f"{mesh:<40} remat={n['remat']:<6} {n['rows_per_chip']:>4g} rows a chip {gb}"
    if not n["fits"] or n["step_seconds_estimate"] is None:
        return f"{what}  does not fit"
    return f"{what}  {n['tokens_per_s']:>12,.0f} tokens/s  MFU {n['mfu_estimate']:.1%} (at most {n['mfu_bound']:.1%})"


Section = Callable[[Mapping[str, Any]], list[str]]


def _table(n: Mapping[str, Any], head: list[str], memory: list[str], time: Section) -> str:
    lines = [*head, "", *_memory(n), *memory, f"compiled in {n['compile_seconds']:.0f} s on this machine", ""]
    if n["step_seconds_estimate"] is None:
        return "\n".join([*lines, "time: not estimated, because the compiler refused the program for want of memory"])
    return "\n".join([*lines, *time(n), "", *_categories(n), "", *_top(n), "", *_unknown(n)])


def _place(n: Mapping[str, Any]) -> list[str]:
    slices = f"{n['slices']} slices of " if n["slices"] > 1 else ""
    mesh = " ".join(f"{axis}={size}" for axis, size in n["mesh"].items() if size > 1) or "one device"
    return [
        f"{n['experiment']}, {n['step']} step on {slices}{n['topology']}: {n['chips']} chips, mesh {mesh}",
        f"parameters {n['params_total']:,} ({n['params_active']:,} active, {n['params_multiplied']:,} multiplied)",
    ]


def _batch(n: Mapping[str, Any]) -> str:
    return (
        f"batch {n['rows']:,} rows of {n['row_slots']:,} positions ({n['rows_per_chip']:g} rows a chip, remat "
        f"{n['remat']}); each row has places for {n['tile_places_per_row']:,} image tiles "
        f"({n['tile_places_per_row'] / n['row_slots']:.0%})"
    )


def _turn(n: Mapping[str, Any]) -> str:
    return (
        f"{n['sessions']} sessions; a micro-turn appends up to {n['input_positions']} positions and decodes "
        f"{n['output_positions']}, one after another; caches of {n['max_positions']:,} positions"
    )


def _memory(n: Mapping[str, Any]) -> list[str]:
    gb = {name: n[f"{name}_bytes_per_chip"] / 1e9 for name in ("argument", "output", "temporary", "hbm")}
    verdict = "fits" if n["fits"] else "DOES NOT FIT"
    return [
        f"memory a chip, GB: {gb['hbm']:.2f} of {n['hbm_bytes_of_chip'] / 1e9:.0f}: {verdict}",
        f"  arguments {gb['argument']:.2f}, outputs {gb['output']:.2f}, temporaries {gb['temporary']:.2f}",
    ]


def _state(n: Mapping[str, Any]) -> list[str]:
    held, least = n["state_bytes_per_chip"], n["least_state_bytes_per_chip"]
    return [f"  state {held / 1e9:.3f}, {held / least - 1:.1%} above an even split ({least / 1e9:.3f})"]


def _caches(n: Mapping[str, Any]) -> list[str]:
    return [
        f"  parameters {n['param_bytes_per_chip'] / 1e9:.2f}; global caches grow by "
        f"{n['cache_bytes_per_session_minute'] / 1e6:.1f} MB a minute of a session's sound; "
        f"about {n['most_sessions']} sessions fit",
    ]


def _decode_time(n: Mapping[str, Any]) -> list[str]:
    return [
        f"micro-turn {n['step_seconds_estimate'] * 1e3:.2f} ms estimated, at least "
        f"{n['step_seconds_lower'] * 1e3:.2f} ms (bound by {n['lower_limit']})",
        f"experts read in a layer, of {n['experts_per_layer']}, if all are as likely: "
        f"{n['experts_read_per_layer']:.1f} at an output position, {n['experts_read_per_layer_of_input']:.1f} at the "
        "input; kernels count so many",
    ]


def _train_time(n: Mapping[str, Any]) -> list[str]:
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
        f"starting {n['operations']:,.0f} operations one after another: on a GPU a microsecond or two each",
        "contention between collectives of different groups, and between links and memory",
        "the time of the vector units beside that of the bytes they read",
        "chips that wait for each other, the loader, checkpoints, restarts",
    ]
    return ["not in these numbers", *(f"  {text}" for text in [*n["unknown"], *known])]
