"""The unified transformer: drawing with the ring cache equals teaching a whole clip, and neither
sees what it must not. Letters as in `canvasmar_rt.config`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from canvasmar_rt.components import MASKED, components
from canvasmar_rt.config import ModelConfig, SamplingConfig, from_dict, to_dict
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.models import sampler
from canvasmar_rt.models.canvasmar import CanvasMAR, gather_tokens
from canvasmar_rt.models.families import build, count_parameters
from canvasmar_rt.models.graphs import graph
from canvasmar_rt.models.unified import UnifiedMAR, UnifiedTransformer
from canvasmar_rt.schedule import time_rotation
from tests.conftest import small_config, unified_config
from training.transfer import transfer, translate

B, T, N, C, D, A, F = 2, 8, 16, 4, 32, 4, 3
"""Clips reach past the window of F frames."""
KNOWN = 5
VARIANTS = {
    "actions": unified_config(),
    "no-actions": unified_config(action_dim=0),
    "one-frame": unified_config(context_frames=1, temporal_layers=3),
    "one-layer": unified_config(context_frames=2, temporal_layers=1),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(config: ModelConfig | None = None, seed: int = 0) -> UnifiedMAR:
    """Weights and norms that are all away from their defaults."""
    model = build(config or unified_config(), seed)
    assert isinstance(model, UnifiedMAR)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def rotation(time: int) -> Tensor:
    return torch.from_numpy(time_rotation(time, 2))


LATENTS, ACTIONS = normal(B, T, N, C), normal(B, T, A, seed=1)
GIVEN = (torch.arange(T) % 3 > 0).float()  # whether an action leads to a frame
ORDER = normal(B * T, N, seed=2).argsort(dim=1)
FIRST = (torch.arange(T + 1) == 0).float().expand(B, -1)


def told(model: UnifiedTransformer) -> tuple[Tensor, Tensor]:
    """`history` and `drawn` of `teach`: every frame knows the first of its `ORDER`."""
    read = torch.cat([torch.zeros(B, 1, N, C), LATENTS[:, :-1]], dim=1)
    history = model.embed_frames(read, FIRST[:, :T], ACTIONS, GIVEN.expand(B, -1))
    known = ORDER[:, :KNOWN]
    drawn = model.draw_tokens(B * T, gather_tokens(LATENTS.flatten(0, 1), known), known)
    return history, drawn.view(B, T, N, D)


def times(start: int = 0, stride: int = 1) -> Tensor:
    return torch.stack([rotation(start + stride * i) for i in range(T + 1)])


def teach(
    model: UnifiedTransformer, history: Tensor, drawn: Tensor, time: Tensor | None = None
) -> Tensor:
    time = times() if time is None else time
    return model.teach(history, drawn, time, torch.arange(T), torch.ones(B, T))


# -- a clip at once and the ring


@pytest.mark.parametrize("name", VARIANTS)
def test_teaching_equals_drawing_with_the_ring(name: str) -> None:
    """Every frame of a clip longer than the window, against the reference sampler's steps."""
    model = make(VARIANTS[name])
    whole = teach(model.temporal, *told(model.temporal))
    assert whole.std() > 0.1
    state = sampler.empty_state(model, B)
    for i in range(T):
        action = ACTIONS[:, i] if GIVEN[i] and model.config.action_dim else None
        _, state = sampler._advance(model, state, action)
        embed = sampler._unified(model, state, torch.ones(1))
        order = ORDER.view(B, T, N)[:, i]
        known, rest = order[:, :KNOWN], order[:, KNOWN:]
        (z,) = embed(LATENTS[:, i], known, rest, 7)
        torch.testing.assert_close(z, gather_tokens(whole[:, i], rest[:, :7]), rtol=1e-4, atol=1e-5)
        state = dataclasses.replace(state, latent=LATENTS[:, i])


def test_a_frame_known_whole_is_a_frame_read() -> None:
    """Of which the Temporal ViT's test has a transformer in NumPy."""
    model = make(unified_config(context_frames=T + 1, action_dim=0)).temporal
    history, _ = told(model)
    read = torch.cat([torch.zeros(B, 1, N, C), LATENTS], dim=1)
    want = model(read, FIRST, None, None, times())
    got = teach(model, history, model.embed(LATENTS))
    torch.testing.assert_close(got, want[:, 1:], rtol=1e-4, atol=1e-5)


