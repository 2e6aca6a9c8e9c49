"""The page of the answers, questions.md, the same numbers as questions.json, and a picture for each answer."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe_tutel.checkpoint import write_file
from dynmoe_tutel.experiments.questions import pictures, timing
from dynmoe_tutel.experiments.questions.answer import Answer, Question
from dynmoe_tutel.experiments.questions.catalogue import question
from dynmoe_tutel.experiments.questions.results import CONFIDENCE, NONE, Results
from dynmoe_tutel.experiments.report.table import markdown_lines
from dynmoe_tutel.experiments.run_folder import CONFIG, METRICS, RUNS, read_config, read_log

if TYPE_CHECKING:
    from dynmoe_tutel.experiments.questions.task import QuestionsTask

PAGE, NUMBERS = "questions.md", "questions.json"
WIDTH = 130


def write(task: QuestionsTask, path: Path, console: Any) -> None:
    """Write all into the folder, and print the answers."""
    folders = [folder for folder in sorted((path / RUNS).glob("*")) if (folder / METRICS).exists()]
    metrics = [line for folder in folders for line in read_log(folder, METRICS)]
    results = Results.of(path, metrics, task.config.steps)
    answers = [(each, each.answer(results)) for each in map(question, asked_for(task, path))]
    write_file(path / PAGE, page(task, results, answers))
    content = [_as_json(*each, _cannot(task, each[0])) for each in answers]
    write_file(path / NUMBERS, json.dumps(content, indent=2) + "\n")
    for each, answer in answers:
        if answer.panels:
            write_file(path / picture_of(each), pictures.draw(answer))
        console.print(f"{each.number}. {each.title}", highlight=False, style="bold")
        console.print(answer.sentence, highlight=False)


def asked_for(task: QuestionsTask, path: Path) -> list[int]:
    """The numbers of the questions of this command, and of all that used the folder before."""
    configs = [read_config(folder) for folder in (path / RUNS).glob("*") if (folder / CONFIG).exists()]
    earlier = [number for config in configs for number in config.get("axes", {}).get("questions", [])]
    return sorted({*task.config.questions, *earlier, *timing.questions_of(path)})


def page(task: QuestionsTask, results: Results, answers: list[tuple[Question, Answer]]) -> str:
    """The page as Markdown."""
    return "\n\n".join([_head(task, results), *[_section(*each, _cannot(task, each[0])) for each in answers]]) + "\n"


def picture_of(asked: Question) -> str:
    """Its file."""
    return f"question-{asked.number}.png"


def _head(task: QuestionsTask, results: Results) -> str:
    config = task.config
    data = (
        "The data are the sentences of `experiment language`, and all variants start from its pretrained text model. "
        f"DynMoE starts with {config.experts} experts, which are copies of its MLPs, and has {config.slots} slots."
        if config.language
        else "The data are the rotated digits of `train`: five angles are trained on, 75 degrees is never seen. "
        f"Experts start from random weights; DynMoE starts with {config.experts} and has {config.slots} slots."
    )
    counts = {len(by_seed) for by_seed in results.evaluations.values()} or {len(config.seeds)}
    number = str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    seeds = "one seed" if counts == {1} else f"{number} seeds"
    text = (
        f"Reviews of DynMoE asked these questions, and no published run answers them. This page is written by "
        f"`dynmoe-tutel {task.command}{' --language' * config.language}`, its sentences too. Each variant differs from "
        f"`dynmoe` in one thing and shares with the others seeds, batches, optimizer, learning rate "
        f"{config.learning_rate:g} and {config.steps} steps; {seeds}; numbers are those after the last step. {data}"
    )
    caution = (
        f"A difference is paired: the mean over the seeds of the difference within a seed, with its {CONFIDENCE} "
        "interval (Student's t). One interval of twenty leaves out 0 where there is no difference, and this page has "
        "dozens."
    )
    return "\n\n".join(["# Questions", _filled(text), _filled(caution)])


def _section(asked: Question, answer: Answer, cannot: str) -> str:
    parts = [f"## {asked.number}. {asked.title}", _filled(asked.asked)]
    for caption, header, rows in answer.tables:
        parts += [_filled(caption)] if caption else []
        parts.append(markdown_lines(header, rows) if rows else NONE)
    if answer.panels:
        parts.append(f"![{asked.title}]({picture_of(asked)})")
    parts.append(_filled(f"**Answer.** {answer.sentence}"))
    parts.append(_filled(f"**What it cannot show.** {cannot}"))
    return "\n\n".join(parts)


def _cannot(task: QuestionsTask, asked: Question) -> str:
    return (asked.of_texts if task.config.language else asked.cannot) or ""


def _as_json(asked: Question, answer: Answer, cannot: str) -> dict[str, Any]:
    return {
        "number": asked.number,
        "title": asked.title,
        "asked": asked.asked,
        "tables": [{"caption": caption, "header": header, "rows": rows} for caption, header, rows in answer.tables],
        "panels": [asdict(panel) for panel in answer.panels],
        "answer": answer.sentence,
        "cannot_show": cannot,
    }


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
