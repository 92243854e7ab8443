"""Inkling's published tensors and our parameters: one description, from which import, export and names derive.

A tensor of theirs is written with the dimension letters of ours: `"attn.wq_du.weight": {"attention/q": "(N H) D"}`
says that our `attention/q`, whose ParamSpec has the axes D N H, is stored as rows of heads by model. Every
rearrangement is one einops pattern, read in both directions. What differs otherwise:

- our layers are stacked along L by `transformer.layer_stages`; theirs are numbered;
- a gated MLP's rows alternate between gate and up, hence `(F Z)`;
- the routers of routed and of shared experts are one tensor, rows of the former first.

Source: the tensors of thinkingmachines/Inkling-Small as transformers 5.23 reads and writes them
(`conversion_mapping.py`, "inkling_mm_model" and "MtpModel").
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType

import einops
import numpy as np

from tml.config import ModelConfig, MtpChain, MtpConfig
from tml.model import transformer
from tml.params import ParamSpec, spec_leaves

Patterns = Mapping[str, Mapping[str, str]]
"""Their name, to the paths of ours it holds (joined along the first axis), each with their order of our axes."""

ATTENTION: Patterns = {
    "attn_norm.weight": {"attention_norm": "D"},
    "attn.wq_du.weight": {"attention/q": "(N H) D"},
    "attn.wk_dv.weight": {"attention/k": "(K H) D"},
    "attn.wv_dv.weight": {"attention/v": "(K H) D"},
    "attn.wr_du.weight": {"attention/r": "(N J) D"},
    "attn.wo_ud.weight": {"attention/o": "D (N H)"},
    "attn.q_norm.weight": {"attention/q_norm": "H"},
    "attn.k_norm.weight": {"attention/k_norm": "H"},
    "attn.k_sconv.weight": {"attention/k_conv": "(K H) 1 Y"},
    "attn.v_sconv.weight": {"attention/v_conv": "(K H) 1 Y"},
    "attn.rel_logits_proj.proj": {"attention/profiles": "J X"},
    "attn_sconv.weight": {"attention_conv": "D 1 Y"},
}

MLP: Patterns = {"mlp_norm.weight": {"mlp_norm": "D"}, "mlp_sconv.weight": {"mlp_conv": "D 1 Y"}}

DENSE: Patterns = {
    "mlp.w13_dn.weight": {"mlp/gate_up": "(F Z) D"},
    "mlp.w2_md.weight": {"mlp/down": "D F"},
    "mlp.global_scale": {"mlp/scale": "1"},
}

MIXTURE: Patterns = {
    "mlp.gate.weight": {"mlp/router": "E D", "mlp/shared_router": "A D"},
    "mlp.gate.bias": {"mlp/router_bias": "E"},
    "mlp.gate.global_scale": {"mlp/scale": "1"},
    "mlp.experts.w13_weight": {"mlp/gate_up": "E (F Z) D"},
    "mlp.experts.w2_weight": {"mlp/down": "E D F"},
    "mlp.shared_experts.shared_w13_weight": {"mlp/shared_gate_up": "A (F Z) D"},
    "mlp.shared_experts.shared_w2_weight": {"mlp/shared_down": "A D F"},
}

OUTSIDE: Patterns = {
    "model.llm.embed.weight": {"embed/tokens/table": "V D"},
    "model.llm.embed_norm.weight": {"embed/tokens/norm": "D"},
    "model.llm.norm.weight": {"norm": "D"},
    "model.llm.unembed.weight": {"unembed": "V D"},
    "model.audio.encoder.weight": {"embed/audio/table": "(M Q) D"},
    "model.audio.final_norm.weight": {"embed/audio/norm": "D"},
}

AHEAD: Patterns = {
    "hidden_norm.weight": {"hidden_norm": "D"},
    "embed_norm.weight": {"embed_norm": "D"},
    "input_proj.weight": {"input_proj": "D I"},
}
"""What a block of multi-token prediction has besides its layer; the halves of I are hidden, then embedding."""

FLOAT32_NAMES = re.compile(r".*(sconv\.weight|mlp\.gate\.(bias|global_scale))")
"""What engines compute in float32 whatever the rest is stored in (`_keep_in_fp32_modules_strict` of transformers)."""


@dataclass(frozen=True)
class Part:
    """One layer of a parameter of ours, inside a tensor of theirs.

    Attributes:
        path: the parameter, as `spec_leaves` names it.
        index: its layer along the leading L axis; `...` where there is none.
        spec: one layer's axes and sizes.
        pattern: their order of those axes.
    """

    path: str
    index: int | EllipsisType
    spec: ParamSpec
    pattern: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that this part has among theirs."""
        sizes = {"1": 1, **self._sizes}
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.pattern)
        return tuple(math.prod(sizes[axis] for axis in (several or one).split()) for several, one in groups)

    @property
    def leads_alike(self) -> bool:
        """Whether both sides lead with the same axis, so that some of its rows can be rearranged alone."""
        return self.pattern.split()[0] == next(iter(self.spec.axes), "")

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """Rearranges their values, or some rows of them if both lead alike."""
        return einops.rearrange(theirs, f"{self.pattern} -> {' '.join(self.spec.axes)}", **self._inner(theirs))

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Rearranges our values, or some rows of them if both lead alike."""
        return einops.rearrange(ours, f"{' '.join(self.spec.axes)} -> {self.pattern}", **self._inner(ours))

    @property
    def _sizes(self) -> dict[str, int]:
        return dict(zip(self.spec.axes, self.spec.shape, strict=True))

    def _inner(self, values: np.ndarray) -> dict[str, int]:
        """The sizes of our axes; the leading one has those rows that are there."""
        return {**self._sizes, self.spec.axes[0]: len(values)} if self.leads_alike else self._sizes


@dataclass(frozen=True)
class Tensor:
    """One tensor of theirs: its name and the parts that stand in it, one after another along the first axis."""

    name: str
    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        first, *rest = self.parts[0].shape
        return (first + sum(part.shape[0] for part in self.parts[1:]), *rest)

    def rows(self, part: Part) -> slice:
        """Where a part stands along the first axis."""
        before = self.parts[: self.parts.index(part)]
        start = sum(other.shape[0] for other in before)
        return slice(start, start + part.shape[0])


def tensors(model: ModelConfig) -> tuple[Tensor, ...]:
    """Every tensor of a model's checkpoint, in the order of the network; each parameter of ours is in exactly one."""
    specs = dict(spec_leaves(transformer.specs(model)))
    found = [_tensor(name, parts, "", ..., specs) for name, parts in OUTSIDE.items()]
    layer = 0
    for number, stage in enumerate(transformer.layer_stages(model)):
        for repeat in range(stage.repeats):
            for place, kind in enumerate(stage.kinds):
                table = {**ATTENTION, **MLP, **(DENSE if kind.is_dense else MIXTURE)}
                prefix, ours = f"model.llm.layers.{layer}.", f"stages/{number}/{place}/"
                found += [_tensor(prefix + name, parts, ours, repeat, specs) for name, parts in table.items()]
                layer += 1
    found += [_tensor(name, parts, "", ..., specs) for name, parts in _ahead(model.mtp).items()]
    if model.video.max_tiles_per_turn:
        found += [_tensor(name, parts, "", ..., specs) for name, parts in _tower(len(model.video.fold_px)).items()]
    assert_whole(found, specs)
    return tuple(found)


