"""What an encoder's embeddings are worth without fine-tuning: collapse, neighbors and a linear probe.

Every self-supervised run leaves this report: the trained encoder beside the same encoder at random initialization, on
the same folds of labeled frames. Near-duplicate frames never lie on both sides of a fold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from polypseg.files import environment_record, write_json, write_text
from polypseg.pretraining.probes.figures import draw_loss_curve, draw_neighbors, draw_reconstructions
from polypseg.pretraining.probes.labeled import FOLDS, LabeledFrames, load_labeled, majority_share
from polypseg.pretraining.probes.scores import (
    INTERVAL,
    NEIGHBORS,
    PROBE_C,
    REPEATS,
    FoldScores,
    check_embeddings,
    difference,
    knn_scores,
    probe_scores,
    smallest_training_part,
)
from polypseg.tables import Column, Table, with_bounds

__all__ = [
    "FoldScores",
    "LabeledFrames",
    "difference",
    "draw_loss_curve",
    "draw_neighbors",
    "draw_reconstructions",
    "embed",
    "embedding_spread",
    "knn_scores",
    "load_labeled",
    "majority_share",
    "probe_scores",
    "write_report",
]

SHEET_QUERIES, SHEET_NEIGHBORS = 8, 6
LIMITS = (
    "One pretraining run beside one random start: the intervals cover the choice of frames, not the seeds. Folds keep "
    "frames that look alike together, but folders name no videos or patients: frames of one video can lie on both "
    "sides of a fold and raise the scores of both encoders. Read the difference, not the height. Not a medical device."
)


def embedding_spread(z: Tensor) -> Tensor:
    """Collapse detector: embeddings (B, D) -> (), between 0 (all point the same way) and 1 (directions spread evenly).

    Standard deviation over the batch of each dimension of z / |z|, mean over dimensions, times sqrt(D): an isotropic
    Gaussian has 1/sqrt(D) a dimension (SimSiam, Chen & He 2021, section 4.1). Computed in float32, without gradient.
    Raises ValueError unless z has two dimensions.
    """
    if z.ndim != 2:
        raise ValueError(f"embeddings must be (B, D), not {tuple(z.shape)}")
    directions = F.normalize(z.detach().float(), dim=1)
    return directions.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5


def normalize(pixels: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, (x / 255 - mean) / std; channels last in memory."""
    center, scale = (torch.tensor(values, dtype=torch.float32, device=pixels.device) for values in (mean, std))
    return ((pixels.float() / 255 - center) / scale).movedim(-1, -3)


def normalized_batches(
    frames: LabeledFrames,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    device: torch.device | str,
) -> Iterator[Tensor]:
    """All frames in order, as (B, 3, S, S); mean and std are per channel in [0, 1] units."""
    for start in range(0, len(frames), batch_size):
        pixels = torch.from_numpy(frames.images[start : start + batch_size]).to(device)
        yield normalize(pixels, mean=mean, std=std)


