"""The questions: each with what it trains, how it is answered, and what the answer cannot show.

Reviews of DynMoE asked them, and no published run answers them.
"""

from __future__ import annotations

from dynmoe_tutel.experiments.questions.answer import Question
from dynmoe_tutel.experiments.questions.readings import against, fallback, spreads, starts
from dynmoe_tutel.experiments.questions.results import IN, MEAN_K, OUT
from dynmoe_tutel.experiments.questions.timing_readings import raggedness, step_times
from dynmoe_tutel.experiments.questions.variants import (
    AUX_TERMS,
    BUDGET,
    FIXED,
    INITS,
    INTERVALS,
    ROUTERS,
    VARIANTS,
    K,
)

SMALL = (
    "The models are small, the trainings short, and one accuracy out of domain is of some 300 images: a difference "
    "within the interval may be there in longer trainings of larger models."
)
SMALL_TEXTS = (
    "The model is small, the trainings short, and one accuracy out of domain is of some 500 sentences: a difference "
    "within the interval may be there in longer trainings of larger models."
)

QUESTIONS = (
    Question(
        1,
        "What does a step cost?",
        "How long is a training step of DynMoE against a dense model's, and against that of an unmodified top-k at "
        "equal mean k?",
        (),
        step_times,
        "Ratios are of this machine's CPU and these sizes. They say nothing of a GPU, nor of several ranks. The "
        "unmodified top-k is a plain loop over the experts, as most code has it, without an auxiliary loss.",
        "Ratios are of this machine's CPU and a model of six layers, two of which are mixtures. They say nothing of a "
        "GPU, nor of several ranks. There is no unmodified top-k among the text models.",
    ),
    Question(
        2,
        "How large is the spread over the seeds?",
        "DynMoE's tables have no standard deviations. How far do runs that differ in the seed alone lie apart?",
        tuple(name for name, variant in VARIANTS.items() if variant.row != "plain"),
        spreads,
        "A standard deviation of few seeds is itself uncertain: of five, by a factor of 0.6 to 2.9. Seeds change start "
        "weights, batches and the split, and not the images of the angle left out.",
        "A standard deviation of few seeds is itself uncertain: of three, by a factor of 0.5 to 6.3. Seeds change "
        "batches and the start of what is new, not the pretrained model nor the texts.",
    ),
    Question(
        3,
        "From scratch or fine-tuned?",
        "DynMoE's vision and language results fine-tune pretrained models. Does it do as well from random weights?",
        ("dense", FIXED, "dynmoe", "dense-tuned", f"{FIXED}-tuned", "dynmoe-tuned"),
        starts,
        f"The dense start was trained for as many steps, on other angles of the same images. {SMALL}",
        None,
    ),
    Question(
        4,
        "Equal or score-weighted experts?",
        "DynMoE takes the mean over a token's experts. Would weights by score be better?",
        ("dynmoe", "dynmoe-score-weighted", "dynmoe-normalized"),
        against("dynmoe", ("dynmoe-score-weighted", "dynmoe-normalized")),
        "Scores are sigmoids of a cosine, so that they lie between 0.27 and 0.73 and no expert counts as three others. "
        f"Other weights, such as a softmax with a temperature, are not tried. {SMALL}",
        "Scores are sigmoids of a cosine, so that they lie between 0.27 and 0.73 and no expert counts as three others. "
        f"Other weights, such as a softmax with a temperature, are not tried. {SMALL_TEXTS}",
    ),
    Question(
        5,
        "What does each auxiliary term do alone?",
        "The loss has a diversity and a simplicity term, and DynMoE-DeepSpeed adds load balance and efficiency. What "
        "does each do by itself, and what happens without any?",
        ("dynmoe", *[f"dynmoe-{term}" for term in AUX_TERMS], "dynmoe-no-aux"),
        against("dynmoe", (*[f"dynmoe-{term}" for term in AUX_TERMS], "dynmoe-no-aux")),
        f"Every term has the weight 0.01; other weights are not tried. {SMALL}",
        f"Every term has the weight 0.01; other weights are not tried. {SMALL_TEXTS}",
    ),
    Question(
        6,
        "Growth alone, pruning alone?",
        "Is it growth or pruning that matters, and does a fixed number of experts do as well?",
        ("dynmoe", "dynmoe-growth", "dynmoe-pruning", "dynmoe-fixed"),
        against("dynmoe", ("dynmoe-growth", "dynmoe-pruning", "dynmoe-fixed")),
        "Where no expert falls silent, pruning has nothing to do, and growth alone is DynMoE itself; training starts "
        f"with four experts, so that growth is needed more than where it starts with many. {SMALL}",
        "Where no expert falls silent, pruning has nothing to do, and growth alone is DynMoE itself; training starts "
        f"with eight experts that are equal. {SMALL_TEXTS}",
    ),
    Question(
        7,
        "How often should experts be checked?",
        "Does the interval between checks matter?",
        ("dynmoe", *[f"dynmoe-every-{n}" for n in INTERVALS]),
        against("dynmoe", tuple(f"dynmoe-every-{n}" for n in INTERVALS)),
        "A check adds at most one expert a layer, so that the interval also limits how many there can be: its effect "
        f"is not told apart from that of the number of experts. {SMALL}",
        "A check adds at most one expert a layer, so that the interval also limits how many there can be: its effect "
        f"is not told apart from that of the number of experts. {SMALL_TEXTS}",
    ),
    Question(
        8,
        "What should a grown expert start from?",
        "Upstream leaves what the slot held. Does it matter whether a grown expert starts from that (`keep`), from new "
        "weights (`fresh`), from the mean of the others (`mean`), or from the nearest one, the default?",
        ("dynmoe", *[f"dynmoe-init-{init}" for init in INITS]),
        against("dynmoe", tuple(f"dynmoe-init-{init}" for init in INITS)),
        f"`keep` and `fresh` are both random here, as no slot was used before it grew. {SMALL}",
        "All experts at start are copies of one pretrained MLP, and have trained for few steps where one grows. "
        f"{SMALL_TEXTS}",
    ),
    Question(
        9,
        "How often does evaluation fall back to the best expert?",
        "A token that passes no threshold takes its best expert in evaluation and gets nothing in training. How often?",
        ("dynmoe", BUDGET, "dynmoe-tuned"),
        fallback(("dynmoe", BUDGET, "dynmoe-tuned")),
        "Shares are of tokens of small images in a model of four blocks; deeper models have other layers.",
        "Shares are of tokens of short sentences in a model of six layers; deeper models have other layers.",
    ),
    Question(
        10,
        "How do other dynamic routers do at the same mean k?",
        f"Other methods choose the number of experts too. How do they compare at a mean of {K} experts a token?",
        ("dense", FIXED, "dynmoe", BUDGET, *[variant.name for variant in ROUTERS]),
        against(BUDGET, ("dense", FIXED, "dynmoe", *[variant.name for variant in ROUTERS]), (OUT, IN, MEAN_K)),
        "The other routers have eight experts from the start, and their settings were not searched beyond what a short "
        f"training needs. Where mean k is off {K}, a row is not at equal compute. {SMALL}",
        "The other routers have eight experts from the start, and their settings were not searched beyond what a short "
        f"training needs. Where mean k is off {K}, a row is not at equal compute. {SMALL_TEXTS}",
    ),
    Question(
        11,
        "What does raggedness cost?",
        "Hardware likes equal numbers. What does it cost that tokens have different numbers of experts, at equally "
        "many assignments?",
        (),
        raggedness,
        "This is one layer on this machine's CPU, whose kernels compute the rows that there are. On a GPU tiles are "
        "filled in steps, and several ranks wait for the slowest: neither is measured here.",
        None,
    ),
)
NUMBERS = tuple(each.number for each in QUESTIONS)
OF_TEXTS = tuple(each.number for each in QUESTIONS if each.of_texts is not None)


def question(number: int) -> Question:
    """The question of a number of NUMBERS."""
    return QUESTIONS[number - 1]