def test_some_frames_are_taught_as_all_are() -> None:
    model = make().temporal
    history, drawn = told(model)
    whole, frames = teach(model, history, drawn), torch.tensor([6, 0, 3])
    got = model.teach(history, drawn[:, frames], times(), frames, torch.ones(B, 3))
    torch.testing.assert_close(got, whole[:, frames], rtol=1e-4, atol=1e-5)
    on = torch.tensor([[1.0, 0, 1], [0, 1, 1]])  # some of them without their history
    got = model.teach(history, drawn[:, frames], times(), frames, on)
    assert torch.equal((got - whole[:, frames]).abs().amax((2, 3)) < 1e-4, on.bool())


@pytest.mark.parametrize("changed", [0, 3, T - 1])
def test_a_frame_sees_no_later_frame_and_no_other_drawn_one(changed: int) -> None:
    """Time `changed` of the history holds frame changed-1: it tells frames from `changed` on."""
    model = make().temporal
    history, drawn = told(model)
    before = teach(model, history, drawn)
    other = history.clone()
    other[:, changed] += normal(N, D, seed=5)
    difference = (teach(model, other, drawn) - before).abs().amax((0, 2, 3))
    reach = changed + 2 * (F - 1) + 1  # two layers
    assert difference[:changed].sum() == 0
    assert difference[changed:reach].min() > 1e-5
    assert difference[reach:].sum() < 1e-5
    other = drawn.clone()
    other[:, changed] += normal(N, D, seed=5)
    difference = (teach(model, history, other) - before).abs().amax((0, 2, 3))
    assert difference.nonzero().tolist() == [[changed]]


def test_only_differences_of_times_matter() -> None:
    model = make().temporal
    early = teach(model, *told(model))
    for start in (1, 10_007, 10**7):
        late = teach(model, *told(model), times(start))
        torch.testing.assert_close(late, early, rtol=1e-3, atol=1e-3)
    scaled = teach(model, *told(model), times(stride=2))
    assert (scaled - early).abs().amax((0, 2, 3)).min() > 0.01


# -- drawing


SELECT = normal(B, N, seed=1).argsort(dim=1)[:, :6]
BIAS = torch.tensor([[0, MASKED, 0], [0, 0, MASKED]])
CACHES = [normal(F, B, N, D, seed=2 + i) for i in range(4)]
DRAW: dict[str, Any] = {
    "x": normal(B, N, D), "select_index": SELECT, "temporal_on": torch.ones(1),
    "time": rotation(9), "history_bias": BIAS, "caches": CACHES,
}  # fmt: skip
"""Two rows that may see different slots."""


def draw(model: UnifiedMAR, **changes: Any) -> Tensor:
    return model.temporal.draw(**(DRAW | changes))


def test_selected_tokens_come_in_their_order() -> None:
    """Of a frame that starts from masks alone."""
    model = make()
    inputs = torch.ones(1), rotation(9), BIAS, *CACHES, SELECT
    (some,) = graph(model, "spatial_first")(*inputs)
    everywhere, masks = torch.arange(N).expand(B, -1), model.temporal.mask.expand(B, N, -1)
    (every,) = draw(model, x=masks, select_index=everywhere)
    torch.testing.assert_close(some[0], gather_tokens(every, SELECT), rtol=1e-4, atol=1e-5)
    assert (some[0] - gather_tokens(every, SELECT.flip(1))).abs().amax(-1).min() > 1e-3


def test_tokens_not_drawn_yet_are_not_looked_at() -> None:
    """Neither their content in `partial` nor the order of `known_index` matters."""
    model = make()
    order = normal(B, N, seed=3).argsort(dim=1)
    partial, known = normal(B, N, C, seed=4), order[:, :KNOWN]

    def z(partial: Tensor, known: Tensor) -> Any:
        select = order[:, KNOWN : KNOWN + 6]
        inputs = torch.ones(1), rotation(9), BIAS, *CACHES, select, partial, known
        return graph(model, "spatial")(*inputs)[0]

    before = z(partial, known)
    other = torch.full_like(partial, float("nan"))
    other.scatter_(1, known[..., None].expand(-1, -1, C), gather_tokens(partial, known))
    assert torch.equal(z(other, known), before)
    torch.testing.assert_close(z(partial, known.flip(1)), before)
    partial = partial.index_put((torch.tensor(0), known[0, 2]), torch.ones(C))
    assert (z(partial, known) - before)[:, 0].abs().amax(-1).min() > 1e-4


