"""Model and sampling configurations: frozen, validated once, JSON round-trip.

Letters used across the library (paper notation where it has one): B batch, T latent frames,
N tokens of one latent frame, P temporal tokens of one latent frame, C latent channels,
D model width, H heads, F frames held by the ring cache, K autoregressive (AR) steps of a frame,
E evaluations of the flow head per AR step, G guidance branches, A action size, J latent frames
of a group, which are drawn together.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from canvasmar_rt.errors import ConfigError

Family = Literal["canvasmar", "unified"]
Norm = Literal["shared", "expert", "mmdit"]
Modulation = Literal["joint", "additive"]
ConditionAttention = Literal["all", "isolated"]
Solver = Literal["euler", "heun", "ab2"]
Order = Literal["motion", "maskgit", "random"]

T = TypeVar("T")


LARGEST = 65536
"""Bound of every size and count of a model: a hostile configuration fails here, not in malloc."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _require_sizes(config: Any, where: str) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for size in value if isinstance(value, tuple) else (value,):
            _require(
                not isinstance(size, int) or 0 <= size <= LARGEST,
                f"{where}: {field.name} must lie in 0..{LARGEST}, got {size}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Causal video autoencoder. `patch` pixels a side enter as channels; every further entry of
    `widths` halves the resolution, so one latent covers `patch * 2**(len(widths)-1)` pixels.
    A convolution sees `temporal_kernel` latent frames, in the encoder `encoder_kernel` where it is
    given: with 1 a latent frame is of its own pixels alone, and latents of what stays stay too."""

    height: int
    width: int
    temporal_compression: int
    latent_channels: int = 16
    patch: int = 2
    widths: tuple[int, ...] = (64, 128, 256)
    blocks: int = 2
    temporal_kernel: int = 3
    encoder_kernel: int | None = None

    def __post_init__(self) -> None:
        _require_sizes(self, "autoencoder")
        _require(len(self.widths) <= 16, "autoencoder: at most 16 widths")
        _require(
            bool(self.widths) and all(w > 0 and w % 8 == 0 for w in self.widths),
            f"autoencoder: widths must be multiples of 8, got {self.widths}",
        )
        _require(self.patch >= 1, f"autoencoder: patch must be >= 1, got {self.patch}")
        f = self.spatial_compression
        _require(
            self.height > 0 and self.width > 0 and not (self.height % f or self.width % f),
            f"autoencoder: height and width must be multiples of {f}, got "
            f"{self.height}x{self.width}",
        )
        _require(self.temporal_compression >= 1, "autoencoder: temporal_compression must be >= 1")
        _require(self.latent_channels >= 1, "autoencoder: latent_channels must be >= 1")
        _require(
            1 <= self.blocks <= 1024,
            f"autoencoder: blocks must lie in 1..1024, got {self.blocks}",
        )
        _require(self.temporal_kernel >= 1, "autoencoder: temporal_kernel must be >= 1")
        _require(
            self.encoder_kernel is None or self.encoder_kernel >= 1,
            "autoencoder: encoder_kernel must be >= 1",
        )

    def kernel(self, *, decoder: bool) -> int:
        """Latent frames that a convolution of the decoder, or of the encoder, sees."""
        if decoder or self.encoder_kernel is None:
            return self.temporal_kernel
        return self.encoder_kernel

    @property
    def spatial_compression(self) -> int:
        return int(self.patch * 2 ** (len(self.widths) - 1))

    @property
    def latent_height(self) -> int:
        return self.height // self.spatial_compression

    @property
    def latent_width(self) -> int:
        return self.width // self.spatial_compression


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow head (Table 3: width 1280, 3 blocks). `modulation` "joint" is the paper's form,
    SiLU(time + condition); "additive" sums a time part and a condition part, each computed once."""

    width: int = 1280
    blocks: int = 3
    modulation: Modulation = "joint"

    def __post_init__(self) -> None:
        _require_sizes(self, "flow")
        _require(self.width >= 8, f"flow: width must be >= 8, got {self.width}")
        _require(1 <= self.blocks <= 1024, f"flow: blocks must lie in 1..1024, got {self.blocks}")
        _require(
            self.modulation in typing.get_args(Modulation),
            f"flow: modulation must be one of {typing.get_args(Modulation)}, "
            f"got {self.modulation!r}",
        )

    @property
    def modulations(self) -> int:
        """Vectors that modulate a token: shift, scale and gate of every block, then shift and scale
        of the output norm."""
        return 3 * self.blocks + 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model: CanvasMAR (paper, Table 3) or a unified masked autoregressive transformer (MAGI,
    VideoMAR). `encoder_layers` of the `spatial_layers` see only the known tokens (NOVA's split).
    `context_frames` is the number of latent frames in the ring cache, the current one included.
    `fps` is the pixel frame rate of the training data.

    `group` latent frames are drawn together (App. B); `action_dim` counts the actions of them all.
    `residual` models guess and draw what changes from the latest latent frame (zeros before the
    first), which is added; the paper's draw the frame itself. `canvas_conv` is the width of two
    convolutions over the grid of tokens after each block of the Canvas ViT; 0, the paper's: none.

    A unified model is one transformer of `temporal_layers`; it has neither canvas nor spatial
    layers (`canvas` false, the other counts 0, `norm` shared, `condition_attention` all) and keeps
    every token of a frame (`temporal_patch` 1)."""

    name: str
    family: Family = "canvasmar"
    autoencoder: AutoencoderConfig
    flow: FlowConfig
    dim: int
    heads: int
    temporal_layers: int
    canvas_layers: int
    spatial_layers: int
    encoder_layers: int
    context_frames: int
    norm: Norm = "expert"
    condition_attention: ConditionAttention = "all"
    temporal_patch: int = 2
    action_dim: int = 0
    canvas: bool = True
    group: int = 1
    residual: bool = False
    canvas_conv: int = 0
    fps: float = 10.0

    def __post_init__(self) -> None:
        _require_sizes(self, "model")
        _require(
            self.dim > 0 and self.heads > 0 and self.dim % self.heads == 0,
            f"model: dim ({self.dim}) must be a multiple of heads ({self.heads})",
        )
        _require(
            self.head_dim % 8 == 0, f"model: head size must be a multiple of 8, got {self.head_dim}"
        )
        _require(self.family in typing.get_args(Family), f"model: unknown family {self.family!r}")
        unified = self.family == "unified"
        absent = ("canvas_layers", "spatial_layers", "encoder_layers") if unified else ()
        for name in ("temporal_layers", "canvas_layers", "spatial_layers", "context_frames"):
            value = getattr(self, name)
            if name not in absent:
                _require(1 <= value <= 1024, f"model: {name} must lie in 1..1024, got {value}")
        for name in absent:
            value = getattr(self, name)
            _require(value == 0, f"model: a unified model has no {name}, got {value}")
        if unified:
            only = {
                "canvas": False, "temporal_patch": 1, "group": 1, "norm": "shared",
                "condition_attention": "all",
            }  # fmt: skip
            for name, wanted in only.items():
                value = getattr(self, name)
                _require(
                    value == wanted, f"model: a unified model needs {name} {wanted}, got {value!r}"
                )
        else:
            _require(
                0 < self.encoder_layers < self.spatial_layers,
                f"model: encoder_layers ({self.encoder_layers}) must lie between 1 and "
                f"spatial_layers - 1 ({self.spatial_layers - 1})",
            )
        _require(self.norm in typing.get_args(Norm), f"model: unknown norm {self.norm!r}")
        _require(
            self.condition_attention in typing.get_args(ConditionAttention),
            f"model: unknown condition_attention {self.condition_attention!r}",
        )
        _require(self.action_dim >= 0, "model: action_dim must be >= 0")
        _require(self.canvas_conv >= 0, "model: canvas_conv must be >= 0")
        _require(self.canvas or not self.canvas_conv, "model: canvas_conv needs a canvas")
        _require(1 <= self.group <= 64, f"model: group must lie in 1..64, got {self.group}")
        _require(
            self.action_dim % self.group == 0,
            f"model: action_dim ({self.action_dim}) must be a multiple of group ({self.group})",
        )
        _require(0 < self.fps < math.inf, f"model: fps must be a number > 0, got {self.fps}")
        _require(
            self.group == 1 or bool(self.group_layers),
            f"model: the frames of a group meet after every fourth spatial layer, and of "
            f"{self.spatial_layers} layers with encoder_layers {self.encoder_layers} that is none",
        )
        h, w, p = self.autoencoder.latent_height, self.autoencoder.latent_width, self.temporal_patch
        _require(
            p >= 1 and not (h % p or w % p),
            f"model: latent size {h}x{w} must be a multiple of temporal_patch ({p})",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def tokens(self) -> int:
        """N, tokens of one latent frame."""
        return self.autoencoder.latent_height * self.autoencoder.latent_width

    @property
    def group_shape(self) -> tuple[int, ...]:
        """(J,), or () of a model that draws one latent frame at a time: the axis that a group adds
        behind the batch."""
        return (self.group,) if self.group > 1 else ()

    @property
    def step_frames(self) -> int:
        """J*t, pixel frames of a step."""
        return self.group * self.autoencoder.temporal_compression

    @property
    def group_layers(self) -> tuple[int, ...]:
        """The spatial layers after which the frames of a group attend to each other (App. B): every
        fourth of those that see whole frames, but the last, which draws."""
        if self.group == 1:
            return ()
        return tuple(range(3, self.spatial_layers - 1, 4))[self.encoder_layers // 4 :]

    @property
    def temporal_tokens(self) -> int:
        """P, temporal tokens of one latent frame."""
        return self.tokens // self.temporal_patch**2

    @property
    def time_rotary_pairs(self) -> int:
        """Channel pairs of a head that rotate with time; the others rotate with y and x."""
        return self.head_dim // 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a frame is drawn. Defaults are the paper's where Table 3 has one.

    `frame_noise` is r of eq. 11, `canvas_noise` r' of eq. 12, guidance scales are w_t and w_s of
    eq. 8, `temperature` scales the Gumbel noise of the order. `flow_temperature` scales the flow's
    noise; it goes linearly from the first number, at the start of a video, to the second, from
    latent frame `temperature_frames` on (VideoMAR's progressive temperature); a group has that of
    its first frame."""

    ar_steps: int = 4
    flow_steps: int = 30
    solver: Solver = "euler"
    temporal_guidance: float = 1.2
    canvas_guidance: float = 1.5
    frame_noise: float = 0.3
    canvas_noise: float = 0.2
    temperature: float = 6.5
    order: Order = "motion"
    flow_temperature: tuple[float, float] = (1.0, 1.0)
    temperature_frames: int = 16

    def __post_init__(self) -> None:
        coerce_fields(self, "sampling: ")
        _require(
            1 <= self.ar_steps <= LARGEST,
            f"sampling: ar_steps must lie in 1..{LARGEST}, got {self.ar_steps}",
        )
        _require(
            1 <= self.flow_steps <= 1000,
            f"sampling: flow_steps must lie in 1..1000, got {self.flow_steps}",
        )
        for name in ("frame_noise", "canvas_noise"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, f"sampling: {name} must lie in [0, 1], got {value}")
        for name in ("temporal_guidance", "canvas_guidance", "temperature"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1e4, f"sampling: {name} must lie in [0, 10000], got {value}")
        _require(
            all(0.0 <= t <= 2.0 for t in self.flow_temperature),
            f"sampling: flow_temperature must lie in [0, 2], got {self.flow_temperature}",
        )
        _require(
            1 <= self.temperature_frames <= LARGEST,
            f"sampling: temperature_frames must lie in 1..{LARGEST}, got {self.temperature_frames}",
        )

    def guided(self, *, has_canvas: bool) -> bool:
        """Whether more than the conditional branch is computed."""
        return self.temporal_guidance != 1.0 or (has_canvas and self.canvas_guidance != 1.0)


def to_dict(config: Any) -> dict[str, Any]:
    """JSON-ready dictionary of a configuration."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a configuration from a JSON dictionary; unknown, missing or mistyped keys raise.

    Raises:
        ConfigError: naming the key, what was expected and what came.
    """
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    _require(not unknown, f"{where}: unknown keys {shown(unknown)}; known are {sorted(fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _coerce(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: key {name!r} is missing")
    return cls(**values)


def parsed(assignments: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Names and values of `name=value` assignments; values are JSON, or bare strings.

    Raises:
        ConfigError: if one has no "=".
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r}: expected name=value")
        try:
            yield name, json.loads(text)
        except RecursionError:
            raise ConfigError(f"{name}: brackets within brackets without end") from None
        except ValueError:
            yield name, text


def coerce_fields(options: Any, where: str = "") -> None:
    """For `__post_init__` of frozen options: every field as its type, or a `ConfigError`."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = _coerce(hints[field.name], getattr(options, field.name), f"{where}{field.name}")
        object.__setattr__(options, field.name, value)


def shown(value: Any) -> str:
    """What came, for a message: cut where it is long, as of a file that is something else."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}.."


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    if origin is Literal:
        _require(value in args, f"{where}: expected one of {args}, got {shown(value)}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        if any(a in (int, str) and type(value) is a for a in args):
            return value
        return _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), f"{where}: expected a list, got {shown(value)}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        _require(
            len(value) == len(args), f"{where}: expected {len(args)} entries, got {shown(value)}"
        )
        return tuple(
            _coerce(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin is dict:
        _require(isinstance(value, dict), f"{where}: expected an object, got {shown(value)}")
        return {str(k): _coerce(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if hint is float:
        ok = isinstance(value, numbers.Real) and not isinstance(value, bool)
        _require(ok, f"{where}: expected a number, got {shown(value)}")
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where}: expected a number, got one too large") from None
    if hint is int and not isinstance(value, bool) and isinstance(value, numbers.Integral):
        return int(value)  # also of NumPy
    ok = isinstance(value, hint) and hint is not int
    _require(ok, f"{where}: expected {hint.__name__}, got {shown(value)}")
    return value


# -- presets (Table 3)


def bair() -> tuple[ModelConfig, SamplingConfig]:
    """BAIR robot pushing: 17x64x64 pixels, 9x16x16 latents (Table 3)."""
    model = ModelConfig(
        name="bair",
        autoencoder=AutoencoderConfig(
            height=64, width=64, temporal_compression=2, widths=(128, 256)
        ),
        flow=FlowConfig(),
        dim=768,
        heads=12,
        temporal_layers=8,
        canvas_layers=4,
        spatial_layers=8,
        encoder_layers=2,
        context_frames=9,
        fps=10.0,
    )
    return model, SamplingConfig(ar_steps=4)


def ucf101() -> tuple[ModelConfig, SamplingConfig]:
    """UCF-101: 17x256x256 pixels, 5x32x32 latents (Table 3)."""
    model = ModelConfig(
        name="ucf101",
        autoencoder=AutoencoderConfig(
            height=256, width=256, temporal_compression=4, widths=(128, 256, 512)
        ),
        flow=FlowConfig(),
        dim=1024,
        heads=16,
        temporal_layers=16,
        canvas_layers=8,
        spatial_layers=16,
        encoder_layers=4,
        context_frames=5,
        fps=25.0,
    )
    return model, SamplingConfig(ar_steps=8)


def kinetics600() -> tuple[ModelConfig, SamplingConfig]:
    """Kinetics-600: 17x128x128 pixels, 5x16x16 latents, MM-DiT (Table 3)."""
    model, _ = ucf101()
    model = dataclasses.replace(
        model,
        name="kinetics600",
        autoencoder=dataclasses.replace(model.autoencoder, height=128, width=128),
        norm="mmdit",
        fps=30.0,
    )
    sampling = SamplingConfig(
        ar_steps=10, frame_noise=0.4, canvas_guidance=2.25, temporal_guidance=1.1
    )
    return model, sampling


TOYTABLE_SPEED = 0.06
"""Largest move of ToyTable's gripper in a pixel frame, in table widths."""


def toytable() -> tuple[ModelConfig, SamplingConfig]:
    """A small world for any machine: 17x64x64 pixels, 9x8x8 latents, actions (dx, dy) of both
    pixel frames of a step. Not in the paper; architecture ratios follow its `bair`."""
    model = ModelConfig(
        name="toytable",
        autoencoder=AutoencoderConfig(
            height=64,
            width=64,
            temporal_compression=2,
            patch=4,
            widths=(64, 128),
            latent_channels=32,
            encoder_kernel=1,
        ),
        flow=FlowConfig(width=256),
        dim=192,
        heads=3,
        temporal_layers=3,
        canvas_layers=3,
        spatial_layers=5,
        encoder_layers=2,
        context_frames=6,
        action_dim=4,
        fps=10.0,
    )
    sampling = SamplingConfig(ar_steps=4, canvas_guidance=1.3)
    return model, sampling


def convolution_layers(model: ModelConfig) -> int:
    """How many of a transformer's layers, of 12 * dim**2 weights, have the size of the canvas's
    convolutions: two of 3x3 a layer, 18 * dim * canvas_conv."""
    return round(model.canvas_layers * 1.5 * model.canvas_conv / model.dim)


def unified(model: ModelConfig) -> ModelConfig:
    """A unified masked autoregressive model (MAGI, VideoMAR) of as many layers as a CanvasMAR, and
    for its convolutions as many more as have their size. An MM-DiT's second set of weights is not
    made up for."""
    layers = model.temporal_layers + model.canvas_layers + model.spatial_layers
    layers += convolution_layers(model)
    return dataclasses.replace(
        model,
        name=f"{model.name}_unified",
        family="unified",
        temporal_layers=layers,
        canvas_layers=0,
        spatial_layers=0,
        encoder_layers=0,
        temporal_patch=1,
        norm="shared",
        condition_attention="all",
        canvas=False,
        canvas_conv=0,
    )


def next_group(model: ModelConfig, group: int) -> ModelConfig:
    """A model that draws `group` latent frames at once (App. B)."""
    return dataclasses.replace(
        model,
        name=f"{model.name}_next_{group}",
        group=group,
        action_dim=model.action_dim // model.group * group,
    )


def toytable_unified() -> tuple[ModelConfig, SamplingConfig]:
    """`toytable` as a unified model, for comparisons at equal size. Not in the paper."""
    model, sampling = toytable()
    return unified(model), sampling


def toytable_next_2() -> tuple[ModelConfig, SamplingConfig]:
    """`toytable`, two latent frames at a time (App. B). Not in the paper."""
    model, sampling = toytable()
    return next_group(model, 2), sampling


PRESETS = {
    f.__name__: f for f in (bair, ucf101, kinetics600, toytable, toytable_unified, toytable_next_2)
}


def preset(name: str) -> tuple[ModelConfig, SamplingConfig]:
    """Model and sampling configuration of a named preset.

    Raises:
        ConfigError: if there is no such preset; the message lists those there are.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[name]()
