"""Quality on real sentences, and speed, of variants of one model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..progress import track
from .variants import Variant

# (batch, tokens): a search query, a paragraph, a batch of paragraphs.
SHAPES = ((1, 16), (1, 128), (8, 128))

BATCH = 32


def embed(variants: Sequence[Variant], texts: Sequence[str], progress: bool | None) -> list[Tensor]:
    """The normalized embeddings of each variant: (sentences, 384)."""
    batches = [list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    parts: list[list[Tensor]] = [[] for _ in variants]
    steps = [(index, batch) for batch in batches for index in range(len(variants))]
    for index, batch in track(steps, "quality", progress):
        options = {"convert_to_tensor": True, "show_progress_bar": False, "batch_size": BATCH}
        parts[index].append(variants[index].model.encode(batch, **options).float().cpu())
    return [torch.cat(part) for part in parts]


def quality(embeddings: Tensor, reference: Tensor) -> dict[str, float]:
    """cosine: mean over sentences of the cosine to the reference. relative_error: ||e - e0|| / ||e0||.
    neighbours: the share of sentences whose nearest other sentence is the same one."""
    e, e0 = embeddings.double(), reference.double()
    same = _nearest(e) == _nearest(e0)
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(e, e0).mean()),
        "relative_error": float((e - e0).norm() / e0.norm()),
        "neighbours": float(same.double().mean()),
    }


def _nearest(e: Tensor) -> Tensor:
    similar = e @ e.T
    return similar.fill_diagonal_(-torch.inf).argmax(1)


def latencies(
    variants: Sequence[Variant], seconds: float, min_rounds: int, progress: bool | None
) -> list[dict[str, Any]]:
    """Per variant: shape name -> median_ms, q1_ms, q3_ms, rounds; of the transformer's forward on token ids.

    The variants take turns in every round. seconds: about how long each shape takes in all.
    """
    results: list[dict[str, Any]] = [{} for _ in variants]
    feeds = [(f"{batch}x{tokens}", _inputs(batch, tokens)) for batch, tokens in SHAPES]
    with torch.inference_mode():
        plan = []
        for shape, inputs in feeds:
            once = sum(min(_timed(v, inputs) for _ in range(2)) for v in variants)
            rounds = min(max(int(seconds / once), min_rounds), 200)
            plan += [(shape, inputs)] * rounds
        times: dict[str, list[list[float]]] = {shape: [[] for _ in variants] for shape, _ in feeds}
        for shape, inputs in track(plan, "speed", progress):
            for mine, variant in zip(times[shape], variants, strict=True):
                mine.append(_timed(variant, inputs) * 1e3)
    for shape, per_variant in times.items():
        for result, mine in zip(results, per_variant, strict=True):
            q1, median, q3 = statistics.quantiles(mine, n=4, method="inclusive")
            result[shape] = {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "rounds": len(mine)}
    return results


def _inputs(batch: int, tokens: int) -> dict[str, Tensor]:
    """Token ids from all over the vocabulary, no padding."""
    ids = (torch.arange(batch * tokens).view(batch, tokens) * 7919) % 28000 + 1000
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _timed(variant: Variant, inputs: dict[str, Tensor]) -> float:
    """Seconds of one forward."""
    forward = variant.model[0].auto_model
    start = time.perf_counter()
    forward(**inputs)
    return time.perf_counter() - start