@torch.inference_mode()
def embed(
    features: Callable[[Tensor], Tensor],
    frames: LabeledFrames,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    device: torch.device | str,
) -> NDArray[np.float32]:
    """Embeddings (N, D) of all frames; ``features`` maps (B, 3, S, S) to (B, D), and its model is in eval mode already.

    mean and std are per channel in [0, 1] units. Raises ValueError when the embeddings are not (B, D), PolypSegError
    when they are not finite.
    """
    batches = normalized_batches(frames, mean=mean, std=std, batch_size=batch_size, device=device)
    total = -(-len(frames) // batch_size)
    bar = tqdm(batches, total=total, desc="embedding", unit="batch", leave=False, disable=None)
    embeddings = torch.cat([features(batch).float().cpu() for batch in bar]).numpy()
    check_embeddings(embeddings, frames)
    return embeddings


def write_report(
    folder: Path,
    *,
    trained: NDArray[np.float32],
    untrained: NDArray[np.float32],
    frames: LabeledFrames,
    title: str,
    facts: dict[str, Any],
) -> Path:
    """Write ``representation.json``, ``representation.md`` and ``neighbours.png``; return the Markdown's path.

    trained, untrained: embeddings (N, D) by the trained encoder and by the same one at random initialization. ``facts``
    (JSON values) is repeated as it is. Raises UsageError for too few frames, PolypSegError for embeddings that are not
    finite or a folder that cannot be written.
    """
    numbers = _compare(trained, untrained, frames) | {"title": title, "facts": facts}
    _draw_sheet(folder / "neighbours.png", trained, frames, title=title)
    write_json(folder / "representation.json", numbers | {"environment": environment_record()})
    return write_text(folder / "representation.md", _render_markdown(numbers))


def _compare(trained: NDArray[np.float32], untrained: NDArray[np.float32], frames: LabeledFrames) -> dict[str, Any]:
    """Every number of the report."""
    k = min(NEIGHBORS, smallest_training_part(frames, folds=FOLDS, repeats=REPEATS, seed=0))
    knn = [knn_scores(embeddings, frames, k=k) for embeddings in (trained, untrained)]
    probe = [probe_scores(embeddings, frames) for embeddings in (trained, untrained)]
    spreads = [float(embedding_spread(torch.from_numpy(embeddings))) for embeddings in (trained, untrained)]
    return {
        "n": len(frames),
        "classes": dict(zip(frames.classes, np.bincount(frames.labels).tolist(), strict=True)),
        "groups": len(np.unique(frames.groups)),
        "image_size": frames.images.shape[1],
        "content_id": frames.content_id,
        "chance": {"accuracy": majority_share(frames), "balanced_accuracy": 1 / len(frames.classes)},
        "folds": {"folds": FOLDS, "repeats": REPEATS, "seed": 0, "id": knn[0].folds_id},
        "interval": INTERVAL,
        "spread": {"trained": spreads[0], "untrained": spreads[1]},
        "knn": {"k": k, "metric": "cosine", "weights": "inverse distance"} | _sides(*knn),
        "probe": {"C": PROBE_C, "features": "standardized"} | _sides(*probe),
        "limits": LIMITS,
    }


def _sides(trained: FoldScores, untrained: FoldScores) -> dict[str, Any]:
    return {
        "trained": trained.summary(),
        "untrained": untrained.summary(),
        "difference": difference(trained, untrained).summary(),
    }


def _render_markdown(numbers: dict[str, Any]) -> str:
    """The report for people, from the numbers of ``representation.json``."""
    classes = ", ".join(f"{name} {count}" for name, count in numbers["classes"].items())
    folds, chance = numbers["folds"], numbers["chance"]
    lines = [
        f"# Representation: {numbers['title']}",
        "",
        f"n = {numbers['n']} frames of {len(numbers['classes'])} classes ({classes}), content id "
        f"{numbers['content_id']}; {numbers['groups']} groups of frames that look alike, none split between folds. "
        f"{folds['repeats']} times {folds['folds']} folds, the same for both encoders.",
        "",
    ]
    titles = {"knn": f"k-NN (k = {numbers['knn']['k']}, cosine)", "probe": f"linear probe (C = {PROBE_C:g})"}
    records: list[dict[str, str | None]] = []
    for key, method in titles.items():
        for metric in ("accuracy", "balanced_accuracy"):
            trained, untrained, gain = (numbers[key][side][metric] for side in ("trained", "untrained", "difference"))
            records.append(
                {
                    "measure": f"{method}, {metric.replace('_', ' ')}",
                    "trained": score_cell(trained),
                    "untrained": score_cell(untrained),
                    "difference": score_cell(gain, sign="+"),
                    "chance": f"{chance[metric]:.3f}",
                }
            )
    trained, untrained = numbers["spread"]["trained"], numbers["spread"]["untrained"]
    records.append(
        {
            "measure": "spread of embeddings",
            "trained": f"{trained:.3f}",
            "untrained": f"{untrained:.3f}",
            "difference": f"{trained - untrained:+.3f}",
            "chance": None,
        }
    )
    columns = [
        Column("measure", "measure"),
        Column("trained", "trained"),
        Column("random initialization", "untrained"),
        Column("difference, paired", "difference"),
        Column("chance", "chance"),
    ]
    lines += [
        Table(columns=columns, records=records).markdown(),
        "",
        f"Intervals: {INTERVAL}. Chance: always the most frequent class. Spread: 0 when all embeddings point the same "
        "way (collapse), 1 when directions are spread evenly.",
        "",
        LIMITS,
        "",
        *(f"- {name}: {value}" for name, value in numbers["facts"].items()),
        "",
        "![Nearest neighbors](neighbours.png)",
        "",
    ]
    return "\n".join(lines)


def score_cell(value: Mapping[str, Any], *, sign: str = "") -> str:
    """A score with its interval: ``0.612 [0.580, 0.644]``."""
    return with_bounds(value["mean"], value["low"], value["high"], sign=sign)


def choose_queries(frames: LabeledFrames) -> NDArray[np.int64]:
    """Indices of up to 8 frames, evenly spaced over the classes and within each."""
    wanted = np.arange(SHEET_QUERIES) * len(frames.classes) // SHEET_QUERIES
    chosen: list[int] = []
    for label in np.unique(wanted):
        members, count = np.flatnonzero(frames.labels == label), np.count_nonzero(wanted == label)
        chosen += [int(members[(2 * i + 1) * len(members) // (2 * count)]) for i in range(count)]
    return np.unique(chosen)


def nearest_elsewhere(
    embeddings: NDArray[np.float32], frames: LabeledFrames, queries: NDArray[np.int64], *, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Indices and cosine similarities (Q, count) of the nearest frames that are no near-duplicates of the query."""
    directions = F.normalize(torch.from_numpy(embeddings), dim=1).numpy()
    similarity = directions[queries] @ directions.T
    similarity[frames.groups[queries][:, None] == frames.groups[None, :]] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(similarity, order, axis=1)


def _draw_sheet(path: Path, embeddings: NDArray[np.float32], frames: LabeledFrames, *, title: str) -> None:
    check_embeddings(embeddings, frames)
    queries = choose_queries(frames)
    neighbors, similarities = nearest_elsewhere(embeddings, frames, queries, count=SHEET_NEIGHBORS)
    alike = frames.labels[neighbors] == frames.labels[queries][:, None]
    share = np.bincount(frames.labels)[frames.labels[queries]].mean() / len(frames)
    draw_neighbors(
        path,
        images=frames.images,
        names=[frames.classes[label] for label in frames.labels],
        queries=queries,
        neighbors=neighbors,
        similarities=similarities,
        title=title,
        note=f"Trained encoder, cosine similarity, near-duplicates of the query left out. {alike.sum()} of "
        f"{alike.size} neighbors are of the query's class; random frames would give {share * alike.size:.0f}. "
        f"An illustration: the scores on all {len(frames)} frames are in representation.md.",
    )
