"""Human evaluation: a blinded page to rate answers on, and what the ratings say."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from saap.core.errors import EvaluationError

CRITERIA = ("coherence", "accuracy")
SCALE = (1, 2, 3, 4, 5)
DRAWS = 2000
COLUMNS = ("kit", "rater", "item", "answer", *CRITERIA)


class KitKey(BaseModel):
    """Which system wrote which answer: (item, answer letter) -> name. kit: the identity that ratings must carry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kit: str
    systems: tuple[str, ...]
    items: dict[str, dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HumanKit:
    """A page that shows answers without their systems, and the key that stays with the one who asks."""

    page: str
    key: KitKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """One rater's rating of one system's answer to one item, on SCALE by criterion."""

    rater: str
    item: str
    system: str
    scores: Mapping[str, int]


def build_kit(answers: Mapping[str, Mapping[str, str]], *, seed: int = 0) -> HumanKit:
    """A page with all answers, items and answers in a random order.

    answers: system -> prompt -> text, the same prompts for each. Raises EvaluationError if they differ.
    """
    systems = tuple(answers)
    prompts = list(answers[systems[0]]) if systems else []
    if len(systems) < 2 or not prompts:
        raise EvaluationError("a comparison by people needs answers of two models", "Name another with --dense")
    if any(list(answers[system]) != prompts for system in systems):
        raise EvaluationError("the models answered different prompts", "Let all answer the same")
    shuffle = random.Random(seed)
    order = list(prompts)
    shuffle.shuffle(order)
    items, shown = {}, []
    for number, prompt in enumerate(order, start=1):
        mixed = list(systems)
        shuffle.shuffle(mixed)
        letters = dict(zip("ABCDEFGHIJ", mixed, strict=False))
        items[str(number)] = letters
        texts = [{"letter": letter, "text": answers[system][prompt]} for letter, system in letters.items()]
        shown.append({"item": str(number), "prompt": prompt, "answers": texts})
    content = json.dumps([shown, seed], ensure_ascii=False)
    kit = hashlib.sha256(content.encode()).hexdigest()[:12]
    template = (resources.files("saap.evaluation") / "human_kit.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(
        kit=kit, items=shown, criteria=CRITERIA, scale=SCALE, columns=",".join(COLUMNS)
    )
    return HumanKit(page=page, key=KitKey(kit=kit, systems=systems, items=items))


def key_path(page: Path) -> Path:
    """Where the key of a page lies."""
    return page.with_name(page.name.removesuffix(".html") + ".key.json")


def read_key(path: Path) -> KitKey:
    """The key that was written beside the page. Raises EvaluationError."""
    try:
        return KitKey.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EvaluationError(f"the key {path} cannot be read ({error.strerror})", "Name it with --human-key") from None
    except ValidationError:
        raise EvaluationError(f"{path} is no key of a human evaluation", "Name the KIT.key.json of the page") from None


def read_ratings(path: Path, key: KitKey) -> list[Rating]:
    """The ratings that a page saved. Raises EvaluationError, naming file and line, for anything else."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(
            f"the ratings {path} cannot be read ({error})", "Give the CSV that the page saved"
        ) from None
    ratings = []
    for number, row in enumerate(rows, start=2):
        try:
            if row["kit"] != key.kit:
                raise ValueError(f"it belongs to kit {row['kit']}, not {key.kit}")
            scores = {name: int(row[name]) for name in CRITERIA}
            if any(score not in SCALE for score in scores.values()):
                raise ValueError(f"a rating is not one of {SCALE[0]} to {SCALE[-1]}")
            system = key.items[row["item"]][row["answer"]]
        except (KeyError, ValueError, TypeError) as error:
            raise EvaluationError(
                f"{path}, line {number}, is no rating ({error})", "Give the CSV of this kit"
            ) from None
        ratings.append(Rating(rater=row["rater"] or path.name, item=row["item"], system=system, scores=scores))
    if not ratings:
        raise EvaluationError(f"{path} has no ratings", f"Give a CSV with the columns {', '.join(COLUMNS)}")
    return ratings


def judge(ratings: Sequence[Rating], *, seed: int = 0) -> dict[str, Any]:
    """Mean scores, win rates with 95 % intervals, and agreement between raters, by criterion.

    A system wins an item against another where the mean of the raters' scores is higher; a tie is half a win.
    Intervals: percentile bootstrap over the items. Agreement: Krippendorff's alpha for interval data.
    """
    return {
        "raters": len({rating.rater for rating in ratings}),
        "items": len({rating.item for rating in ratings}),
        **{criterion: _judge_one(ratings, criterion, seed) for criterion in CRITERIA},
    }


def _judge_one(ratings: Sequence[Rating], criterion: str, seed: int) -> dict[str, Any]:
    scores: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    by_answer: defaultdict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for rating in ratings:
        scores[rating.system][rating.item].append(rating.scores[criterion])
        by_answer[rating.item, rating.system][rating.rater] = rating.scores[criterion]
    means = {system: {item: float(np.mean(given)) for item, given in items.items()} for system, items in scores.items()}
    wins = {}
    for first, second in itertools.permutations(sorted(means), 2):
        shared = sorted(set(means[first]) & set(means[second]))
        if shared:
            gaps = np.array([means[first][item] - means[second][item] for item in shared])
            wins[f"{first} over {second}"] = _with_interval((np.sign(gaps) + 1) / 2, seed)
    return {
        "mean": {system: _with_interval(np.array(list(items.values())), seed) for system, items in means.items()},
        "win_rate": wins,
        "agreement": krippendorff_alpha(list(by_answer.values())),
    }


def _with_interval(values: np.ndarray[Any, Any], seed: int) -> dict[str, float]:
    draws = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def krippendorff_alpha(units: Sequence[Mapping[str, float]]) -> float | None:
    """Agreement of raters: 1 - observed / expected disagreement, with squared differences (interval data).

    units: what was rated, rater -> value each; those with one rating count nothing. None without two ratings of
    anything, or where all values are equal. Source: Krippendorff, Content Analysis, 2004.
    """
    paired = [list(unit.values()) for unit in units if len(unit) > 1]
    values = np.array([value for unit in paired for value in unit], dtype=float)
    if len(values) < 2 or not values.std():
        return None
    observed = sum(
        sum((first - second) ** 2 for first in unit for second in unit) / (len(unit) - 1) for unit in paired
    ) / len(values)
    expected = sum(((values - value) ** 2).sum() for value in values) / (len(values) * (len(values) - 1))
    return float(1 - observed / expected)
