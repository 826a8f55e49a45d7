"""Every option of a pruning run, frozen; what can be checked without the model is checked here, all at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Parameter

from wanda import images
from wanda.errors import ConfigurationError, near
from wanda.images import is_images

_AXES = ("score", "group", "update", "allocation", "inherit")  # what a method chooses


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a pruning run does; two runs with the same recipe, input and machine write the same bytes."""

    method: str = "wanda"
    """Named composition of score, group, update and allocation; see `wanda methods`."""
    score: str | None = None
    """How much a weight matters; overrides the method's."""
    group: str | None = None
    """Which weights compete: row, layer, column or block:K (K columns over all rows); overrides the method's."""
    variant: bool = False
    """Wanda's variant: one threshold on running sums instead of a count per row."""
    sparsity: float | None = None
    """Share of the weights to remove, in [0, 1); 0.5 when nothing is said."""
    pattern: str | None = None
    """N:M: N survive of every M consecutive inputs, such as 2:4; the sparsity follows."""
    update: str | None = None
    """What the surviving weights do about the removed ones, a chain such as swap+pcg; overrides the method's."""
    allocation: str | None = None
    """How the sparsity is shared out among the blocks; overrides the method's."""
    inherit: float | None = None
    """Share, 0 to 1, of the dense model's inputs in a Gram-based update's target (a second stream of activations)."""
    calibration: str = "c4"
    """Calibration text: c4, wikitext2, ptb, builtin, or a file (FILE, FILE.jsonl:field, FILE.parquet:field+field).
    For image classifiers images:FOLDER, images:FILE.parquet or images:hf:NAME[:SPLIT]."""
    samples: int = 128
    """Number of calibration sequences, or images."""
    seqlen: int | None = None
    """Tokens of a calibration sequence; min(2048, the model's context) when nothing is said."""
    skip_unreadable: bool = False
    """Leave images out that cannot be read, instead of stopping at the first."""
    seed: int = 0
    """Seed of the calibration sampling."""
    include: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """Prune only matrices whose name matches one of these globs."""
    exclude: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """Leave matrices dense whose name matches one of these globs."""
    sparsity_of: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """GLOB=S: another sparsity for the matrices whose name matches; the last match counts."""
    propagate: Literal["none", "block", "layer"] | None = None
    """layer: one pass, every layer sees the pruned inputs it will get; block: the paper's two passes; none: all
    statistics from the dense model, as in the paper's image code."""
    experts: Literal["routed", "all"] = "routed"
    """Statistics of experts from the tokens routed to them, or with every expert seeing every token."""
    expert_tokens: int = 32
    """An expert that saw fewer tokens is pruned by magnitude per row, and named."""
    batch: int | None = None
    """Sequences, or images, in a micro-batch; about 1024 tokens, or patches, when nothing is said."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """Compute type; auto is bfloat16 on a CPU that multiplies it, else float32; on a GPU the type that is stored."""
    device: str = "auto"
    """Where blocks are computed: auto, cpu, cuda, cuda:1, mps."""
    memory: str | None = None
    """Most resident memory to use, such as 4GB; what is available when nothing is said. To stay below, activations go
    to a file, layer becomes block, micro-batches shrink."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the model."""

    def resolved(self, text: bool = True) -> Recipe:
        """This recipe with every axis filled in from the method; raises ConfigurationError with all faults.

        text: check the calibration text too, which a model in memory does not use.
        """
        faults = self.faults(text)
        if faults:
            raise ConfigurationError(faults)
        from wanda.methods import METHODS
        from wanda.updates import UPDATES

        method = METHODS.get(self.method)
        filled: dict[str, Any] = {axis: getattr(self, axis) for axis in (*_AXES, "propagate")}
        for axis, value in filled.items():
            if value is None and axis in _AXES:
                filled[axis] = getattr(method, axis)
        if self.score is None and any(UPDATES.get(u).owns_mask for u in filled["update"].split("+")):
            filled["score"] = None
        if self.inherit is None and not any(UPDATES.get(u).solves for u in filled["update"].split("+")):
            filled["inherit"] = 0.0  # the method's, which another update was put in place of
        if self.inherit is None and self.propagate == "none":
            filled["inherit"] = 0.0  # the method's: no error is ever handed on
        if filled["propagate"] is None:
            filled["propagate"] = "layer"
        if self.pattern is None and self.sparsity is None:
            filled["sparsity"] = 0.5
        if self.pattern is not None:
            filled["group"] = None  # the M inputs compete
        elif self.variant:
            filled["group"] = "row"  # of which it is made
        return dataclasses.replace(self, **filled)

    def faults(self, text: bool = True) -> list[str]:
        """Everything wrong with this recipe that can be told without the model, one sentence each."""
        from wanda.calibration import check_source
        from wanda.composition import faults as composition_faults
        from wanda.device import pick_device

        faults: list[str] = []
        for name, least in (("samples", 1), ("seqlen", 2), ("batch", 1), ("expert_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                faults.append(f"--{name.replace('_', '-')} {value} must be at least {least}")
        for name, choices in _choices().items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                faults.append(f"unknown --{name} {value!r}: {near(str(value), choices)}")
        for given in self.sparsity_of:
            _, equals, value = given.rpartition("=")
            try:
                ok = bool(equals) and 0 <= Fraction(value) < 1
            except (ValueError, ZeroDivisionError):
                ok = False
            if not ok:
                faults.append(f"--sparsity-of {given} is not GLOB=S with S in [0, 1)")
        if self.sparsity_of and self.pattern is not None:
            faults.append("--sparsity-of cannot vary what --pattern fixes; leave one of them out")
        if self.memory is not None:
            try:
                parse_bytes(self.memory)
            except ValueError as error:
                faults.append(str(error))
        if self.propagate == "none" and self.inherit:
            faults.append("--propagate none hands no errors on, so that --inherit would change nothing; leave one out")
        faults += self._image_faults() if is_images(self.calibration) and text else []
        if self.skip_unreadable and not is_images(self.calibration):
            faults.append("--skip-unreadable is of images (--calibration images:FOLDER), and would change nothing here")
        try:
            pick_device(self.device)
        except ConfigurationError as error:
            faults += error.faults
        faults += composition_faults(
            method=self.method,
            score=self.score,
            group=self.group,
            variant=self.variant,
            sparsity=self.sparsity,
            pattern=self.pattern,
            update=self.update,
            allocation=self.allocation,
            inherit=self.inherit,
        )
        return faults + (check_source(self.calibration) if text and not is_images(self.calibration) else [])

    def _image_faults(self) -> list[str]:
        found = images.faults(self.calibration.removeprefix(images.PREFIX))
        if self.seqlen is not None:
            found.append(f"--seqlen {self.seqlen} is of text: images are as large as the model's processor makes them")
        return found

    def wants(self, name: str) -> bool:
        """Whether the matrix called `name` is to be pruned."""
        included = not self.include or any(fnmatchcase(name, glob) for glob in self.include)
        return included and not any(fnmatchcase(name, glob) for glob in self.exclude)

    def sparsity_for(self, name: str) -> Fraction | None:
        """The sparsity that --sparsity-of gives the matrix called `name` (its last match), None when it gives none."""
        for text in reversed(self.sparsity_of):
            glob, _, value = text.rpartition("=")
            if fnmatchcase(name, glob):
                return Fraction(value)
        return None

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of as_dict; raises ConfigurationError for fields this version does not know."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ConfigurationError(f"the recipe has fields this version does not know: {', '.join(unknown)}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    @classmethod
    def from_file(cls, file: Path) -> Recipe:
        """The recipe of an earlier run's wanda.json; raises ConfigurationError when it holds none."""
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8"))["recipe"])
        except OSError as error:
            raise ConfigurationError(f"recipe {file} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{file} holds no recipe; give the wanda.json of an earlier run") from error

    def changed(self) -> set[str]:
        """The names of the fields that differ from their defaults."""
        return {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    def over(self, base: Recipe, given: Collection[str] = ()) -> Recipe:
        """`base` with every field of this recipe that differs from its default, or is named in `given`.

        Another choice takes the place of what goes with the base's: another method of its axes, a sparsity or a pattern
        of the other and of the group, an update of the score and the inherited errors that the method had filled in or
        that mean nothing beside it, --variant of the group, --propagate none of the inherited errors.
        """
        fields = {name: getattr(self, name) for name in self.changed().union(given)}
        if "update" in fields and self.update != base.update:
            fields = dict.fromkeys(self._idle(base)) | fields
        if fields.get("propagate") == "none":
            fields = {"inherit": None} | fields
        if fields.get("variant"):
            fields = {"group": None} | fields
        if "method" in fields:
            fields = dict.fromkeys(_AXES) | fields
        if "pattern" in fields:
            fields = {"sparsity": None, "group": None} | fields
        elif "sparsity" in fields:
            fields = {"pattern": None} | fields
        return dataclasses.replace(base, **fields)

    def _idle(self, base: Recipe) -> list[str]:
        """The axes of `base` that its method had filled in, or that mean nothing beside this recipe's update."""
        from wanda.methods import METHODS
        from wanda.updates import UPDATES

        method = METHODS.get(base.method) if base.method in METHODS else None
        links = [UPDATES.get(name) for name in (self.update or "none").split("+") if name in UPDATES]
        idle = {
            "score": any(link.owns_mask for link in links),
            "inherit": not any(link.solves for link in links),
        }
        return [axis for axis, lost in idle.items() if lost or getattr(base, axis) == getattr(method, axis, None)]


def make_recipe(options: Mapping[str, Any], recipe: Recipe | None = None) -> Recipe:
    """The recipe, or one from keyword options.

    Raises ConfigurationError for an option that does not exist, or that would be ignored beside a recipe.
    """
    known = set(Recipe.__dataclass_fields__)
    unknown = [f"there is no option {name!r}: {near(name, known)}" for name in options if name not in known]
    if recipe is not None:
        ignored = [name for name in options if name in known]
        if ignored:
            unknown.append(f"{' and '.join(ignored)} would be ignored beside a recipe: say it there")
        if not unknown:
            return recipe
    if unknown:
        raise ConfigurationError(unknown)
    values = dict(options)
    if isinstance(values.get("sparsity_of"), Mapping):
        values["sparsity_of"] = [f"{glob}={share}" for glob, share in values["sparsity_of"].items()]
    for name in ("include", "exclude", "sparsity_of"):
        if name in values:
            values[name] = (values[name],) if isinstance(values[name], str) else tuple(values[name])
    return Recipe(**values)


def _choices() -> dict[str, tuple[str, ...]]:
    """The values of the fields that take one of a few."""
    hints = {name: (hint, *get_args(hint)) for name, hint in get_type_hints(Recipe).items()}
    return {n: get_args(part) for n, parts in hints.items() for part in parts if get_origin(part) is Literal}


def parse_bytes(text: str) -> int:
    """ "4GB", "512 MiB", "3e9" in bytes; raises ValueError."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    units |= {"k": 10**3, "m": 10**6, "g": 10**9}
    stripped = text.strip().lower()
    number = stripped.rstrip("bkmgi ")
    try:
        return int(float(number) * units[stripped[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{text!r} is no size; write it like 4GB or 512MiB") from None
