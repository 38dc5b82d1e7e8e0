"""Starting a model from the weights of another: the same, one that draws frames one by one, one
that is not residual, a narrower or shallower one, one of another resolution, or one on the latents
of another autoencoder."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from canvasmar_rt.config import ModelConfig
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.models.canvasmar import FrameModel

OF_GROUPS = ("canvas.heads.", "spatial.frame", "spatial.group.")
"""Weights that only models have that draw groups."""

CONVOLUTIONS = "canvas.convs."
"""Weights that only models have whose canvas has convolutions."""

BLOCK = re.compile(r"^\w+\.blocks\.\d+\.")
"""Layers of a transformer."""

LAYER = re.compile(r"\.(blocks|heads|group)\.")
"""Those and others all of whose axes are as wide as a transformer's tokens or in proportion."""

SILENT = re.compile(
    r"\.frame$|\.attn\.out\.\w+$|\.heads\.\d+\.2\.\w+$|\.conv2\.\w+$"
    r"|\.out\.experts\.\d+\.\w+$|\.mlp\.(experts\.\d+\.)?2\.\w+$"
)
"""Of weights that are added, what is zero at first, so that they add nothing."""

STREAM_NORM = re.compile(r"^(temporal|canvas|spatial)\..*norm.*\.(weight|bias)$")
STREAM_READER = re.compile(
    r"\.qkv\.|\.mlp\.(experts\.\d+\.)?0\.|\.heads\.\d+\.0\.|\.conv1\."
    r"|^canvas\.(canvas|staticness)\.|^flow\.condition\."
)
"""Norms of the transformers' tokens (..., D), and layers that read them or what a norm makes of
them. All others of these modules write into them."""

READERS = ("temporal.embed", "canvas.embed", "spatial.embed", "flow.embed")
WRITERS = ("canvas.canvas", "flow.out")
"""Linear layers that read and write latents."""

GUESS = "canvas.canvas."
"""The layer that writes the canvas."""

MEANING = ("head_dim", "encoder_layers", "norm")
"""Options by which weights of the same shapes compute something else. What tokens of the condition
attend to is none of them: a trained model's loss hardly changes, and it may be trained on so."""

GRIDS = ("temporal.bos", "canvas.position", "spatial.encoder_position", "spatial.decoder_position")
"""Learned vectors of the tokens of a frame, (tokens, D)."""


@torch.no_grad()
def transfer(
    given: FrameModel, network: FrameModel, where: str, *, autoencoder: bool = False
) -> None:
    """Put the weights of `given` into `network`, the autoencoder's only if asked for.

    A model that draws groups starts from one that does not as one that draws all frames of a group
    as it would draw the first: its canvas heads and its attention among frames add nothing, later
    actions are not looked at. Vectors of positions are interpolated to another grid, and a finer
    temporal patch is read as if each of its tokens were so many alike. Convolutions of the canvas,
    if `given` has none, add nothing at first. A residual model that starts from one that draws
    frames guesses at first that nothing changes.

    Raises:
        ConfigError: naming `where` and a weight that does not fit, or what it would mean another
            thing for.
    """
    old = given.state_dict()
    for option in MEANING if given.config.family == network.config.family else ():
        had, has = getattr(given.config, option), getattr(network.config, option)
        if had != has:
            raise ConfigError(
                f"{where}: another model; its {option} is {had}, not {has}: its weights would mean "
                "something else"
            )
    if given.config.residual and not network.config.residual:
        raise ConfigError(f"{where}: a residual model; add --set-model residual=true")
    if network.config.residual and not given.config.residual:
        old |= {name: torch.zeros_like(x) for name, x in old.items() if name.startswith(GUESS)}
    if given.config.group not in (1, network.config.group):
        raise ConfigError(
            f"{where}: draws groups of {given.config.group} latent frames, the model groups "
            f"of {network.config.group}; start from one that draws frame by frame"
        )
    grouped = network.config.group > given.config.group
    new: dict[str, Tensor] = {}
    for name, own in network.state_dict().items():
        if name.startswith("autoencoder.") and not autoencoder:
            continue
        added = name.startswith(CONVOLUTIONS) and not given.config.canvas_conv
        added = added or (name not in old and BLOCK.match(name) is not None)
        if added or (grouped and name.startswith(OF_GROUPS)):
            new[name] = torch.zeros_like(own) if SILENT.search(name) else own
            continue
        value = old.get(name)
        if value is not None and _wider(given.config, network.config):
            value = _widened(name, value, own)
        if value is not None and value.shape != own.shape:
            value = _fitted(name, value, own, given, network, grouped)
        if value is None:
            raise ConfigError(f"{where}: another model; {name} does not fit")
        new[name] = value
    for name in old:
        if not name.startswith("autoencoder.") and name not in new:
            raise ConfigError(f"{where}: another model; there is no place for its {name}")
    network.load_state_dict(new, strict=False)


