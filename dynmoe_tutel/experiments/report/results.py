"""What a finished job leaves in its run folder: the table and the plots, made from the logs alone."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dynmoe_tutel.experiments.report import plots, table
from dynmoe_tutel.experiments.run_folder import EVENTS, METRICS, RunFolder, read_log


def write_table(folder: RunFolder, rows: Sequence[str], seeds: Sequence[int], steps: int) -> list[table.RowSummary]:
    """Write table.md and table.json; the rows of the table."""
    summaries = table.summarise(read_log(folder.path, METRICS), rows, seeds)
    folder.write("table.md", table.markdown(summaries, steps))
    folder.write("table.json", json.dumps(table.as_json(summaries, steps), indent=2) + "\n")
    return summaries


def write_plots(folder: RunFolder, rows: Sequence[str], slots: int) -> list[str]:
    """Write the PNG files; their names."""
    made = draw(read_log(folder.path, METRICS), read_log(folder.path, EVENTS), rows, slots)
    for name, content in made.items():
        folder.write(name, content)
    return list(made)


def draw(metrics: plots.Lines, events: plots.Lines, rows: Sequence[str], slots: int) -> dict[str, bytes]:
    """The PNG files by name. Those about experts are of the DynMoE row, or else of the last MoE row."""
    made = {"accuracy.png": plots.accuracy(metrics, rows)}
    with_experts = [row for row in rows if any(line["layers"] for line in metrics if line["row"] == row)]
    if with_experts:
        row = "dynmoe" if "dynmoe" in with_experts else with_experts[-1]
        made["experts.png"] = plots.experts(metrics, events, row, slots)
        made["k_histogram.png"] = plots.k_histogram(metrics, row)
        made["load.png"] = plots.load(metrics, row)
    return made
