"""The plan of a run: everything checked and laid out before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanda.chain import channels_of, watch
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.skeleton import Skeleton
from wanda.checkpoint.source import is_timm, load_config, read_config, resolve, stored_dtype
from wanda.checkpoint.writer import output_faults, partial_folder
from wanda.composition import Composition
from wanda.device import available_memory, compute_dtype, pick_device
from wanda.errors import ConfigurationError
from wanda.images import PREFIX, calibration_images, is_images, load_processor, pixel_values
from wanda.memory import resident_memory
from wanda.patterns import NM, Pattern, Unstructured, Variant, exact, group_named
from wanda.recipe import Recipe, parse_bytes
from wanda.statistics import Needs
from wanda.walk import expert_memory, groups_of
from wanda.weights import UNTOLD, Matrix, find_matrices, takes_routes

_TOKENS = 1024  # of a micro-batch: its activations stay in the cache
_OF_CALIBRATION = frozenset(
    ("calibration", "samples", "seqlen", "seed", "skip_unreadable", "propagate", "experts", "expert_tokens", "batch")
)  # options that nothing but a calibration uses
_CONTEXT = 2048  # tokens of a sequence unless said otherwise
EXPERTS_SHARE = 4  # of the available memory, one part goes to the Gram matrices of experts
_UNTOLD = 400 << 20  # bytes of this process, where the system does not tell
_SLACK = 200 << 20  # bytes: allocator, thread pools, libraries that are loaded on the way


@dataclass
class Plan:
    """A run that can start: all faults are out.

    recipe: resolved. matrices: to be pruned, a list a block. dense: parameters left dense, name to reason.
    batch: sequences a micro-batch. world: processes that share the run.
    activation_folder: where activations go when memory is short, else None.
    experts_memory: bytes that the Gram matrices of a block's experts, with their factors, may take at once.
    image: channels, height, width of an image of calibration, where those are images; seqlen is then the most places
        (patches, pixels of a map) that an image has between blocks.
    memory: estimated peak bytes. notes: decisions the user should see.
    """

    model: str
    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    out: Path
    matrices: list[list[Matrix]]
    dense: dict[str, str]
    seqlen: int
    batch: int
    calibrated: bool
    activation_folder: Path | None = None
    experts_memory: int | None = None
    memory: int = 0
    notes: list[str] = field(default_factory=list)
    world: int = 1
    image: tuple[int, ...] | None = None

    @property
    def share(self) -> int:
        """Calibration tokens of the process that has most: whole micro-batches."""
        batches = -(-self.recipe.samples // self.batch)
        return min(self.recipe.samples, -(-batches // self.world) * self.batch) * self.seqlen

    def calibration_tokens(self) -> tuple[Tensor | None, list[str]]:
        """Token ids [samples, seqlen], or images [samples, channels, height, width], and notes on them.

        None when the method needs no calibration.
        """
        if not self.calibrated:
            return None, []
        from wanda.calibration import token_ids
        from wanda.checkpoint.source import load_tokenizer

        notes: list[str] = []
        recipe = self.recipe
        if self.image is not None:
            pixels = calibration_images(
                recipe.calibration.removeprefix(PREFIX),
                load_processor(self.checkpoint.folder, recipe.trust_remote_code),
                samples=recipe.samples,
                seed=recipe.seed,
                skip_unreadable=recipe.skip_unreadable,
                channels=self.image[0],
                notes=notes,
            )
            return pixels, notes
        tokenizer = load_tokenizer(self.checkpoint.folder, recipe.trust_remote_code)
        ids = token_ids(
            recipe.calibration,
            tokenizer,
            samples=recipe.samples,
            seqlen=self.seqlen,
            seed=recipe.seed,
            notes=notes,
        )
        return ids, notes

    def loaded_by(self) -> str:
        """The function that loads the result."""
        if is_timm(read_config(self.checkpoint.folder)):
            return "timm.create_model('local-dir:DIR', pretrained=True)"
        kind = "CausalLM" if self.skeleton.blocks.chain is None else "ImageClassification"
        return f"AutoModelFor{kind}.from_pretrained"

    def pattern(self, matrix: Matrix) -> Pattern:
        """The pattern of a matrix before any allocation."""
        own = self.recipe.sparsity_for(matrix.name)
        return pattern_of(self.recipe, exact(self.recipe.sparsity or 0) if own is None else own)

    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(matrix.numel for block in self.matrices for matrix in block)

    def removed(self) -> int:
        """Number of weights that will go under a uniform allocation."""
        return sum(self.pattern(m).removed(m.out, m.width) for block in self.matrices for m in block)

    def experts(self, block: int) -> list[Matrix]:
        """The experts of a block."""
        return [matrix for matrix in self.matrices[block] if matrix.expert is not None]

    def passes(self) -> int:
        """Dense passes a block of --propagate block: one for every group of experts whose Gram matrices fit."""
        if not self.calibrated:
            return 1
        assert self.recipe.update is not None
        needs = Composition(self.recipe.score, self.recipe.update).needs
        experts = (self.experts(index) for index in range(len(self.matrices)))
        return max(len(groups_of(some, needs, self.experts_memory)) for some in experts)

    def seconds(self) -> float:
        """A rough estimate of the run's time from this machine's speed at one small product of the compute type."""
        if not self.calibrated:
            return self.checkpoint.nbytes / 5e8
        size = 512
        a = torch.randn(size, size, device=self.skeleton.device).to(self.skeleton.dtype)
        (a @ a).sum().item()
        start, rounds = time.perf_counter(), 0
        while time.perf_counter() - start < 0.2:
            (a @ a).sum().item()
            rounds += 1
        rate = 2 * size**3 * rounds / (time.perf_counter() - start)
        recipe = self.recipe
        composition = Composition(recipe.score, recipe.update or "none")
        passes = (1.2 if recipe.propagate == "layer" else 1.0 + self.passes()) + (1 if recipe.inherit else 0)
        tokens = self.share
        work = 2.0 * self.weights() * tokens * passes
        if composition.needs == Needs.GRAM:
            work += sum(2.0 * tokens * m.width**2 + 30.0 * m.out * m.width**2 for block in self.matrices for m in block)
        return work / rate + self.checkpoint.nbytes / 5e8

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "model": self.model,
            "out": str(self.out),
            "recipe": self.recipe.as_dict(),
            "layers": [
                {
                    "name": m.name,
                    "shape": [m.out, m.width],
                    "pattern": self.pattern(m).text,
                    "sparsity": self.pattern(m).removed(m.out, m.width) / m.numel,
                }
                for block in self.matrices
                for m in block
            ],
            "left_dense": self.dense,
            "weights": self.weights(),
            "sparsity": self.removed() / max(1, self.weights()),
            "estimated_seconds": round(self.seconds(), 1),
            "estimated_memory_bytes": self.memory,
            "disk_bytes": self.checkpoint.nbytes,
            "notes": self.notes,
        }


def pattern_of(recipe: Recipe, sparsity: Fraction) -> Pattern:
    """The pattern that a resolved recipe asks for at a sparsity."""
    if recipe.pattern is not None:
        return NM.parse(recipe.pattern)
    if recipe.variant:
        return Variant(sparsity)
    assert recipe.group is not None
    return Unstructured(sparsity, group_named(recipe.group))


def make_plan(
    model: str | Path, out: Path, recipe: Recipe, overwrite: bool = False, resume: bool = False, world: int = 1
) -> Plan:
    """Check everything and lay the run out; loads no weights, writes nothing.

    world: number of processes that share the run, each with its part of the samples.
    Raises ConfigurationError with all faults that were found.
    """
    faults = recipe.faults()
    folder = None
    try:
        folder = resolve(str(model), recipe.trust_remote_code)
    except ConfigurationError as error:
        faults += error.faults
    faults += output_faults(out, folder, overwrite, resume)
    if folder is None:
        raise ConfigurationError(faults)
    checkpoint = skeleton = None
    try:
        checkpoint = Checkpoint.open(folder)
        device = pick_device(recipe.device)
        dtype = compute_dtype(device, recipe.dtype, stored_dtype(load_config(folder, recipe.trust_remote_code)))
        skeleton = Skeleton(checkpoint, dtype, device, recipe.trust_remote_code)
    except ConfigurationError as error:
        faults += [fault for fault in error.faults if fault not in faults]
    if checkpoint is None or skeleton is None:
        raise ConfigurationError(faults)
    chain = skeleton.blocks.chain
    seqlen, seqlen_faults = (chain.positions, []) if chain else sequence_length(skeleton.model, recipe)
    faults += seqlen_faults
    matrices, dense, matrix_faults = choose(skeleton.model, skeleton.blocks, recipe)
    faults += matrix_faults
    if faults:
        raise ConfigurationError(faults)
    asked, recipe = recipe, recipe.resolved()
    needs, notes = needs_of(recipe), _blocks_notes(skeleton)
    calibrated = needs > Needs.NOTHING
    image = image_shape(skeleton, recipe) if calibrated else None
    unused = sorted(asked.changed() & _OF_CALIBRATION) if not calibrated else []
    if unused:
        flags = ", ".join(f"--{name.replace('_', '-')} {getattr(asked, name)}" for name in unused)
        notes.append(f"not used, since {recipe.method} needs no calibration: {flags}")
    plan = Plan(
        str(model),
        checkpoint,
        skeleton,
        recipe,
        out,
        matrices,
        dense,
        seqlen,
        recipe.batch or max(1, _TOKENS // seqlen),
        calibrated,
        notes=notes,
        world=world,
        image=image,
    )
    _fit(plan)
    return plan


def needs_of(recipe: Recipe) -> Needs:
    """What calibration has to accumulate for a resolved recipe, its allocation included."""
    from wanda.allocation import ALLOCATIONS

    assert recipe.update is not None and recipe.allocation is not None
    return max(Composition(recipe.score, recipe.update).needs, ALLOCATIONS.get(recipe.allocation).needs)


def image_shape(skeleton: Skeleton, recipe: Recipe) -> tuple[int, ...] | None:
    """Channels, height and width of the calibration images of an image classifier; None for a decoder.

    Raises ConfigurationError when calibration and model do not go together, or the model has no processor, or one for
    other images.
    """
    chain, folder = skeleton.blocks.chain, skeleton.checkpoint.folder
    if (chain is not None) != is_images(recipe.calibration):
        what = "an image classifier, which is calibrated with images: --calibration images:FOLDER"
        text = "a decoder, which is calibrated with text: --calibration c4, builtin or a file"
        raise ConfigurationError(f"{folder} is {what if chain is not None else text}")
    if chain is None:
        return None
    from PIL import Image

    mode = "L" if channels_of(skeleton.model) == 1 else "RGB"
    made = pixel_values(load_processor(folder, recipe.trust_remote_code), [Image.new(mode, (256, 256), 128)])
    shape = tuple(made.shape[1:])
    try:
        watch(skeleton.model, (1, *shape))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ConfigurationError(
            f"{folder}: its processor makes images of {' x '.join(map(str, shape))}, which the model does not take "
            f"({str(error).splitlines()[0]}); copy preprocessor_config.json from the original model"
        ) from error
    return shape


def _blocks_notes(skeleton: Skeleton) -> list[str]:
    """What the user should know of how an image classifier is walked."""
    chain = skeleton.blocks.chain
    if chain is None or len(chain.names) > 1 or len(chain.units) == 1:
        return []
    whole = chain.names[0] or type(skeleton.model).__name__
    return [f"{whole} is walked as one block: its {len(chain.units)} parts do not follow one another directly"]


def sequence_length(model: Any, recipe: Recipe) -> tuple[int, list[str]]:
    """Tokens of a calibration sequence, and faults: more than the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if recipe.seqlen is None:
        return min(_CONTEXT, context or _CONTEXT), []
    if context is not None and recipe.seqlen > context:
        return recipe.seqlen, [f"--seqlen {recipe.seqlen} is more than the model's context of {context} tokens"]
    return recipe.seqlen, []