@torch.no_grad()
def translate(given: FrameModel, old_latents: Tensor, latents: Tensor) -> None:
    """Let a model read and write the latents of another autoencoder: its linear layers that do are
    multiplied by the maps, fitted by least squares, between `old_latents` (..., C) and `latents`
    (..., C') of the same clips. The rest of the network starts with what it knows."""
    old, new = old_latents.flatten(0, -2).double(), latents.flatten(0, -2).double()
    read = torch.linalg.lstsq(new, old).solution.T  # (C, C'): what reads C channels reads C'
    write = torch.linalg.lstsq(old, new).solution.T  # (C', C)
    modules = dict(given.named_modules())
    for name in READERS:
        if (layer := modules.get(name)) is not None:
            weight = layer.weight.double().unflatten(1, (-1, read.shape[0])) @ read
            layer.weight = torch.nn.Parameter(weight.flatten(1).float())
    for name in WRITERS:
        if (layer := modules.get(name)) is not None:
            layer.weight = torch.nn.Parameter((write @ layer.weight.double()).float())
            layer.bias = torch.nn.Parameter((write @ layer.bias.double()).float())


def _fitted(
    name: str, value: Tensor, own: Tensor, given: FrameModel, network: FrameModel, grouped: bool
) -> Tensor | None:
    wider = (own.shape[0], value.shape[-1] * network.config.group)
    if grouped and name == "temporal.action.weight" and own.shape == wider:
        return F.pad(value, (0, own.shape[1] - value.shape[1]))
    if name == "temporal.embed.weight":
        fine = network.config.temporal_patch
        times, rest = divmod(given.config.temporal_patch, fine)
        if rest or value.shape[1] != own.shape[1] * times**2:
            return None
        return value.reshape(len(value), fine, times, fine, times, -1).sum((2, 4)).flatten(1)
    if name in GRIDS and value.shape[1:] == own.shape[1:]:
        before, after = _grid(given, name), _grid(network, name)
        picture = value.T.reshape(1, -1, *before)
        resized = F.interpolate(picture, after, mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T
    return None


def _wider(given: ModelConfig, wanted: ModelConfig) -> bool:
    """Whether the model has more heads of the same size, and so more channels."""
    return wanted.dim > given.dim and wanted.head_dim == given.head_dim


def _widened(name: str, value: Tensor, own: Tensor) -> Tensor:
    """A weight for tokens of D' channels that computes what it did for D: they are 0 in the new
    ones, where nothing is written, and their mean, which norms take away, is 0 too, so a norm finds
    D/D' of their variance, and is told. What reads the new channels, and new heads and hidden
    units, are `own`; what they write is 0."""
    if STREAM_NORM.match(name):
        if name.endswith("weight"):
            value = value * (len(value) / len(own)) ** 0.5
        return torch.cat([value, own[len(value) :]])
    if STREAM_READER.search(name):
        parts = 3 if ".qkv." in name else 1
        apart = (x.reshape(parts, -1, *x.shape[1:]) for x in (value, own))
        return _placed(*apart).flatten(0, 1)
    if name.startswith("flow."):
        return value
    axis = value.ndim - 1 if name in GRIDS else 0
    size = list(own.shape if LAYER.search(name) else value.shape)
    size[axis] = own.shape[axis]
    return _placed(value - value.mean(axis, keepdim=True), own.new_zeros(size))


def _placed(value: Tensor, base: Tensor) -> Tensor:
    """`base` with `value` in its first corner."""
    whole = base.clone()
    whole[tuple(slice(n) for n in value.shape)] = value
    return whole


def _grid(model: FrameModel, name: str) -> tuple[int, int]:
    ae = model.config.autoencoder
    patch = model.config.temporal_patch if name == "temporal.bos" else 1
    return ae.latent_height // patch, ae.latent_width // patch
