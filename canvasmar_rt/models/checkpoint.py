"""Checkpoints: a directory with `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from canvasmar_rt.config import ModelConfig, SamplingConfig, from_dict, to_dict
from canvasmar_rt.errors import BundleError, ConfigError
from canvasmar_rt.files import replacing
from canvasmar_rt.models.canvasmar import FrameModel
from canvasmar_rt.models.families import FAMILIES, build

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RUN_FILE, PROGRESS_FILE = "run.json", "training.json"
"""What a training run leaves beside its checkpoints, and in each of them."""


def save_checkpoint(directory: Path, model: FrameModel, sampling: SamplingConfig) -> None:
    """Write a checkpoint; each file appears whole or not at all, the weights first."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model": to_dict(model.config), "sampling": to_dict(sampling)}
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(directory / WEIGHTS_FILE) as temporary:
        save_file(state, temporary)
    with replacing(directory / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def load_checkpoint(directory: Path, *, whole: bool = True) -> tuple[FrameModel, SamplingConfig]:
    """Read a checkpoint into a float32 model in evaluation mode. With `whole` it may not be one of
    an autoencoder's training, in which all other weights are random.

    Raises:
        BundleError: if a file is missing or cut, a tensor is missing, unknown, misshapen or not
            finite, or only the autoencoder was trained.
        ConfigError: if the configuration is not valid.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            within = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
            raise BundleError(
                f"{directory}: no {name}; a checkpoint is a directory with {CONFIG_FILE} and "
                f"{WEIGHTS_FILE}" + (f", as {within[-1]} is" if within else "")
            )
    if whole and _stage(directory) == "autoencoder":
        raise BundleError(
            f"{directory}: only the autoencoder was trained, the rest is random; train a model on "
            "it, `python -m training model --autoencoder RUN`"
        )
    try:
        data = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{directory / CONFIG_FILE}: not JSON ({error})") from None
    if not isinstance(data, dict) or set(data) != {"model", "sampling"}:
        raise ConfigError(f"{directory / CONFIG_FILE}: expected the keys model and sampling")
    config = from_dict(ModelConfig, data["model"], "model")
    sampling = from_dict(SamplingConfig, data["sampling"], "sampling")
    try:
        state = load_file(directory / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{directory / WEIGHTS_FILE}: cannot be read ({error})") from None
    return load_state(config, state, str(directory / WEIGHTS_FILE)), sampling


def _stage(directory: Path) -> object:
    """The stage of the training that made the checkpoint, as it or the run around it tells."""
    for path in (directory / PROGRESS_FILE, directory.resolve().parent / RUN_FILE):
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(described, dict) and "stage" in described:
            return described["stage"]
    return None


def load_state(config: ModelConfig, state: dict[str, Tensor], where: str) -> FrameModel:
    """A float32 model in evaluation mode with the given weights.

    Raises:
        BundleError: naming the tensor that is missing, unknown, of the wrong shape, not finite or,
            of the latents' standard deviation, not above 0.
    """
    with torch.device("meta"):  # no memory is asked for before the shapes fit
        want = FAMILIES[config.family](config).state_dict()
    for name in sorted(want.keys() - state.keys()):
        raise BundleError(f"{where}: tensor {name} is missing")
    for name in sorted(state.keys() - want.keys()):
        raise BundleError(f"{where}: unknown tensor {name}; is this the right configuration?")
    for name, tensor in state.items():
        if tensor.shape != want[name].shape:
            raise BundleError(
                f"{where}: tensor {name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(want[name].shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise BundleError(
                f"{where}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}; weights "
                f"are float32, float16, bfloat16 or float64"
            )
        if not is_finite(tensor):
            raise BundleError(
                f"{where}: tensor {name} holds values that are not finite: its training diverged, "
                "or the file is damaged; take an earlier checkpoint or another copy"
            )
        if name == "autoencoder.latent_std" and not (tensor > 0).all():  # latents are divided by it
            raise BundleError(
                f"{where}: tensor {name} must be above 0 in every channel, its least is "
                f"{float(tensor.min()):g}; a channel that never changes may have 1"
            )
    model = build(config)
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is. The extremes are NaN where one is; they need no mask as large as the
    tensor."""
    return not tensor.numel() or bool(torch.stack(tensor.float().aminmax()).isfinite().all())