def choose(model: Any, blocks: Any, recipe: Recipe) -> tuple[list[list[Matrix]], dict[str, str], list[str]]:
    """The matrices to prune (a list a block), the parameters left dense with the reason, and faults."""
    matrices: list[list[Matrix]] = []
    dense: dict[str, str] = {}
    faults: list[str] = []
    names: list[str] = []
    untold: list[str] = []
    for index, block in enumerate(blocks.modules):
        found, left = find_matrices(block, blocks.prefix(index))
        left |= {m.name: "not of a repeated layer or stage" for m in found if not blocks.prunable(m.name)}
        found = [matrix for matrix in found if blocks.prunable(matrix.name)]
        names += [matrix.name for matrix in found] + [name for name, reason in left.items() if reason == UNTOLD]
        matrices.append(found)
        untold += [name for name, reason in left.items() if reason == UNTOLD and recipe.wants(name)]
        dense |= left
    if blocks.chain is not None:
        inside = tuple(blocks.prefix(index) for index in range(len(blocks)))
        outside = [n for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith(inside)]
        dense |= dict.fromkeys(outside, "outside the blocks: patch embedding, position embedding or head")
    ordinary = [matrix.name for block in matrices for matrix in block if not matrix.router]
    routing = [glob for glob in recipe.include if not any(fnmatchcase(name, glob) for name in ordinary)]
    for index, found in enumerate(matrices):
        matrices[index] = []
        for matrix in found:
            named = any(fnmatchcase(matrix.name, glob) for glob in routing)
            if recipe.wants(matrix.name) and (named or not matrix.router):
                matrices[index].append(matrix)
            elif matrix.router:
                dense[matrix.name] = "a router; a glob of --include that names routers alone prunes it"
            else:
                dense[matrix.name] = "by --include or --exclude"
    if untold:
        kinds = sorted({_kind(name) for name in untold})
        faults.append(
            f"{', '.join(kinds)}: {UNTOLD} ([out, in] or [in, out]), so that they cannot be pruned; "
            f"leave them dense with {' '.join(f'--exclude {glob!r}' for glob in kinds)}"
        )
    if recipe.experts == "all":
        fused = {
            m.parameter.rpartition(".")[0]: type(model.get_submodule(m.parameter.rpartition(".")[0]))
            for block in matrices
            for m in block
            if m.expert is not None and not takes_routes(model.get_submodule(m.parameter.rpartition(".")[0]))
        }
        if fused:
            faults.append(
                f"--experts all: {', '.join(sorted({kind.__name__ for kind in fused.values()}))} is not told where its "
                "tokens go, so that not every token can be sent to every expert; use --experts routed"
            )
    for option, globs in (("include", recipe.include), ("exclude", recipe.exclude)):
        for glob in globs:
            if not any(dataclasses.replace(recipe, include=(glob,), exclude=()).wants(name) for name in names):
                faults.append(f"--{option} {glob} matches no matrix; their names are like {names[0] if names else '-'}")
    for text in recipe.sparsity_of:
        glob = text.rpartition("=")[0]
        if glob and not any(dataclasses.replace(recipe, include=(glob,), exclude=()).wants(name) for name in names):
            faults.append(f"--sparsity-of {text} matches no matrix; their names are like {names[0] if names else '-'}")
    if not any(matrices) and not faults:
        faults.append(f"{type(model).__name__} has no matrix to prune")
    try:
        pattern = NM.parse(recipe.pattern) if recipe.pattern is not None else None
    except ConfigurationError:
        pattern = None  # told by the recipe's own check
    if pattern is not None:
        odd = sorted({_kind(m.name) for block in matrices for m in block if m.width % pattern.m})
        if odd:
            faults.append(
                f"--pattern {pattern.text}: the inputs of {', '.join(odd)} are not a multiple of {pattern.m}; "
                f"leave them dense with {' '.join(f'--exclude {glob!r}' for glob in odd)}"
            )
    return matrices, dense, faults


