"""The plan of a run: everything checked and laid out before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wanda.allocation import ALLOCATIONS
from wanda.calibration import local_files
from wanda.chain import channels_of, watch
from wanda.checkpoint.folder import nearest_folder, output_faults
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.skeleton import Skeleton
from wanda.checkpoint.source import is_timm, load_config, read_config, resolve, sequence_length, stored_dtype
from wanda.checkpoint.writer import journaled
from wanda.composition import Composition
from wanda.device import available_memory, compute_dtype, pick_device
from wanda.errors import ConfigurationError
from wanda.images import PREFIX, calibration_images, is_images, load_processor, pixel_values
from wanda.memory import resident_memory
from wanda.methods import METHODS
from wanda.patterns import NM, Pattern, Unstructured, Variant, exact, group_named
from wanda.recipe import Recipe, parse_bytes
from wanda.report.tables import size
from wanda.statistics import Needs, Statistics
from wanda.walk import expert_memory, groups_of
from wanda.weights import UNTOLD, Matrix, find_matrices, takes_routes

BATCH_TOKENS = 1024  # of a micro-batch: its activations stay in the cache
_OF_CALIBRATION = frozenset(
    ("calibration", "samples", "seqlen", "seed", "skip_unreadable", "propagate", "experts", "expert_tokens", "batch")
)  # options that nothing but a calibration uses
EXPERTS_SHARE = 4  # of the available memory, one part goes to the Gram matrices of experts
_UNTOLD = 400 << 20  # bytes of this process, where the system does not tell
_SLACK = 200 << 20  # bytes: allocator, thread pools, libraries that are loaded on the way


@dataclass(frozen=True)
class Choices:
    """What is decided for the sake of memory; a resumed run takes over the begun one's, every rank the first's.

    propagate: how a block is passed. batch: sequences a micro-batch. in_file: activations lie in a file. The result
    depends on the first two.
    """

    propagate: Literal["none", "block", "layer"] | None
    batch: int
    in_file: bool

    def beside(self, wanted: Choices) -> str:
        """In words, what is not as it was wanted; empty when all is."""
        said = ["activations go to a file"] if self.in_file != wanted.in_file else []
        said += [f"two passes a block (--propagate {self.propagate})"] if self.propagate != wanted.propagate else []
        said += [f"micro-batches of {self.batch} (--batch {self.batch})"] if self.batch != wanted.batch else []
        return "; ".join(said)


@dataclass
class Plan:
    """A run that can start: all faults are out.

    asked: the resolved recipe. recipe: the same with what was chosen for the sake of memory.
    matrices: to be pruned, a list a block. dense: parameters left dense, name to reason.
    batch: sequences a micro-batch. world: processes that share the run.
    activation_folder: where activations go when memory is short, else None.
    experts_memory: bytes that the Gram matrices of a block's experts, with their factors, may take at once.
    image: channels, height, width of an image of calibration, where those are images; seqlen is then the most places
        (patches, pixels of a map) that an image has between blocks.
    memory: estimated peak bytes of the process; device_memory: those on an accelerator.
    notes: decisions the user should see.
    """

    model: str
    checkpoint: Checkpoint
    skeleton: Skeleton
    asked: Recipe
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
    device_memory: int = 0
    notes: list[str] = field(default_factory=list)
    world: int = 1
    image: tuple[int, ...] | None = None

    @property
    def wanted(self) -> Choices:
        """The choices where memory is ample."""
        return Choices(self.asked.propagate, self.asked.batch or max(1, BATCH_TOKENS // self.seqlen), False)

    @property
    def choices(self) -> Choices:
        """The choices that were made."""
        return Choices(self.recipe.propagate, self.batch, self.activation_folder is not None)

    def take(self, choices: Choices) -> None:
        """Make these choices; the recipe tells what differs from what was asked for, so that it repeats the run."""
        batch = self.asked.batch if choices.batch == self.wanted.batch else choices.batch
        self.recipe = dataclasses.replace(self.asked, propagate=choices.propagate, batch=batch)
        self.batch = choices.batch
        self.activation_folder = nearest_folder(self.out.absolute().parent) if choices.in_file else None

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
    model: str | Path,
    out: Path,
    recipe: Recipe,
    overwrite: bool = False,
    resume: bool = False,
    world: int = 1,
    neighbours: int = 1,
) -> Plan:
    """Check everything and lay the run out; loads no weights, writes nothing.

    world: number of processes that share the run, each with its part of the samples; neighbours: those of this machine,
    each with its part of the memory.
    Raises ConfigurationError with all faults that were found.
    """
    faults = recipe.faults()
    folder = None
    try:
        folder = resolve(str(model), recipe.trust_remote_code)
    except ConfigurationError as error:
        faults += error.faults
    inputs = [Path(model), *local_files(recipe.calibration), *([folder] if folder is not None else [])]
    faults += output_faults(out, inputs, overwrite, resume)
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
    chain, seqlen = skeleton.blocks.chain, 1
    try:
        seqlen = chain.positions if chain else sequence_length(skeleton.model.config, recipe.seqlen)
    except ConfigurationError as error:
        faults += error.faults
    matrices, dense, matrix_faults = choose(skeleton.model, skeleton.blocks, recipe)
    faults += matrix_faults
    if faults:
        raise ConfigurationError(faults)
    asked, recipe = recipe, recipe.resolved()
    needs, notes = needs_of(recipe), _blocks_notes(skeleton)
    if asked.inherit is None and asked.propagate == "none" and asked.method and METHODS.get(asked.method).inherit:
        notes.append(f"--propagate none hands no error on, so that {asked.method} repairs no inherited errors")
    calibrated = needs > Needs.NOTHING
    image = image_shape(skeleton, recipe) if calibrated else None
    unused = sorted(asked.changed() & _OF_CALIBRATION) if not calibrated else []
    if unused:
        flags = ", ".join(f"--{name.replace('_', '-')} {getattr(asked, name)}" for name in unused)
        notes.append(f"not used, since {recipe.method} needs no calibration: {flags}")
    experts = sorted(asked.changed() & {"experts", "expert_tokens"})
    if calibrated and experts and not any(m.expert is not None for block in matrices for m in block):
        flags = ", ".join(f"--{name.replace('_', '-')} {getattr(asked, name)}" for name in experts)
        notes.append(f"not used, since no experts are pruned: {flags}")
    plan = Plan(
        str(model),
        checkpoint,
        skeleton,
        recipe,
        recipe,
        out,
        matrices,
        dense,
        seqlen,
        recipe.batch or max(1, BATCH_TOKENS // seqlen),
        calibrated,
        notes=notes,
        world=world,
        image=image,
    )
    begun = journaled(out).get("choices") if resume else None
    _fit(plan, neighbours, None if begun is None else _choices(begun, out))
    return plan


def _choices(journaled: Any, out: Path) -> Choices:
    """What a begun run has chosen; ConfigurationError when another version journaled it in another way."""
    try:
        return Choices(**journaled)
    except TypeError as error:
        cure = "finish it with that version, or start anew with --overwrite"
        raise ConfigurationError(
            f"the run begun in {out}.partial is of another version of wanda-prune; {cure}"
        ) from error


def needs_of(recipe: Recipe) -> Needs:
    """What calibration has to accumulate for a resolved recipe, its allocation included."""
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
        matches = dataclasses.replace(recipe, include=(glob,), exclude=()).wants
        if glob and not any(map(matches, names)):
            faults.append(f"--sparsity-of {text} matches no matrix; their names are like {names[0] if names else '-'}")
        elif glob and not any(matches(matrix.name) for block in matrices for matrix in block):
            faults.append(f"--sparsity-of {text} matches only matrices that stay dense; include them, or leave it out")
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


@dataclass(frozen=True)
class _Limit:
    """Most bytes that the process may hold, or the device where `on_device`; `text` says whence."""

    bytes: int
    text: str
    on_device: bool = False

    def spare(self, plan: Plan) -> int:
        """Bytes that the plan leaves; negative when it does not fit."""
        return self.bytes - (plan.device_memory if self.on_device else plan.memory)


def _limits(plan: Plan, neighbours: int) -> list[_Limit]:
    """--memory, or what this machine has available, and what an accelerator has; those that the system tells."""
    limits, device = [], plan.skeleton.device
    if plan.asked.memory is not None:
        limits.append(_Limit(parse_bytes(plan.asked.memory), f"--memory {plan.asked.memory}"))
    elif (available := available_memory(torch.device("cpu"))) is not None:
        most = (resident_memory() or _UNTOLD) + available // neighbours
        limits.append(_Limit(most, f"the available memory ({size(most)}{' a process' if neighbours > 1 else ''})"))
    if device.type != "cpu" and (available := available_memory(device)) is not None:
        limits.append(_Limit(available, f"the free memory of {device} ({size(available)})", on_device=True))
    return limits


def _ways(plan: Plan, room: int) -> list[Choices]:
    """Choices in the order in which they are tried, the plan's own first; room: bytes that a file may take."""
    wanted, found = plan.wanted, [plan.wanted]
    for one, two, in_file in itertools.product((False, True), repeat=3):
        propagate = "block" if two and wanted.propagate == "layer" else wanted.propagate
        choices = Choices(propagate, 1 if one else wanted.batch, in_file)
        if choices not in found and plan.calibrated and (not in_file or _between(plan, propagate) <= room):
            found.append(choices)
    return found