def test_a_branch_without_history_is_independent_of_it() -> None:
    model, branches = make(), torch.tensor([0.0, 1.0])
    blind, seeing = draw(model, temporal_on=branches)
    caches = [c + 5 for c in CACHES]
    other = draw(model, temporal_on=branches, caches=caches, history_bias=BIAS.flip(1))
    assert torch.equal(other[0], blind)
    assert (other[1] - seeing).abs().amax(-1).min() > 0.01
    torch.testing.assert_close(draw(model)[0], seeing)
    torch.testing.assert_close(draw(model, history_bias=torch.full((B, F), MASKED))[0], blind)


@pytest.mark.parametrize("slot", range(F))
def test_the_bias_hides_slots_of_rows(slot: int) -> None:
    model = make()
    before = draw(model)
    added = 5.0 * (torch.arange(F) == slot)[:, None, None, None]
    changed = (draw(model, caches=[c + added for c in CACHES]) - before).abs().amax((0, 2, 3))
    assert torch.equal(changed > 1e-3, BIAS[:, slot] == 0)
    assert not changed[BIAS[:, slot] < 0].any()


def test_rows_are_independent() -> None:
    model = make()
    together = draw(model)
    for row in range(B):
        own = {k: DRAW[k][row : row + 1] for k in ("x", "select_index", "history_bias")}
        alone = draw(model, **own, caches=[c[:, row : row + 1] for c in CACHES])
        torch.testing.assert_close(alone[:, 0], together[:, row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("guidance", "heeds"), [(0.0, False), (1.0, True), (1.5, True)])
def test_without_guidance_the_sampler_draws_without_history(guidance: float, heeds: bool) -> None:
    model = make()
    sampling = SamplingConfig(ar_steps=3, flow_steps=2, temporal_guidance=guidance)
    noise = sampler.draw_noise(model.config, sampling, seed=1, streams=range(B), frame=2)
    one, other = (
        sampler.step(model, sampling, sampler.start(model, normal(B, 2, N, C, seed=s)), noise)[1]
        for s in (5, 6)
    )
    assert one.canvas is one.staticness is None
    same = torch.isclose(one.latent, other.latent, atol=1e-5).all(-1)
    assert not same.any() if heeds else same.all()


# -- other resolutions


def test_the_same_size_takes_all_weights_but_the_autoencoder() -> None:
    given, network = make(seed=1), make(seed=2)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    transfer(given, network, "here")
    for name, value in network.state_dict().items():
        source = before if name.startswith("autoencoder.") else given.state_dict()
        assert torch.equal(value, source[name]), name


def test_a_model_of_another_grid_keeps_its_start() -> None:
    """A BOS that grows from row to row, and one that grows from column to column, still do."""
    ae = unified_config().autoencoder
    given, network = (
        make(unified_config(autoencoder=dataclasses.replace(ae, height=h, width=w)), seed=h)
        for h, w in ((16, 24), (24, 32))
    )
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    given.temporal.bos[:, 0], given.temporal.bos[:, 1] = y.flatten(), x.flatten()
    given.temporal.bos[:, 2] = 7.0
    transfer(given, network, "here")
    rows, columns, constant = network.temporal.bos[:, :3].T.reshape(3, 6, 8)
    torch.testing.assert_close(constant, torch.full((6, 8), 7.0))
    for grown, size in ((rows, 4), (columns.T, 6)):
        torch.testing.assert_close(grown, grown[:, :1].expand_as(grown))
        assert (grown[:, 0].diff() > 0).all()
        torch.testing.assert_close(grown.mean(), torch.tensor((size - 1) / 2))
    sampling = SamplingConfig(ar_steps=3, flow_steps=2)
    noise = sampler.draw_noise(network.config, sampling, seed=1, streams=range(B), frame=0)
    _, sample = sampler.step(network, sampling, sampler.empty_state(network, B), noise)
    assert sample.frames.shape == (B, 2, 24, 32, 3)
    assert sample.latent.isfinite().all()


@pytest.mark.parametrize("config", [small_config(), unified_config()], ids=["canvasmar", "unified"])
def test_a_model_reads_and_writes_the_latents_of_another_autoencoder(config: ModelConfig) -> None:
    """Where new latents are a linear image of the old ones, layers that read them give what they
    gave, and layers that write them the image of what they wrote."""
    channels = config.autoencoder.latent_channels
    given, image = build(config, seed=3), normal(channels, 2 * channels, seed=5)
    old, x = normal(B, 3, N, channels), normal(B, config.dim, seed=6)
    h, action = normal(B, config.flow.width, seed=7), normal(B, 2, config.action_dim, seed=8)
    told = torch.zeros(B, 2), action, torch.ones(B, 2)

    def readings(latents: Tensor) -> list[Tensor]:
        parts = [given.temporal.embed_frames(latents[:, :2], *told), given.flow.embed(latents)]
        if isinstance(given, CanvasMAR):
            assert given.canvas is not None
            parts += [given.canvas.embed(latents), given.spatial.embed(latents)]
        return parts

    def writings() -> list[Tensor]:
        return [given.flow.out(h)] + ([] if given.canvas is None else [given.canvas.canvas(x)])

    read, written = readings(old), writings()
    translate(given, old, old @ image)
    for before, after in zip(read, readings(old @ image), strict=True):
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    for before, after in zip(written, writings(), strict=True):
        torch.testing.assert_close(after, before @ image, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (small_config(temporal_patch=1), r"temporal\.mask does not fit"),
        (unified_config(dim=48), "its head_dim is 24, not 16"),
        (unified_config(action_dim=2), r"temporal\.action\.weight does not fit"),
    ],
    ids=["family", "dim", "actions"],
)
def test_another_model_is_refused(given: ModelConfig, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"here: another model; {what}"):
        transfer(build(given), make(), "here")