def _kind(name: str) -> str:
    """A glob for the same matrix in every block: numbers become *."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _fit(plan: Plan) -> None:
    """Estimate the peak memory; under --memory choose what stays below it, or raise ConfigurationError with the least.

    Tried in this order: as asked; activations in a file; two passes, so that only one micro-batch's intermediate
    activations are alive, one sequence at a time. The Gram matrices of a block's experts get what is left, and a
    quarter of the available memory at most.
    """
    recipe = plan.recipe
    needs = needs_of(recipe)
    experts = [matrix for index in range(len(plan.matrices)) for matrix in plan.experts(index)]
    largest = max(experts, key=lambda matrix: expert_memory(matrix, needs), default=None)
    least = 0 if largest is None else expert_memory(largest, needs)
    available = available_memory(plan.skeleton.device)
    if available is not None:
        plan.experts_memory = available // EXPERTS_SHARE
        if largest is not None and least > available:
            raise ConfigurationError(_too_large(largest, needs, f"only {available / 1e9:.2f}GB are available"))
    plan.memory = _estimate(plan)
    if recipe.memory is None:
        plan.notes += _experts_notes(plan, needs)
        return
    most = plan.experts_memory
    cap = parse_bytes(recipe.memory)
    folder = partial_folder(plan.out).parent
    while not folder.exists():
        folder = folder.parent
    steps: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"activation_folder": folder}, "activations go to a file"),
        (
            {"recipe": dataclasses.replace(recipe, propagate="block")} if recipe.propagate == "layer" else {},
            "two passes a block (--propagate block)",
        ),
        ({"batch": 1}, "one sequence a micro-batch"),
    ]
    notes = []
    for changes, note in steps:
        if not plan.calibrated and note:
            continue
        if all(getattr(plan, name) == value for name, value in changes.items()) and note:
            continue
        for name, value in changes.items():
            setattr(plan, name, value)
        plan.experts_memory = least
        plan.memory = _estimate(plan)
        notes += [note] if note else []
        if plan.memory <= cap:
            rest = least + cap - plan.memory
            plan.experts_memory = rest if most is None else max(least, min(rest, most))
            plan.memory = _estimate(plan)
            if notes:
                plan.notes.append(f"to stay below {recipe.memory}: {'; '.join(notes)}")
            plan.notes += _experts_notes(plan, needs)
            return
    if largest is not None and 0 < cap - (plan.memory - least) < least:
        why = f"--memory {recipe.memory} leaves too little for it: the least is {plan.memory / 1e9:.2f}GB"
        raise ConfigurationError(_too_large(largest, needs, why))
    raise ConfigurationError(
        f"--memory {recipe.memory} is too little for this model and calibration: the least is "
        f"{plan.memory / 1e9:.2f}GB; fewer or shorter samples need less"
    )


def _too_large(matrix: Matrix, needs: Needs, why: str) -> str:
    return (
        f"the Gram matrix of {matrix.name} ({matrix.width} inputs) and the factor made of it take "
        f"{expert_memory(matrix, needs) / 1e9:.2f}GB, and {why}; take a method that needs none (wanda), or leave such "
        f"experts dense with --exclude {_kind(matrix.name)!r}"
    )


def _experts_notes(plan: Plan, needs: Needs) -> list[str]:
    """How the Gram matrices of experts are kept few; [] where there are none."""
    costs = [sum(expert_memory(m, needs) for m in plan.experts(index)) for index in range(len(plan.matrices))]
    if not any(costs):
        return []
    if plan.recipe.propagate == "layer":
        return ["Gram matrices of experts: each is made when its inputs are all there, and given back before the next"]
    passes = plan.passes()
    if passes == 1:
        return []
    sizes = f"{max(costs) / 1e9:.2f}GB a block with their factors, {(plan.experts_memory or 0) / 1e9:.2f}GB at once"
    return [f"Gram matrices of experts: {sizes}: experts in groups, up to {passes} dense passes a block"]


def _estimate(plan: Plan) -> int:
    """Peak resident bytes: what this process holds already, the largest block, its working set, the activations."""
    recipe, skeleton = plan.recipe, plan.skeleton
    entries = plan.checkpoint.entries
    outside = sum(entry.nbytes for entry in entries.values())
    largest, working = 0, 0
    itemsize = skeleton.dtype.itemsize
    chain = skeleton.blocks.chain
    hidden_size = chain.width if chain else int(skeleton.model.config.get_text_config().hidden_size)
    tokens = plan.share
    at_once = tokens if recipe.propagate == "layer" else plan.batch * plan.seqlen
    for index in range(len(skeleton.blocks)):
        keys = skeleton.block_keys(index)
        stored = sum(entries[key].nbytes for key in keys)
        outside -= stored
        copies = 1 if all(entries[key].dtype == skeleton.dtype for key in keys) else 2
        most = max((m.numel for m in plan.matrices[index]), default=0)
        width = max((max(m.out, m.width) for m in plan.matrices[index]), default=0)
        needs = needs_of(recipe)
        grams = 0
        if needs == Needs.GRAM:
            widths = {m.width for m in plan.matrices[index] if m.expert is None}
            one = max(widths, default=0) ** 2 * 4
            kept = sum(w * w * 4 for w in widths) * (1 if recipe.propagate == "layer" else 2)
            grams = (kept + one * 4) * (2 if recipe.inherit else 1) + _experts_at_once(plan, index, needs)
        in_flight = at_once * itemsize * (2 * hidden_size + 3 * width) if plan.calibrated else 0
        in_flight *= 2 if recipe.inherit and recipe.propagate == "layer" else 1
        largest = max(largest, stored * copies)
        working = max(working, most * 14 + grams + in_flight)
    streams = 2 if recipe.inherit or recipe.propagate == "none" else 1
    between = tokens * hidden_size * itemsize * streams if plan.calibrated else 0
    if plan.activation_folder is not None:
        between = 0
    if plan.image is not None:
        between += recipe.samples * math.prod(plan.image) * 4
    head = outside if plan.calibrated else 0
    return (resident_memory() or _UNTOLD) + _SLACK + max(head, largest + working) + between


def _experts_at_once(plan: Plan, block: int, needs: Needs) -> int:
    """Bytes of the Gram matrices of experts, and of their factors, that are in memory together."""
    experts = plan.experts(block)
    costs = [expert_memory(matrix, needs) for matrix in experts]
    modules = [plan.skeleton.model.get_submodule(home) for home in {m.parameter.rpartition(".")[0] for m in experts}]
    # experts that are not told where tokens go may run in one product, and come together
    alone = plan.recipe.propagate == "layer" and all(takes_routes(module) for module in modules)
    limit = sum(costs) if plan.experts_memory is None else plan.experts_memory
    return max(costs, default=0) if alone else min(sum(costs), max(limit, max(costs, default=0)))