def _fit(plan: Plan, neighbours: int, begun: Choices | None) -> None:
    """Choose what fits into memory, or raise ConfigurationError with the least that is needed.

    Tried in this order: as asked; activations in a file; two passes, so that only one micro-batch's intermediate
    activations are alive, without a file and with one; one sequence at a time. The Gram matrices of a block's experts
    get what is left, and a quarter of the available memory at most.
    begun: the choices of the run that is resumed, which stand.
    """
    needs = needs_of(plan.asked)
    experts = [matrix for index in range(len(plan.matrices)) for matrix in plan.experts(index)]
    smallest = max((expert_memory(matrix, needs) for matrix in experts), default=0)
    available = available_memory(plan.skeleton.device)
    most = None if available is None else available // EXPERTS_SHARE
    limits = _limits(plan, neighbours)
    room = shutil.disk_usage(nearest_folder(plan.out.absolute().parent)).free - plan.checkpoint.nbytes
    why, tried = "", []
    for choices in _ways(plan, room) if begun is None else [begun]:
        plan.take(choices)
        plan.experts_memory = smallest
        plan.memory, plan.device_memory = _estimate(plan, needs)
        short = min(limits, key=lambda limit: limit.spare(plan), default=None)
        if short is None or short.spare(plan) >= 0 or begun is not None:
            bounds = [most] if most is not None else []
            bounds += [smallest + short.spare(plan)] if short is not None else []
            plan.experts_memory = max(smallest, min(bounds)) if bounds else None
            plan.memory, plan.device_memory = _estimate(plan, needs)
            if said := choices.beside(plan.wanted):
                other = "" if plan.asked.memory else "; --memory sets another limit"
                plan.notes.append(f"as the run began: {said}" if begun else f"to stay below {why}: {said}{other}")
            plan.notes += _experts_notes(plan, needs)
            return
        why = why or short.text
        tried.append((short.bytes - short.spare(plan), choices, short))
    _, choices, short = min(tried, key=lambda one: one[0])
    plan.take(choices)
    raise ConfigurationError(_too_little(plan, short, needs, room))