def test_a_deeper_model_has_no_place() -> None:
    deeper = build(unified_config(temporal_layers=make().config.temporal_layers + 1))
    with pytest.raises(ConfigError, match=r"here: .*no place for its temporal\.blocks\.\d"):
        transfer(deeper, make(), "here")


# -- configuration and components


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"canvas_layers": 1}, "no canvas_layers, got 1"),
        ({"spatial_layers": 2}, "no spatial_layers, got 2"),
        ({"encoder_layers": 1}, "no encoder_layers, got 1"),
        ({"canvas": True}, "needs canvas False"),
        ({"temporal_patch": 2}, "needs temporal_patch 1"),
        ({"group": 2}, "needs group 1"),
        ({"norm": "expert"}, "needs norm shared"),
        ({"condition_attention": "isolated"}, "needs condition_attention all"),
        ({"temporal_layers": 0}, "temporal_layers"),
        ({"family": "video"}, "family 'video'"),
    ],
)
def test_a_unified_model_has_none_of_the_other_parts(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(unified_config(), **change)


def test_json_round_trip() -> None:
    config = unified_config()
    text = json.dumps(to_dict(config))
    assert from_dict(ModelConfig, json.loads(text)) == config
    old = to_dict(small_config())
    del old["family"]  # written before there were families
    assert from_dict(ModelConfig, old) == small_config()


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_counted_without_making_them(name: str) -> None:
    model, counted = build(VARIANTS[name]), count_parameters(VARIANTS[name])
    assert set(counted) == {"temporal", "flow", "autoencoder"}
    for part, count in counted.items():
        assert count == sum(p.numel() for p in model.get_submodule(part).parameters())


def test_components() -> None:
    """Neither canvas nor condition; what draws reads the ring and no z_t."""
    table = components(unified_config())
    drawing = {"spatial_first", "spatial", "flow"}
    assert set(table) == {"encoder", "temporal", "decoder", "frame"} | drawing
    ring = [f"cache_{kind}_{i}" for i in range(2) for kind in ("key", "value")]
    first = ["temporal_on", "draw_time", "history_bias", *ring, "select_index"]
    names = {name: [s.name for s in c.inputs] for name, c in table.items()}
    assert names["spatial_first"] == first
    assert names["spatial"] == [*first, "partial", "known_index"]
    # the frame before only leaves its keys and values
    new = [name.replace("cache", "new") for name in ring]
    assert [s.name for s in table["temporal"].outputs] == new
    assert [s.name for s in table["frame"].outputs] == ["next_latent", "order", *new]
    assert {"draw_time", "history_bias"} <= set(names["frame"])
    assert not {"canvas_on", "canvas_noise", "frame_noise"} & set(names["frame"])
    assert table["spatial"].outputs[0].dims == ("G", "B", "S", D)
