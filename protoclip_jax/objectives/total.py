"""The whole objective of a step, and what there is to log about it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from protoclip_jax.objectives.info_nce import info_nce
from protoclip_jax.objectives.logits import wide
from protoclip_jax.objectives.prototype import prototype_loss


@dataclass(frozen=True)
class Weights:
    """Weights of InfoNCE, of the prototype terms and of the external teacher's terms."""

    clip: float | int = 1.0
    proto: float | int = 0.0
    external: float | int = 0.0


class _Side(NamedTuple):
    """One prototype term: which features are scored against what, and by whose clusters."""

    name: str
    features: Any
    labels: Any
    student: Any
    teacher: Any
    counts: Any


def total_loss(
    features: Any,
    scales: dict,
    labels: dict,
    prototypes: dict,
    weights: Weights,
    temperature: float | int | None,
    back_translation: bool,
    mask_unused: bool,
    mesh: Mesh | None = None,
    compute_all: bool = False,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """w_clip InfoNCE + w_proto (L_I + L_T)/2 + w_ext (E_I + E_T)/2.

    Args:
        features: Has `image`, `text` (b, e) and `image_projected`, `text_projected` (b, d) or
            None, all L2-normalised.
        scales: Raw log values under "logit_scale" and "logit_scale_proto".
        labels: "image", "text" and perhaps "external": int32 (b,).
        prototypes: As `episodes.prototypes.build_prototypes` gives them; {} where no prototype
            term is computed.
        weights: A term of weight 0 is not computed, so it moves nothing (and cannot bring in NaN).
        temperature: Of the soft targets; None for hard ones. The external teacher is always hard.
        back_translation: Whether a student meets its own modality's means; without, it meets the
            other modality's centroids, as in the reference.
        mask_unused: Whether prototypes without members leave the softmax.
        mesh: Spreads the batch over all its axes.
        compute_all: The reference's way: also compute terms of weight 0, where there are
            prototypes for them, and add them times 0.

    Returns:
        The loss, and the metrics of what was computed: `loss/total`, `loss/clip`,
        `loss/prototype` with `_image` and `_text`, `loss/external` likewise (all unweighted),
        `accuracy/...` of the four sides in percent, `temperature/clip` and
        `temperature/prototype` of this step, and `geometry/...` of the un-projected features.

    Raises:
        ValueError: Nothing has a weight, or a term lacks what it needs.
    """
    terms = {}
    metrics = {}
    if weights.clip or compute_all:
        terms["clip"] = info_nce(features.image, features.text, scales["logit_scale"], mesh=mesh)
        metrics["temperature/clip"] = _temperature(scales["logit_scale"])
    sides = {}
    if weights.proto or (compute_all and "image" in prototypes):
        _check_projected(features, "prototype")
        sides["prototype"] = _modality_sides(features, labels, prototypes, back_translation)
    if weights.external or (compute_all and back_translation and "external" in prototypes):
        _check_projected(features, "external")
        _check_external(labels, prototypes, back_translation)
        sides["external"] = _external_sides(features, labels, prototypes)
    for term, pair in sides.items():
        losses, found = zip(
            *(_side_loss(side, scales, temperature, mask_unused, mesh) for side in pair),
            strict=True,
        )
        terms[term] = (losses[0] + losses[1]) / 2
        metrics |= found[0] | found[1]
        metrics["temperature/prototype"] = _temperature(scales["logit_scale_proto"])
    if not terms:
        raise ValueError(f"nothing to train: all weights are 0 ({weights})")
    weight_of = {
        "clip": weights.clip,
        "prototype": weights.proto,
        "external": weights.external,
    }
    total = sum(weight_of[term] * loss for term, loss in terms.items())
    metrics |= {f"loss/{term}": loss for term, loss in terms.items()}
    metrics["loss/total"] = total
    metrics |= feature_statistics(features.image, features.text)
    return total, {name: jax.lax.stop_gradient(value) for name, value in metrics.items()}


def _side_loss(
    side: _Side, scales: dict, temperature: float | int | None, mask_unused: bool, mesh: Mesh | None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """A side's loss, and what there is to log about it."""
    loss, accuracy = prototype_loss(
        side.features,
        scales["logit_scale_proto"],
        side.student,
        side.teacher,
        side.labels,
        side.counts > 0 if mask_unused else None,
        None if side.teacher is None else temperature,
        mesh=mesh,
    )
    return loss, {f"loss/{side.name}": loss, f"accuracy/{side.name}": accuracy}


def feature_statistics(
    image_bd: Float[Array, "b d"], text_bd: Float[Array, "b d"]
) -> dict[str, Float[Array, ""]]:
    """How spread the features of a batch are, and how far the modalities lie apart.

    `geometry/image_std` and `geometry/text_std`: mean over dimensions of the unbiased standard
    deviation over the batch. `geometry/modality_gap`: distance of the means.
    `geometry/pair_similarity`: mean dot product within the pairs.
    (Reference: what its training loop logs, there of one local batch.)
    """
    image_bd, text_bd = wide(image_bd, text_bd)
    gap_d = jnp.mean(image_bd, axis=0) - jnp.mean(text_bd, axis=0)
    return {
        "geometry/image_std": jnp.mean(jnp.std(image_bd, axis=0, ddof=1)),
        "geometry/text_std": jnp.mean(jnp.std(text_bd, axis=0, ddof=1)),
        "geometry/modality_gap": jnp.linalg.norm(gap_d),
        "geometry/pair_similarity": jnp.mean(jnp.sum(image_bd * text_bd, axis=1)),
    }


def _modality_sides(features, labels, prototypes, back_translation) -> tuple[_Side, _Side]:
    """L_I: image features, taught by the text clusters. L_T: the other way round."""
    image, text = prototypes["image"], prototypes["text"]
    text_in_image = prototypes["text_in_image"] if back_translation else text["centroids"]
    image_in_text = prototypes["image_in_text"] if back_translation else image["centroids"]
    return (
        _Side(
            name="prototype_image",
            features=features.image_projected,
            labels=labels["text"],
            student=text_in_image,
            teacher=text["centroids"],
            counts=text["counts"],
        ),
        _Side(
            name="prototype_text",
            features=features.text_projected,
            labels=labels["image"],
            student=image_in_text,
            teacher=image["centroids"],
            counts=image["counts"],
        ),
    )


def _external_sides(features, labels, prototypes) -> tuple[_Side, _Side]:
    """E_I and E_T: either modality against the external clusters' means in its own space."""
    external = prototypes["external"]
    counts, own = external["counts"], labels["external"]
    return (
        _Side("external_image", features.image_projected, own, external["in_image"], None, counts),
        _Side("external_text", features.text_projected, own, external["in_text"], None, counts),
    )


def _temperature(logit_scale):
    (logit_scale,) = wide(logit_scale)
    return jnp.exp(-logit_scale)


def _check_projected(features, term: str) -> None:
    if features.image_projected is None or features.text_projected is None:
        raise ValueError(
            f"the {term} term has a weight, but the model has no projection heads; add them or "
            "set the weight to 0"
        )


def _check_external(labels, prototypes, back_translation: bool) -> None:
    if not back_translation:
        raise ValueError(
            "the external term has a weight, but back translation is off, without which external "
            "clusters have no prototypes here; turn it on or set the weight to 0"
        )
    if "external" not in prototypes or "external" not in labels:
        raise ValueError(
            "the external term has a weight, but there are no external labels and prototypes; "
            "give a teacher or set the weight to 0"
        )