def _too_little(plan: Plan, limit: _Limit, needs: Needs, room: int) -> str:
    """The refusal of a plan that holds the least: what is short, what takes it, what to choose instead."""
    least, without = (_estimate(plan, each)[limit.on_device] for each in (needs, min(needs, Needs.NORMS)))
    text = f"{limit.text} is too little for this model{' and calibration' if plan.calibrated else ''}: the least is "
    text += _gigabytes(least)
    cures = ["give a larger --memory" if plan.asked.memory else "set another limit with --memory (this is an estimate)"]
    cures = [] if limit.on_device else cures
    if needs >= Needs.GRAM:
        taken, largest = max(
            ((_gram_memory(plan, m), m) for block in plan.matrices for m in block), key=lambda pair: pair[0]
        )
        text += f". The Gram matrix of {largest.name} ({largest.width} inputs) and the factor made of it"
        text += f" take {size(taken)} of that, however few the samples"
        cures.append(f"take a method that needs none (--method wanda: the least is {_gigabytes(without)})")
        cures += ["leave inherited errors as they are (--inherit 0)"] if plan.asked.inherit else []
        cures.append(f"leave such layers dense with --exclude {_kind(largest.name)!r}")
    if plan.calibrated and plan.activation_folder is None and _between(plan, plan.recipe.propagate) > room:
        text += f". The file of activations would take {size(_between(plan, plan.recipe.propagate))}, and "
        text += f"{nearest_folder(plan.out.absolute().parent)} has {size(max(0, room))} beside the result"
        cures.append("take fewer samples")
    if plan.calibrated:
        cures.append("take fewer images" if plan.image is not None else "take shorter samples (--seqlen)")
    return f"{text}: {', or '.join(cures)}" if cures else text


def _gram_memory(plan: Plan, matrix: Matrix) -> int:
    """Bytes of a matrix's Gram matrix, of the one beside it for inherited errors, and of the factor made of it."""
    needs, inherit = needs_of(plan.asked), bool(plan.asked.inherit) and matrix.expert is None
    return Statistics.memory(matrix.width, needs, inherit) + Statistics.memory(matrix.width, needs)


def _gigabytes(count: int) -> str:
    """Bytes as --memory takes them, rounded up: that much is enough."""
    return f"{math.ceil(count / 1e7) / 100:.2f}GB"


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


