"""The grid of a comparison: choices on every axis, written out as recipes. The presets are the paper's studies.

Light to import: the command line grows from these fields.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Parameter

from wanda.errors import ConfigurationError, near
from wanda.recipe import Recipe

T = TypeVar("T")


def _listed(kind: Any, tokens: Sequence[Any]) -> tuple[Any, ...]:
    """The values of an option, separated by commas or blanks, each of the type of the tuple's elements."""
    return tuple(kind.__args__[0](part) for token in tokens for part in token.value.split(",") if part)


_List = Parameter(negative="", consume_multiple=True, converter=_listed)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values of the axes; every combination is a cell, with each sparsity and each pattern in turn."""

    preset: Literal["groups", "updates", "samples", "sparsity"] | None = None
    """A study of the paper; axes that are named beside it take the place of its own. See docs/compare.md."""
    methods: Annotated[tuple[str, ...], _List] = ()
    """Methods, separated by commas; see `wanda methods`."""
    scores: Annotated[tuple[str, ...], _List] = ()
    """Scores in place of the methods' own."""
    groups: Annotated[tuple[str, ...], _List] = ()
    """Comparison groups in place of the methods' own: row, layer, column, block:K."""
    updates: Annotated[tuple[str, ...], _List] = ()
    """Updates in place of the methods' own, or chains such as swap+pcg."""
    allocations: Annotated[tuple[str, ...], _List] = ()
    """Allocations in place of the methods' own."""
    inherit: Annotated[tuple[float, ...], _List] = ()
    """Shares of the dense model's inputs in the target of Gram-based updates, in place of the methods' own."""
    propagate: Annotated[tuple[str, ...], _List] = ()
    """Ways through a block: layer, block, none."""
    variant: bool = False
    """Wanda's variant: one threshold on running sums instead of a count per row."""
    sparsity: Annotated[tuple[float, ...], _List] = ()
    """Shares of the weights to remove, in [0, 1); 0.5 when neither a sparsity nor a pattern is named."""
    pattern: Annotated[tuple[str, ...], _List] = ()
    """N:M patterns, cells of their own beside the sparsities."""
    samples: Annotated[tuple[int, ...], _List] = ()
    """Numbers of calibration sequences; 128 when nothing is said."""
    seeds: Annotated[tuple[int, ...], _List] = ()
    """Seeds of the calibration sampling; 0 when nothing is said. Several: mean and standard deviation are shown."""

    def filled(self) -> Grid:
        """This grid with the axes of its preset where it names none of its own; ConfigurationError when unknown."""
        if self.preset is None:
            return self
        if self.preset not in PRESETS:
            raise ConfigurationError(f"unknown preset {self.preset!r}: {near(self.preset, PRESETS)}")
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        own = {name: value for name, value in given.items() if name != "preset"}
        if "pattern" in own:
            own.setdefault("sparsity", ())  # asked for patterns: not the preset's sparsities too
        return dataclasses.replace(PRESETS[self.preset], **own)

    def recipes(self, setting: Setting) -> Iterator[Recipe]:
        """A recipe a cell, methods first, seeds last; raises ConfigurationError for a grid without methods."""
        grid = self.filled()
        faults = [
            f"--propagate {way} is not a way through a block: none, block or layer"
            for way in sorted(set(grid.propagate) - {"none", "block", "layer"})
        ]
        if not grid.methods:
            faults.append("no method is named: choose some (--methods wanda,sparsegpt) or a --preset")
        if faults:
            raise ConfigurationError(faults)
        extents: list[dict[str, Any]] = [{"sparsity": s} for s in grid.sparsity]
        extents += [{"pattern": p} for p in grid.pattern]
        axes = (
            grid.methods,
            grid.scores or (None,),
            grid.groups or (None,),
            grid.updates or (None,),
            grid.allocations or (None,),
            grid.inherit or (None,),
            grid.propagate or (None,),
            extents or [{"sparsity": 0.5}],
            grid.samples or (Recipe.samples,),
            grid.seeds or (Recipe.seed,),
        )
        for method, score, group, update, allocation, inherit, propagate, extent, samples, seed in itertools.product(
            *axes
        ):
            yield Recipe(
                method=method,
                score=score,
                group=group,
                update=update,
                allocation=allocation,
                inherit=inherit,
                propagate=propagate,
                variant=grid.variant,
                samples=samples,
                seed=seed,
                calibration=setting.calibration,
                seqlen=setting.seqlen,
                include=setting.include,
                exclude=setting.exclude,
                dtype=setting.dtype,
                device=setting.device,
                memory=setting.memory,
                trust_remote_code=setting.trust_remote_code,
                **extent,
            )


