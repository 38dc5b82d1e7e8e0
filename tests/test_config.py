"""Configurations: JSON round trips, messages that name the key, and Table 3 written out."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from canvasmar_rt.config import (
    PRESETS,
    AutoencoderConfig,
    FlowConfig,
    ModelConfig,
    SamplingConfig,
    from_dict,
    preset,
    to_dict,
)
from canvasmar_rt.errors import ConfigError

# Table 3: (temporal dim, layers, patch), canvas layers, (spatial layers, depth), norm,
# (flow width, layers), AR steps
ARCHITECTURE = {
    "bair": ((768, 8, 2), 4, (8, 2), "expert", (1280, 3), 4),
    "ucf101": ((1024, 16, 2), 8, (16, 4), "expert", (1280, 3), 8),
    "kinetics600": ((1024, 16, 2), 8, (16, 4), "mmdit", (1280, 3), 10),
}
# pixels T x H x W, compression {1, t} x f x f, latents T x h x w
SIZES = {
    "bair": ((17, 64, 64), (2, 4), (9, 16, 16)),
    "ucf101": ((17, 256, 256), (4, 8), (5, 32, 32)),
    "kinetics600": ((17, 128, 128), (4, 8), (5, 16, 16)),
}
# r, r', confidence temperature, flow-head steps, canvas guidance, temporal guidance
SAMPLING = {
    "bair": (0.3, 0.2, 6.5, 30, 1.5, 1.2),
    "ucf101": (0.3, 0.2, 6.5, 30, 1.5, 1.2),
    "kinetics600": (0.4, 0.2, 6.5, 30, 2.25, 1.1),
}


def edited(config: Any, path: str, value: Any) -> dict[str, Any]:
    """JSON of `config` with the value at a dotted `path` replaced."""
    data = to_dict(config)
    *parents, last = path.split(".")
    inner = data
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return data


def autoencoder(**changes: Any) -> AutoencoderConfig:
    defaults = {"height": 16, "width": 24, "temporal_compression": 2, "widths": (8, 16)}
    return AutoencoderConfig(**{**defaults, **changes})


# -- presets


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_presets_are_table_3(name: str) -> None:
    model, sampling = preset(name)
    temporal, canvas_layers, spatial, norm, flow, ar_steps = ARCHITECTURE[name]
    assert (model.dim, model.temporal_layers, model.temporal_patch) == temporal
    assert model.canvas_layers == canvas_layers
    assert (model.spatial_layers, model.encoder_layers) == spatial
    assert model.norm == norm
    assert (model.flow.width, model.flow.blocks) == flow
    assert sampling.ar_steps == ar_steps
    assert model.canvas
    assert model.flow.modulation == "joint"
    assert model.condition_attention == "all"
    assert model.action_dim == 0
    assert (
        sampling.frame_noise,
        sampling.canvas_noise,
        sampling.temperature,
        sampling.flow_steps,
        sampling.canvas_guidance,
        sampling.temporal_guidance,
    ) == SAMPLING[name]
    assert (sampling.solver, sampling.order) == ("euler", "motion")


@pytest.mark.parametrize("name", SIZES)
def test_preset_sizes_are_table_3(name: str) -> None:
    model, _ = preset(name)
    ae = model.autoencoder
    (frames, height, width), (t, f), (latent_frames, h, w) = SIZES[name]
    assert (ae.height, ae.width) == (height, width)
    assert (ae.temporal_compression, ae.spatial_compression) == (t, f)
    assert (ae.latent_height, ae.latent_width) == (h, w)
    assert 1 + (frames - 1) // t == latent_frames == model.context_frames
    assert model.tokens == h * w
    assert model.temporal_tokens == h * w // 4
    assert ae.latent_channels == 16
    assert model.head_dim == 64
    assert model.time_rotary_pairs == 8


def test_toytable_sizes() -> None:
    model, _ = preset("toytable")
    assert (model.autoencoder.latent_height, model.autoencoder.latent_width) == (8, 8)
    assert (model.tokens, model.temporal_tokens, model.context_frames) == (64, 16, 6)
    assert model.action_dim == 4


def test_sizes_of_oblong_pictures() -> None:
    ae = autoencoder(patch=1)
    assert (ae.spatial_compression, ae.latent_height, ae.latent_width) == (2, 8, 12)
    ae = autoencoder()
    assert (ae.spatial_compression, ae.latent_height, ae.latent_width) == (4, 4, 6)
    model = dataclasses.replace(preset("toytable")[0], autoencoder=ae)
    assert (model.tokens, model.temporal_tokens) == (24, 6)
    assert dataclasses.replace(model, temporal_patch=1).temporal_tokens == 24


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        preset("bear")
    assert "'bear'" in str(caught.value)
    assert all(name in str(caught.value) for name in PRESETS)


# -- JSON


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    for config in preset(name):
        text = json.dumps(to_dict(config))
        again = from_dict(type(config), json.loads(text))
        assert again == config
        assert hash(again) == hash(config), "lists came back where tuples were"
        assert json.dumps(to_dict(again)) == text


def test_round_trip_of_what_no_preset_uses() -> None:
    model = dataclasses.replace(
        preset("bair")[0],
        flow=FlowConfig(width=64, blocks=1, modulation="additive"),
        norm="shared",
        condition_attention="isolated",
        canvas=False,
        action_dim=3,
        fps=29.97,
    )
    sampling = SamplingConfig(ar_steps=1, solver="ab2", order="random", temperature=0.0)
    moving = dataclasses.replace(model, canvas=True, canvas_conv=8)
    for made in (model, moving):
        assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(made)))) == made
    assert from_dict(SamplingConfig, json.loads(json.dumps(to_dict(sampling)))) == sampling


def test_defaults_may_be_left_out_and_whole_numbers_are_numbers() -> None:
    assert from_dict(SamplingConfig, {}) == SamplingConfig()
    read = from_dict(SamplingConfig, {"temperature": 2, "ar_steps": 3})
    assert read == SamplingConfig(temperature=2.0, ar_steps=3)
    assert type(read.temperature) is float


def test_configurations_are_frozen_and_keyword_only() -> None:
    sampling = SamplingConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.ar_steps = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingConfig(4)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("dim", "768", ["model.dim", "int", "'768'"]),
        ("dim", 768.0, ["model.dim", "int", "768.0"]),
        ("dim", True, ["model.dim", "int", "True"]),
        ("dim", None, ["model.dim", "None"]),
        ("name", 3, ["model.name", "str", "3"]),
        ("canvas", 1, ["model.canvas", "bool", "1"]),
        ("fps", "10", ["model.fps", "number", "'10'"]),
        ("fps", False, ["model.fps", "number", "False"]),
        pytest.param("fps", 10**400, ["model.fps", "too large"], id="fps-huge"),
        ("norm", "batch", ["model.norm", "'expert'", "'batch'"]),
        ("norm", ["expert"], ["model.norm", "['expert']"]),
        ("autoencoder", 5, ["model.autoencoder", "object", "int"]),
        ("autoencoder", [1], ["model.autoencoder", "object", "list"]),
        ("autoencoder.widths", 64, ["model.autoencoder.widths", "list", "64"]),
        ("autoencoder.widths", [64, "x"], ["model.autoencoder.widths[1]", "int", "'x'"]),
        ("autoencoder.height", [], ["model.autoencoder.height", "int", "[]"]),
        ("flow.modulation", "film", ["model.flow.modulation", "'joint'", "'film'"]),
        ("flow.depth", 3, ["model.flow", "unknown", "'depth'", "'blocks'"]),
        ("layers", 3, ["model", "unknown", "'layers'", "'temporal_layers'"]),
    ],
)
def test_mistyped_and_unknown_keys_are_named(path: str, value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(ModelConfig, edited(preset("bair")[0], path, value), "model")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("key", ["dim", "autoencoder", "name"])
def test_missing_keys_are_named(key: str) -> None:
    data = to_dict(preset("bair")[0])
    del data[key]
    with pytest.raises(ConfigError, match=f"^model: key '{key}' is missing$"):
        from_dict(ModelConfig, data, "model")


def test_missing_keys_of_parts_are_named() -> None:
    data = to_dict(preset("bair")[0])
    del data["autoencoder"]["height"]
    with pytest.raises(ConfigError, match=r"^model\.autoencoder: key 'height' is missing$"):
        from_dict(ModelConfig, data, "model")


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_not_an_object(data: Any) -> None:
    with pytest.raises(ConfigError, match=r"^SamplingConfig: expected an object"):
        from_dict(SamplingConfig, data)


# -- values


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("dim", 770, "heads"),
        ("dim", 0, "dim"),
        ("heads", 0, "heads"),
        ("heads", -12, "heads"),
        ("heads", 64, "head size"),
        ("temporal_layers", 0, "temporal_layers"),
        ("canvas_layers", 0, "canvas_layers"),
        ("context_frames", 0, "context_frames"),
        ("spatial_layers", 1, "spatial_layers"),
        ("encoder_layers", 0, "encoder_layers"),
        ("encoder_layers", 8, "encoder_layers"),
        ("temporal_patch", 0, "temporal_patch"),
        ("temporal_patch", 3, "temporal_patch"),
        ("action_dim", -1, "action_dim"),
        ("canvas_conv", -1, "canvas_conv"),
        ("fps", 0, "fps"),
        ("fps", float("nan"), "fps"),
        ("autoencoder.height", 0, "height"),
        ("autoencoder.height", 63, "height"),
        ("autoencoder.width", 66, "width"),
        ("autoencoder.temporal_compression", 0, "temporal_compression"),
        ("autoencoder.latent_channels", 0, "latent_channels"),
        ("autoencoder.blocks", 0, "blocks"),
        ("autoencoder.temporal_kernel", 0, "temporal_kernel"),
        ("autoencoder.encoder_kernel", 0, "encoder_kernel"),
        ("autoencoder.widths", [], "widths"),
        ("autoencoder.widths", [12], "widths"),
        ("autoencoder.widths", [-8], "widths"),
        ("autoencoder.patch", 0, "patch"),
        ("autoencoder.patch", -2, "patch"),
        ("temporal_layers", 1025, "temporal_layers"),
        ("context_frames", 10**9, "context_frames"),
        ("dim", 12 * 2**40, "dim"),
        ("autoencoder.blocks", 10**9, "blocks"),
        ("autoencoder.blocks", 1025, "blocks"),  # modules are made one by one, before weights fit
        ("autoencoder.widths", [8] * 17, "widths"),
        ("autoencoder.widths", [8, 2**40], "widths"),
        ("flow.blocks", 10**9, "blocks"),
        ("flow.blocks", 1025, "blocks"),
        ("flow.width", 0, "width"),
        ("flow.blocks", 0, "blocks"),
    ],
)
def test_bad_model_values_are_named(path: str, value: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        from_dict(ModelConfig, edited(preset("bair")[0], path, value), "model")
    assert "\n" not in str(caught.value)


def test_convolutions_of_a_canvas_need_one() -> None:
    data = edited(preset("bair")[0], "canvas", False)
    with pytest.raises(ConfigError, match="canvas_conv needs a canvas"):
        from_dict(ModelConfig, data | {"canvas_conv": 8}, "model")


def test_no_widths_with_patch_one() -> None:
    with pytest.raises(ConfigError, match="widths"):
        autoencoder(patch=1, widths=())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ar_steps", 0),
        ("flow_steps", 0),
        ("solver", "rk4"),
        ("order", "raster"),
        ("frame_noise", -0.01),
        ("frame_noise", 1.01),
        ("canvas_noise", float("nan")),
        ("temporal_guidance", -1.0),
        ("canvas_guidance", float("inf")),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("ar_steps", 2.0),
        ("flow_steps", True),
        ("temporal_guidance", "1.0"),
        ("flow_temperature", (0.5,)),
        ("flow_temperature", (0.5, 0.5, 0.5)),
        ("flow_temperature", 0.5),
    ],
)
def test_bad_sampling_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        SamplingConfig(**{name: value})


def test_sampling_values_of_other_types_are_the_same() -> None:
    given = SamplingConfig(
        ar_steps=np.int64(2), temporal_guidance=1, flow_temperature=[1, np.float32(0.5)]
    )  # type: ignore[arg-type]
    assert given == SamplingConfig(ar_steps=2, temporal_guidance=1.0, flow_temperature=(1.0, 0.5))
    assert type(given.ar_steps) is int