def _estimate(plan: Plan, needs: Needs) -> tuple[int, int]:
    """Peak bytes of this process, and on an accelerator; needs: what is accumulated.

    What the process holds already, the largest block, its working set, the activations.
    """
    recipe, skeleton = plan.recipe, plan.skeleton
    entries = plan.checkpoint.entries
    itemsize, apart = skeleton.dtype.itemsize, skeleton.device.type != "cpu"
    hidden_size = _hidden_size(plan)
    at_once = plan.share if recipe.propagate == "layer" else plan.batch * plan.seqlen

    def sizes(keys: Collection[str]) -> tuple[int, int]:
        """Bytes of tensors as stored, and of the copies that are computed with."""
        stored = sum(entries[key].nbytes for key in keys)
        if not apart and all(entries[key].dtype == skeleton.dtype for key in keys):
            return stored, 0
        return stored, sum(entries[key].nbytes // entries[key].dtype.itemsize for key in keys) * itemsize

    outside, stored, computed, working = set(entries), 0, 0, 0
    for index in range(len(skeleton.blocks)):
        keys = skeleton.block_keys(index)
        outside.difference_update(keys)
        stored, computed = map(max, (stored, computed), sizes(keys))
        most = max((_at_once(plan, m) for m in plan.matrices[index]), default=0)
        width = max((max(m.out, m.width) for m in plan.matrices[index]), default=0)
        grams = 0
        if needs == Needs.GRAM:
            widths = {m.width for m in plan.matrices[index] if m.expert is None}
            one = max(widths, default=0) ** 2 * 4
            kept = sum(w * w * 4 for w in widths) * (1 if recipe.propagate == "layer" else 2)
            factor = Composition(recipe.score, recipe.update or "none").factor_memory * one
            grams = kept * (2 if recipe.inherit else 1) + factor + _experts_at_once(plan, index, needs)
        in_flight = at_once * itemsize * (2 * hidden_size + 3 * width) if plan.calibrated else 0
        in_flight *= 2 if recipe.inherit and recipe.propagate == "layer" else 1
        # Experts that lie one by one in the files are fused when they are read, and taken apart to be written.
        groups = [group for group in skeleton.block_groups(index) if group.converter is not None]
        converted = max((sum(entries[key].nbytes for key, _ in group.sources) for group in groups), default=0)
        working = max(working, most + grams + in_flight, converted)
    base = (resident_memory() or _UNTOLD) + _SLACK
    if plan.calibrated:
        base += recipe.samples * (math.prod(plan.image) * 4 if plan.image is not None else plan.seqlen * 8)
        base += _between(plan, recipe.propagate) if plan.activation_folder is None else 0
    head, head_computed = sizes(outside) if plan.calibrated else (0, 0)
    if apart:
        return base + max(head, stored), max(head_computed, computed + working)
    return base + max(head + head_computed, stored + computed + working), 0


def _at_once(plan: Plan, matrix: Matrix) -> int:
    """Bytes of pruning a matrix: all of its weights together, or a panel of rows."""
    recipe = plan.recipe
    assert recipe.update is not None and recipe.inherit is not None
    pattern = pattern_of(recipe, exact(recipe.sparsity or 0))
    if recipe.allocation != "uniform" and not isinstance(pattern, NM):
        pattern = dataclasses.replace(pattern, spread=True)  # as share_out gives it
    composition = Composition(recipe.score, recipe.update, recipe.inherit)
    rows = composition.panels(pattern, matrix.out, matrix.width)[0]
    return (rows.stop - rows.start) * matrix.width * composition.weight_memory(pattern)


def _hidden_size(plan: Plan) -> int:
    """Width of the hidden states."""
    chain = plan.skeleton.blocks.chain
    return chain.width if chain else int(plan.skeleton.model.config.get_text_config().hidden_size)


def _between(plan: Plan, propagate: str | None) -> int:
    """Bytes of the hidden states between two blocks, of all streams: the allocation's and the dense model's too."""
    assert plan.asked.allocation is not None
    allocation = ALLOCATIONS.get(plan.asked.allocation)
    measuring = allocation.measures and allocation.needs > Needs.NOTHING
    streams = 2 if plan.asked.inherit or propagate == "none" or measuring else 1
    return plan.share * _hidden_size(plan) * plan.skeleton.dtype.itemsize * streams


def _experts_at_once(plan: Plan, block: int, needs: Needs) -> int:
    """Bytes of the Gram matrices of experts, and of their factors, that are in memory together."""
    experts = plan.experts(block)
    costs = [expert_memory(matrix, needs) for matrix in experts]
    modules = [plan.skeleton.model.get_submodule(home) for home in {m.parameter.rpartition(".")[0] for m in experts}]
    # experts that are not told where tokens go may run in one product, and come together
    alone = plan.recipe.propagate == "layer" and all(takes_routes(module) for module in modules)
    limit = sum(costs) if plan.experts_memory is None else plan.experts_memory
    return max(costs, default=0) if alone else min(sum(costs), max(limit, max(costs, default=0)))