PRESETS = {
    # "Varying the comparison group": metrics against groups, no update.
    "groups": Grid(
        methods=("wanda",), scores=("magnitude", "wanda", "obs"), groups=("layer", "row", "column", "block:128")
    ),
    # "Weight update": none, under a mask fixed before it, and with the mask chosen on the way.
    "updates": Grid(methods=("magnitude", "wanda"), updates=("none", "obs-sequential", "obs")),
    # "Robustness to calibration samples".
    "samples": Grid(methods=("wanda", "sparsegpt"), samples=(1, 4, 16, 64, 128, 256)),
    # "Varying the sparsity".
    "sparsity": Grid(methods=("magnitude", "wanda", "sparsegpt"), sparsity=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells of a comparison share."""

    text: str = "builtin"
    """Text that perplexity is measured on: c4, wikitext2, ptb, builtin (the part that calibration never sees) or a
    file (FILE, FILE.jsonl:field, FILE.parquet:field+field)."""
    windows: int | None = None
    """Measure on the first so many windows only."""
    calibration: str = Recipe.calibration
    """Calibration text: c4, wikitext2, ptb, builtin or a file."""
    seqlen: int | None = None
    """Tokens of a calibration sequence and of a window; min(2048, the model's context) when nothing is said."""
    include: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """Prune only matrices whose name matches one of these globs."""
    exclude: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """Leave matrices dense whose name matches one of these globs."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """Compute type; auto is bfloat16 on a CPU that multiplies it, else float32; on a GPU the type that is stored."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    memory: str | None = None
    """Peak memory of a pruning process, such as 4GB; what does not fit is chosen otherwise or refused."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the model."""
    packed: Annotated[bool, Parameter(negative="")] = False
    """Measure the pruned models packed, as `wanda pack` would ship them, and tell their sizes; on the CPU."""
    keep: Annotated[bool, Parameter(negative="")] = False
    """Leave the pruned models in DIR/models instead of removing each once it is measured."""


def options_of(cls: type[T], options: Mapping[str, Any]) -> T:
    """A Grid or a Setting from those keywords that are its fields; a single value stands for a list of one."""
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in options:
            value = options[field.name]
            if isinstance(field.default, tuple):
                value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            values[field.name] = value
    return cls(**values)


def label(recipe: Recipe) -> str:
    """The method with everything that was named beside it: what a line of a plot is called.

    The score alone stands for a method of which nothing but a score would be left.
    """
    named = ["score", "group", "update", "allocation", "inherit", "propagate"]
    lead = recipe.method
    if recipe.score is not None and _only_scores(recipe):
        lead = recipe.score
        named.remove("score")
    parts = [f"{axis}={getattr(recipe, axis)}" for axis in named if getattr(recipe, axis) is not None]
    return " ".join([lead, *(["variant"] if recipe.variant else []), *parts])


def _only_scores(recipe: Recipe) -> bool:
    """Whether the method says nothing but a score, or what it says is replaced."""
    from wanda.methods import METHODS

    if recipe.method not in METHODS.names():
        return False
    method = METHODS.get(recipe.method)
    plain = {"group": "row", "update": "none", "allocation": "uniform"}
    return all(
        getattr(method, axis) == value or (axis == "group" and recipe.group is not None)
        for axis, value in plain.items()
    )


def extent(recipe: Recipe) -> str:
    """How much goes: 2:4, or 50%."""
    return recipe.pattern or f"{100 * (recipe.sparsity or 0):g}%"