def names(model: ModelConfig) -> list[str]:
    """The names of a model's tensors."""
    return [tensor.name for tensor in tensors(model)]


def _ahead(mtp: MtpConfig) -> Patterns:
    """Multi-token prediction: the blocks, and the norm that they share if there is one."""
    layer = {f"transformer_block.{name}": parts for name, parts in {**ATTENTION, **MLP, **DENSE}.items()}
    rows: dict[str, Mapping[str, str]] = {}
    for number in range(mtp.num_blocks):
        ours = f"mtp/blocks/{number}/"
        for name, parts in AHEAD.items():
            rows[f"model.mtp.layers.{number}.{name}"] = {ours + path: axes for path, axes in parts.items()}
        for name, parts in layer.items():
            rows[f"model.mtp.layers.{number}.{name}"] = {f"{ours}layer/{path}": axes for path, axes in parts.items()}
    if mtp.num_blocks and mtp.chain is MtpChain.NORMED:
        rows["model.mtp.chain_norm.weight"] = {"mtp/chain_norm": "D"}
    return rows


def _tower(last: int) -> Patterns:
    """The image tower: `last` folds of space and one of time."""
    rows: dict[str, Mapping[str, str]] = {}
    for fold in range(last + 1):
        norm = "final_norm" if fold == last else f"layers.norm_{fold}"
        rows[f"model.visual.layers.linear_{fold}.weight"] = {f"embed/video/fold_{fold}/matrix": "O I"}
        rows[f"model.visual.{norm}.weight"] = {f"embed/video/fold_{fold}/norm": "O"}
    return rows


def _tensor(
    name: str, parts: Mapping[str, str], prefix: str, index: int | EllipsisType, specs: Mapping[str, ParamSpec]
) -> Tensor:
    def part(path: str, pattern: str) -> Part:
        spec = specs[prefix + path]
        if index is not ...:
            spec = replace(spec, axes=spec.axes[1:], shape=spec.shape[1:])
        return Part(prefix + path, index, spec, pattern)

    return Tensor(name, tuple(part(path, pattern) for path, pattern in parts.items()))


def assert_whole(found: Sequence[Tensor], specs: Mapping[str, ParamSpec]) -> None:
    """Asserts that every value of every parameter stands in exactly one tensor."""
    stored = dict.fromkeys(specs, 0)
    for tensor in found:
        for part in tensor.parts:
            stored[part.path] += part.spec.size
    wrong = {path for path, spec in specs.items() if stored[path] != spec.size}
    assert not wrong, f"the layout does not hold these parameters once: {sorted(wrong)}"
