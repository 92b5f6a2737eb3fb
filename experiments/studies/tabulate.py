"""What E3 and E4 share: several runs in one result, medians with quartiles in fixed digits."""

from __future__ import annotations

import statistics
from typing import Any


def file_name(label: str) -> str:
    """A method's label as a task key."""
    return label.lower().replace(" (ours)", "-ours").replace("-", "_")


def median(values: list[float | None], digits: str = ".3f") -> str:
    """'median [lower quartile, upper quartile]' of the runs that have a value; 'k of n' where some have none."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return "-"
    if len(found) == 1:
        text = f"{found[0]:{digits}}"
    else:
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        text = f"{middle:{digits}} [{low:{digits}}, {high:{digits}}]"
    return text if len(found) == len(values) else f"{text} ({len(found)} of {len(values)})"


def packed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """{"runs": without their records, "records": one list per run}: `records` at the top are curves, kept out of NAME.json."""
    return {"runs": [{key: value for key, value in run.items() if key != "records"} for run in runs],
            "records": [run["records"] for run in runs]}  # fmt: skip


def unpacked(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs with their records."""
    return [{**run, "records": records} for run, records in zip(result["runs"], result["records"])]
