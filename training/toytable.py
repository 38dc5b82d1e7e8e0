"""ToyTable: a procedural robot-pushing world, in the spirit of the BAIR data set.

A camera looks straight down on a square tray. A two-link arm, its base at the top edge, moves
a gripper that pushes toys about. Everything is vectorised over a batch of clips in torch, and
the same code runs on CPU and GPU.

Randomness: every clip `i` of a seed has torch.Generators of its own, on the CPU, keyed by
(seed, stream, i); what they draw is moved to the device. So a call repeated gives the same bits,
a longer clip starts with the shorter one, and what is drawn for a clip depends neither on its
batch nor on the device. Only the last bits of the arithmetic may, as vector units round the
ends of arrays otherwise: a clip drawn alone shows the same scene to within a grey level or so,
though a contact may in rare cases magnify the difference.

Units: positions, radii and actions are in table widths, x to the right and y down, both in
[0, 1]; pixel (row i, column j) has its centre at ((j + 0.5) / size, (i + 0.5) / size). Speeds
are table widths per frame, angles radians.

Notation: B clips, T frames, n toy slots, F frames drawn together, P pixels of a patch,
H = W = size, C = 3 colours (RGB in [0, 1] until the very end).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from canvasmar_rt.config import TOYTABLE_SPEED
from canvasmar_rt.errors import ConfigError, InputError

# ---------------------------------------------------------------------------------------------
# Configuration, state and results


@dataclass(frozen=True, kw_only=True)
class ToyTableConfig:
    """What a ToyTable world may contain; lengths in table widths, speeds per frame."""

    size: int = 64
    min_toys: int = 3
    max_toys: int = 5
    min_radius: float = 0.07
    max_radius: float = 0.11
    gripper_radius: float = 0.045
    max_speed: float = TOYTABLE_SPEED
    rim: float = 0.03
    """Width of the tray's wall, which toys cannot enter."""
    substeps: int = 4
    damping: float = 0.35
    """Share of a free toy's speed that is lost in a frame."""
    friction: float = 0.004
    """Speed that dry friction takes from a free toy in a frame, whatever its speed."""
    push_share: float = 0.65
    """Chance that the policy, when it decides anew, goes to push a toy."""
    wander_share: float = 0.25
    """Chance that it wanders smoothly instead; what is left over is the chance of a rest."""

    def __post_init__(self) -> None:
        checks = {
            "size must be at least 16": self.size >= 16,
            "1 <= min_toys <= max_toys <= 6": 1 <= self.min_toys <= self.max_toys <= 6,
            "0.03 <= min_radius <= max_radius <= 0.13": (
                0.03 <= self.min_radius <= self.max_radius <= 0.13
            ),
            "gripper_radius must lie in [0.02, 0.08]": 0.02 <= self.gripper_radius <= 0.08,
            "max_speed must lie in (0, 0.2]": 0 < self.max_speed <= 0.2,
            "rim must lie in [0, 0.08]": 0 <= self.rim <= 0.08,
            "substeps must be at least 1": self.substeps >= 1,
            "damping must lie in [0, 1]": 0 <= self.damping <= 1,
            "friction must not be negative": self.friction >= 0,
            "push_share and wander_share must be chances whose sum is at most 1": (
                min(self.push_share, self.wander_share) >= 0
                and self.push_share + self.wander_share <= 1
            ),
        }
        for rule, holds in checks.items():
            if not holds:
                raise ConfigError(f"ToyTableConfig: {rule}; got {self}.")


@dataclass(frozen=True, kw_only=True)
class WorldState:
    """Everything there is to know about a batch of worlds; float32 unless said otherwise.

    The first eight fields change from step to step, the others are drawn once by `reset`.
    """

    gripper: Tensor  # (B, 2), on the grid of 2**-16 table widths
    toys: Tensor  # (B, n, 2) centres; empty slots are parked far off the table
    toy_velocity: Tensor  # (B, n, 2) per frame
    toy_angle: Tensor  # (B, n)
    toy_spin: Tensor  # (B, n) radians per frame
    toy_mask: Tensor  # (B, n) bool, true where the slot holds a toy
    toy_shape: Tensor  # (B, n) int64, an index into SHAPES
    toy_radius: Tensor  # (B, n), of the circle around the toy
    toy_colour: Tensor  # (B, n, C)
    arm_base: Tensor  # (B, 2)
    arm_side: Tensor  # (B,) +1 or -1: the side to which the elbow bends
    arm_grey: Tensor  # (B,)
    table_colour: Tensor  # (B, 2, C), the two tones of the texture
    table_kind: Tensor  # (B,) int64: 0 wood, 1 stripes, 2 cloth, 3 plain
    table_angle: Tensor  # (B,) direction of the grain
    table_frequency: Tensor  # (B,) bands per table width
    table_noise: Tensor  # (B, 2, 9, 9) in [-1, 1], lattices of smooth noise
    light: Tensor  # (B, 2) unit vector: the way shadows fall
    light_slope: Tensor  # (B,) brightness gained per table width towards the light
    light_colour: Tensor  # (B, C), the product of brightness and warmth


@dataclass(frozen=True, kw_only=True)
class PolicyState:
    """What the scripted operator has in mind."""

    velocity: Tensor  # (B, 2) smoothed command, per frame
    mode: Tensor  # (B,) int64: PUSH, WANDER or REST
    frames_left: Tensor  # (B,) int64 until the next decision
    target: Tensor  # (B,) int64, the toy to push
    aim: Tensor  # (B, 2) where to push it
    speed: Tensor  # (B,) of a push


@dataclass(frozen=True, kw_only=True)
class ToyClips:
    """A batch of clips and their ground truth.

    `gripper[:, t + 1] == gripper[:, t] + actions[:, t]` holds exactly, in float32.
    """

    frames: Tensor  # (B, T, H, W, C) uint8
    actions: Tensor  # (B, T - 1, 2) float32, executed: after clamping
    gripper: Tensor  # (B, T, 2) float32
    toys: Tensor  # (B, T, n, 2) float32
    toy_angle: Tensor  # (B, T, n) float32
    toy_mask: Tensor  # (B, n) bool


PUSH, WANDER, REST = 0, 1, 2

# A toy is a star polygon (Inigo Quilez, "distance functions 2D", sdStar), lengthened along x by
# a half length, rounded, and perhaps hollow. Lengths are shares of the toy's radius; core +
# half length + rounding = 1. `reach` is the disc that stands for the toy among toys.
# name: (points, m, core, half length, rounding, hole, reach)
_SHAPE_TABLE: dict[str, tuple[float, float, float, float, float, float, float]] = {
    "disc": (4, 2, 0.0, 0.0, 0.82, 0.0, 0.82),
    "ring": (4, 2, 0.0, 0.0, 0.92, 0.45, 0.92),
    "square": (4, 2, 0.84, 0.0, 0.16, 0.0, 0.84),
    "triangle": (3, 2, 0.84, 0.0, 0.16, 0.0, 0.72),
    "star": (5, 3.1, 0.86, 0.0, 0.14, 0.0, 0.80),
    "pill": (4, 2, 0.0, 0.52, 0.48, 0.0, 0.80),
    "hexagon": (6, 2, 0.78, 0.0, 0.12, 0.0, 0.86),
}
SHAPES = tuple(_SHAPE_TABLE)

# Hues of toys, in turns, all well away from the gripper's: red, orange, yellow, green, cyan, blue.
TOY_HUES = (0.995, 0.07, 0.145, 0.34, 0.485, 0.60)
_GRIPPER_COLOUR = (1.0, 0.08, 0.80)
_LINK = 0.61  # length of each of the two links
_LINK_RADII = (0.058, 0.046)
_GRIPPER_LOW = (0.09375, 0.140625)  # multiples of 2**-16, as is the complement to one
_GRIPPER_HIGH = (0.90625, 0.90625)
_GRID = 65536.0
_PARKED = 9.0
_TOY_SHADOW, _ARM_SHADOW = 0.022, 0.05  # how far a shadow falls, in table widths
_LATTICE = 9
_POLICY_DRAWS = 8

# ---------------------------------------------------------------------------------------------
# Randomness

_WORLD_STREAM, _POLICY_STREAM = 0, 1


def _generator(seed: int, stream: int, clip: int) -> torch.Generator:
    """A CPU generator for one clip; splitmix64 mixes the three so that neighbours differ."""
    mask = (1 << 64) - 1
    z = 0
    for word in (seed, stream, clip):
        z = (z ^ (word & mask)) + 0x9E3779B97F4A7C15 & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        z ^= z >> 31
    return torch.Generator().manual_seed(z >> 1)


def _uniforms(seed: int, stream: int, first: int, batch: int, count: int) -> Tensor:
    """(B, count) numbers in [0, 1) on the CPU; a larger count begins with the smaller one."""
    rows = [torch.rand(count, generator=_generator(seed, stream, first + i)) for i in range(batch)]
    return torch.stack(rows)


class _Draws:
    """Hands out columns of a (B, K) table of uniforms in order."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._next = 0

    def take(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B, *shape), uniform in [low, high)."""
        count = math.prod(shape)
        part = self._table[:, self._next : self._next + count]
        assert part.shape[1] == count, "the table of draws is too narrow"
        self._next += count
        return part.reshape(-1, *shape) * (high - low) + low


def policy_noise(*, batch: int, steps: int, seed: int, first_clip: int = 0) -> Tensor:
    """The draws of the scripted policy, (steps, B, 8), uniform in [0, 1), on the CPU."""
    table = _uniforms(seed, _POLICY_STREAM, first_clip, batch, steps * _POLICY_DRAWS)
    return table.reshape(batch, steps, _POLICY_DRAWS).transpose(0, 1).contiguous()


# ---------------------------------------------------------------------------------------------
# Geometry


def _norm(vector: Tensor, *, keep: bool = False) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vector, dim=-1, keepdim=keep)
    return length


def _hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB along a new last axis; hue in turns."""
    offsets = torch.tensor([5.0, 3.0, 1.0], device=hue.device)
    k = (offsets + hue.unsqueeze(-1) * 6) % 6
    dip = torch.minimum(k, 4 - k).clamp(0, 1)
    return value.unsqueeze(-1) * (1 - saturation.unsqueeze(-1) * dip)


def _form(shape: Tensor) -> Tensor:
    """Rows of the shape table, (..., 7), for int64 shapes (...)."""
    return _shape_rows(shape.device)[shape]


@cache
def _shape_rows(device: torch.device) -> Tensor:
    """The shape table as a constant on a device, copied there once."""
    return torch.tensor(list(_SHAPE_TABLE.values()), device=device)


def _toy_distance(x: Tensor, y: Tensor, angle: Tensor, radius: Tensor, form: Tensor) -> Tensor:
    """Signed distance to the solid toy (a ring's hole counts as inside).

    `x`, `y`: offsets from the toy's centre; the others broadcast against them, `form` with its
    seven columns as the last axis.
    """
    points, m, core, half, rounding = form[..., :5].unbind(-1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    along, across = x * cos + y * sin, y * cos - x * sin
    half = half * radius
    along = along - along.clamp(-half, half)
    # Fold the plane into one half spoke of the star, then measure to its edge.
    spoke = math.pi / points
    bend = math.pi / m
    length = torch.sqrt(along * along + across * across)
    turn = torch.atan2(along, across) % (2 * spoke) - spoke
    edge = core * radius
    px = length * torch.cos(turn) - edge * torch.cos(spoke)
    py = length * torch.sin(turn).abs() - edge * torch.sin(spoke)
    ex, ey = torch.cos(bend), torch.sin(bend)
    slide = torch.minimum((-(px * ex + py * ey)).clamp(min=0), edge * torch.sin(spoke) / ey)
    px, py = px + ex * slide, py + ey * slide
    return torch.sqrt(px * px + py * py) * torch.sign(px) - rounding * radius


def _elbow(state: WorldState) -> Tensor:
    """Where the elbow must be for the forearm to end at the gripper, (B, 2)."""
    reach = state.gripper - state.arm_base
    length = _norm(reach, keep=True).clamp(max=2 * _LINK - 1e-3)
    ahead = reach / length
    aside = torch.stack((-ahead[:, 1], ahead[:, 0]), dim=-1) * state.arm_side.unsqueeze(-1)
    height = torch.sqrt(_LINK**2 - length * length / 4)
    return state.arm_base + ahead * (length / 2) + aside * height


# ---------------------------------------------------------------------------------------------
# Dynamics


def _separate_toys(state: WorldState, toys: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Push overlapping toys apart, each by half, and take away their closing speed."""
    reach = state.toy_radius * _form(state.toy_shape)[..., 6]
    delta = toys.unsqueeze(2) - toys.unsqueeze(1)  # (B, n, n, 2): from toy j to toy i
    distance = _norm(delta).clamp(min=1e-6)
    overlap = (reach.unsqueeze(2) + reach.unsqueeze(1) - distance).clamp(min=0)
    both = state.toy_mask.unsqueeze(2) & state.toy_mask.unsqueeze(1)
    both = both & ~torch.eye(toys.shape[1], dtype=torch.bool, device=toys.device)
    overlap = overlap * both
    normal = delta / distance.unsqueeze(-1)
    closing = ((velocity.unsqueeze(2) - velocity.unsqueeze(1)) * normal).sum(-1).clamp(max=0)
    closing = closing * (overlap > 0)
    toys = toys + (0.5 * overlap.unsqueeze(-1) * normal).sum(2)
    velocity = velocity - (0.6 * closing.unsqueeze(-1) * normal).sum(2)
    return toys, velocity


def _keep_on_table(
    config: ToyTableConfig, state: WorldState, toys: Tensor, velocity: Tensor
) -> tuple[Tensor, Tensor]:
    """Stop toys at the walls, from which they bounce softly."""
    margin = (state.toy_radius + config.rim).unsqueeze(-1)
    kept = torch.minimum(torch.maximum(toys, margin), 1 - margin)
    hit = (kept != toys) & ((kept - toys) * velocity < 0)
    velocity = torch.where(hit, -0.3 * velocity, velocity)
    mask = state.toy_mask.unsqueeze(-1)
    return torch.where(mask, kept, toys), torch.where(mask, velocity, 0.0)


def clamp_action(config: ToyTableConfig, state: WorldState, action: Tensor) -> Tensor:
    """The action that `step` really executes, (B, 2): within max speed and the table's limits.

    It lies on the grid of 2**-16 table widths, so that adding it to `state.gripper` in float32
    is exact.
    """
    speed = _norm(action, keep=True).clamp(min=1e-9)
    action = action * (config.max_speed / speed).clamp(max=1)
    low, high = state.gripper.new_tensor(_GRIPPER_LOW), state.gripper.new_tensor(_GRIPPER_HIGH)
    goal = torch.minimum(torch.maximum(state.gripper + action, low), high)
    return torch.round((goal - state.gripper) * _GRID) / _GRID


def step(config: ToyTableConfig, state: WorldState, action: Tensor) -> WorldState:
    """One frame of the world under `action` (B, 2), a move of the gripper in table widths.

    The action is first clamped (see `clamp_action`). Toys that the gripper enters are moved out
    along the contact normal and turned as a free body would be (one position-based step,
    Müller et al. 2020, "Detailed rigid body simulation"), then slide on until friction stops
    them.

    Raises:
        InputError: the action's shape is not (B, 2).
    """
    if action.shape != state.gripper.shape:
        raise InputError(
            f"ToyTable step: action must be {tuple(state.gripper.shape)}, one (dx, dy) a clip; "
            f"got {tuple(action.shape)}."
        )
    action = clamp_action(config, state, action)
    form = _form(state.toy_shape)
    parts = config.substeps
    toys, velocity = state.toys, state.toy_velocity
    angle, spin = state.toy_angle, state.toy_spin
    gyration = (0.5 * state.toy_radius**2).clamp(min=1e-6)  # squared radius of gyration
    keep = (1 - config.damping) ** (1 / parts)
    # Central differences of the distance give the contact normal in one call.
    h = 1e-3
    probe = toys.new_tensor([[0.0, 0.0], [h, 0.0], [-h, 0.0], [0.0, h], [0.0, -h]])
    for part in range(1, parts + 1):
        gripper = state.gripper + action * (part / parts)
        velocity = velocity * keep
        speed = _norm(velocity, keep=True)
        velocity = velocity * (1 - config.friction / parts / speed.clamp(min=1e-9)).clamp(min=0)
        spin = spin * keep
        spin = spin * (1 - 0.05 / parts / spin.abs().clamp(min=1e-9)).clamp(min=0)
        toys = toys + velocity / parts
        angle = angle + spin / parts

        arm = gripper.unsqueeze(1) - toys  # (B, n, 2): from the toy's centre to the gripper
        around = arm.unsqueeze(-2) + probe  # (B, n, 5, 2)
        distance = _toy_distance(
            around[..., 0],
            around[..., 1],
            angle.unsqueeze(-1),
            state.toy_radius.unsqueeze(-1),
            form.unsqueeze(-2),
        )
        normal = torch.stack(
            (distance[..., 1] - distance[..., 2], distance[..., 3] - distance[..., 4]), dim=-1
        )
        normal = normal / _norm(normal, keep=True).clamp(min=1e-9)  # out of the toy
        depth = (config.gripper_radius - distance[..., 0]).clamp(min=0) * state.toy_mask
        # A toy caught between gripper and wall slips out in moderate steps, not in one leap.
        depth = depth.clamp(max=1.5 * config.max_speed / parts)
        lever = arm - normal * distance[..., :1]  # the contact point, from the toy's centre
        moment = -(lever[..., 0] * normal[..., 1] - lever[..., 1] * normal[..., 0])
        push = depth / (1 + moment**2 / gyration)
        moved = -push.unsqueeze(-1) * normal
        turned = push * moment / gyration
        toys, angle = toys + moved, angle + turned
        # The toy leaves with the speed at which it was moved, not with more.
        away = (velocity * -normal).sum(-1, keepdim=True)
        wanted = (push * parts).clamp(max=config.max_speed).unsqueeze(-1)
        velocity = velocity - normal * (wanted - away).clamp(min=0) * (depth > 0).unsqueeze(-1)
        spin = torch.where(depth > 0, 0.5 * spin + 0.5 * (turned * parts).clamp(-0.6, 0.6), spin)

        for _ in range(2):
            toys, velocity = _separate_toys(state, toys, velocity)
            toys, velocity = _keep_on_table(config, state, toys, velocity)
    return replace(
        state,
        gripper=state.gripper + action,
        toys=toys,
        toy_velocity=velocity,
        toy_angle=angle,
        toy_spin=spin,
    )


# ---------------------------------------------------------------------------------------------
# A new world


def reset(
    config: ToyTableConfig,
    *,
    batch: int,
    seed: int,
    first_clip: int = 0,
    device: torch.device | str = "cpu",
) -> WorldState:
    """Draw `batch` new worlds at rest: clips first_clip, first_clip + 1, ... of `seed`."""
    if batch < 1:
        raise ConfigError(f"ToyTable reset: batch must be at least 1; got {batch}.")
    n = config.max_toys
    draws = _Draws(_uniforms(seed, _WORLD_STREAM, first_clip, batch, 512))

    # Toys: shapes and hues without repetition, places from a shuffled 3 by 3 grid.
    count = config.min_toys + (draws.take() * (n - config.min_toys + 1)).long()
    mask = torch.arange(n) < count.unsqueeze(-1)
    shape = draws.take(len(SHAPES)).argsort(-1)[:, :n]
    hue_index = draws.take(len(TOY_HUES)).argsort(-1)[:, :n]
    hue = torch.tensor(TOY_HUES)[hue_index] + draws.take(n, low=-0.012, high=0.012)
    colour = _hsv(hue % 1, draws.take(n, low=0.78, high=0.95), draws.take(n, low=0.82, high=1.0))
    radius = draws.take(n, low=config.min_radius, high=config.max_radius)
    angle = draws.take(n, low=-math.pi, high=math.pi)
    cell = draws.take(9).argsort(-1)[:, :n]
    centre = torch.stack((cell % 3, cell // 3), dim=-1) * 0.28 + 0.22
    toys = centre + draws.take(n, 2, low=-0.1, high=0.1)
    toys = torch.where(mask.unsqueeze(-1), toys, _PARKED)

    # The gripper starts anywhere, or two times in three close to the first toy.
    low, high = torch.tensor(_GRIPPER_LOW), torch.tensor(_GRIPPER_HIGH)
    anywhere = low + draws.take(2) * (high - low)
    bearing = draws.take(low=0.0, high=2 * math.pi)
    away = radius[:, 0] + config.gripper_radius + draws.take(low=0.02, high=0.1)
    nearby = toys[:, 0] + away.unsqueeze(-1) * torch.stack((bearing.cos(), bearing.sin()), -1)
    near = (draws.take() < 0.67).unsqueeze(-1)
    gripper = torch.minimum(torch.maximum(torch.where(near, nearby, anywhere), low), high)
    gripper = torch.round(gripper * _GRID) / _GRID

    # The tray: a base tone and a darker or lighter second one of nearly the same hue.
    kind = (draws.take() * 4).long()
    wood_hue = draws.take(low=0.06, high=0.105)
    free_hue = draws.take(low=0.05, high=0.62)
    is_wood = kind == 0
    table_hue = torch.where(is_wood, wood_hue, free_hue)
    saturation = torch.where(
        is_wood, draws.take(low=0.32, high=0.55), draws.take(low=0.04, high=0.32)
    )
    value = draws.take(low=0.42, high=0.88)
    second_value = value * draws.take(low=0.74, high=0.9)
    second_hue = table_hue + draws.take(low=-0.015, high=0.015)
    table_colour = torch.stack(
        (_hsv(table_hue, saturation, value), _hsv(second_hue, saturation * 1.1, second_value)), 1
    )
    frequency = draws.take()
    frequency = torch.where(is_wood, 5 + 5 * frequency, 3 + 5 * frequency)
    tilt = draws.take(low=-0.25, high=0.25)
    quarter = (draws.take() * 2).floor() * (math.pi / 2)
    slant = draws.take(low=0.0, high=math.pi)
    table_angle = torch.where(is_wood, quarter + tilt, slant)

    # Light from one side, a little warm or cold.
    fall = draws.take(low=0.0, high=2 * math.pi)
    warmth = draws.take(low=-1.0, high=1.0).unsqueeze(-1)
    brightness = draws.take(low=0.88, high=1.08).unsqueeze(-1)
    light_colour = brightness * (1 + warmth * torch.tensor([0.06, 0.0, -0.09]))

    base_x = draws.take(low=0.3, high=0.7)
    state = WorldState(
        gripper=gripper,
        toys=toys,
        toy_velocity=torch.zeros(batch, n, 2),
        toy_angle=angle,
        toy_spin=torch.zeros(batch, n),
        toy_mask=mask,
        toy_shape=shape,
        toy_radius=radius,
        toy_colour=colour,
        arm_base=torch.stack((base_x, torch.full_like(base_x, -0.02)), dim=-1),
        arm_side=torch.where(draws.take() < 0.5, -1.0, 1.0),
        arm_grey=draws.take(low=0.24, high=0.40),
        table_colour=table_colour,
        table_kind=kind,
        table_angle=table_angle,
        table_frequency=frequency,
        table_noise=draws.take(2, _LATTICE, _LATTICE, low=-1.0, high=1.0),
        light=torch.stack((fall.cos(), fall.sin()), dim=-1),
        light_slope=draws.take(low=0.05, high=0.28),
        light_colour=light_colour,
    )
    # Let the toys make room for each other and for the gripper.
    still = torch.zeros_like(gripper)
    for _ in range(12):
        state = step(replace(config, substeps=1), state, still)
        state = replace(
            state,
            toy_velocity=torch.zeros_like(state.toy_velocity),
            toy_spin=torch.zeros_like(state.toy_spin),
        )
    return _map_state(state, lambda tensor: tensor.to(device))


def _map_state(state: WorldState, change: Callable[[Tensor], Tensor]) -> WorldState:
    return WorldState(**{f.name: change(getattr(state, f.name)) for f in fields(WorldState)})


# ---------------------------------------------------------------------------------------------
# The scripted operator


def start_policy(state: WorldState) -> PolicyState:
    """An operator about to make a first decision."""
    batch, device = state.gripper.shape[0], state.gripper.device
    index = torch.zeros(batch, dtype=torch.long, device=device)
    return PolicyState(
        velocity=torch.zeros_like(state.gripper),
        mode=index + REST,
        frames_left=index,
        target=index,
        aim=state.gripper,
        speed=torch.zeros(batch, device=device),
    )


def policy(
    config: ToyTableConfig, state: WorldState, policy_state: PolicyState, noise: Tensor
) -> tuple[Tensor, PolicyState]:
    """The next action (B, 2), not yet clamped, and the operator's next state.

    `noise` (B, 8) is uniform in [0, 1), a row of `policy_noise`. The operator pushes a toy
    towards a place in the middle of the table, wanders smoothly (an Ornstein-Uhlenbeck
    velocity), or rests, and decides anew when the time is up or the toy has arrived.
    """
    rows = torch.arange(state.gripper.shape[0], device=state.gripper.device)
    old = policy_state

    # Decide.
    arrived = _norm(state.toys[rows, old.target] - old.aim) < 0.04
    anew = (old.frames_left <= 0) | ((old.mode == PUSH) & arrived)
    mode = torch.where(
        noise[:, 0] < config.push_share,
        PUSH,
        torch.where(noise[:, 0] < config.push_share + config.wander_share, WANDER, REST),
    )
    span = torch.where(mode == PUSH, 14 + 12 * noise[:, 1], 3 + 9 * noise[:, 1]).long()
    distance = _norm(state.toys - state.gripper.unsqueeze(1))  # (B, n)
    count = state.toy_mask.sum(-1)
    some_toy = torch.minimum(((noise[:, 2] - 0.6) / 0.4 * count).long(), count - 1)
    chosen = torch.where(noise[:, 2] < 0.6, distance.argmin(-1), some_toy)
    goal = 0.24 + 0.52 * noise[:, 3:5]
    toy = state.toys[rows, chosen]
    # Prefer to push on past the toy from where the gripper is: it takes less walking round.
    onward = toy + (toy - state.gripper) * (0.28 / distance[rows, chosen].clamp(min=1e-6))[:, None]
    goal = (0.5 * goal + 0.5 * onward).clamp(0.18, 0.82)
    mode = torch.where(anew, mode, old.mode)
    frames_left = torch.where(anew, span, old.frames_left) - 1
    target = torch.where(anew, chosen, old.target)
    aim = torch.where(anew[:, None], goal, old.aim)
    fresh_speed = config.max_speed * (0.55 + 0.4 * noise[:, 5])
    speed = torch.where(anew, fresh_speed, old.speed)

    # Push: get behind the toy, walking round it if it is in the way, then go towards the aim.
    toy = state.toys[rows, target]
    contact = (state.toy_radius[rows, target] + config.gripper_radius).unsqueeze(-1)
    ahead = functional.normalize(aim - toy, dim=-1)
    aside = torch.stack((-ahead[:, 1], ahead[:, 0]), dim=-1)
    offset = state.gripper - toy
    behind = -(offset * ahead).sum(-1, keepdim=True)
    off_line = (offset * aside).sum(-1, keepdim=True)
    aligned = (behind > 0.5 * contact) & (off_line.abs() < 0.45 * contact)
    along = functional.normalize(ahead - aside * (off_line / contact) * 0.8, dim=-1)
    to_start = toy - ahead * (contact + 0.015) - state.gripper
    outward = functional.normalize(offset, dim=-1)
    round_way = torch.stack((-outward[:, 1], outward[:, 0]), dim=-1)
    inward = (to_start * outward).sum(-1, keepdim=True)
    blocked = (_norm(offset, keep=True) < contact + 0.06) & (inward < 0)
    turn = torch.where((to_start * round_way).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    slack = _norm(offset, keep=True) - contact - 0.025
    detour = functional.normalize(round_way * turn - outward * slack * 8, dim=-1)
    walk = torch.where(blocked, detour, functional.normalize(to_start, dim=-1))
    pushing = torch.where(aligned, along * speed[:, None], walk * config.max_speed)

    # Wander: an Ornstein-Uhlenbeck step (Box-Muller normals), steered off the edges.
    amount = torch.sqrt(-2 * torch.log(1 - noise[:, 6]))
    direction = 2 * math.pi * noise[:, 7]
    normal = torch.stack((amount * torch.cos(direction), amount * torch.sin(direction)), dim=-1)
    inwards = ((0.5 - state.gripper).abs() - 0.28).clamp(min=0) * (0.5 - state.gripper).sign()
    wandering = 0.88 * old.velocity + 0.24 * config.max_speed * normal + 0.12 * inwards

    follow = 0.35 * old.velocity + 0.65 * pushing
    kind = mode.unsqueeze(-1)
    velocity = torch.where(kind == PUSH, follow, torch.where(kind == WANDER, wandering, 0.0))
    state_next = PolicyState(
        velocity=velocity, mode=mode, frames_left=frames_left, target=target, aim=aim, speed=speed
    )
    return velocity, state_next


# ---------------------------------------------------------------------------------------------
# Drawing


def _smoothstep(t: Tensor) -> Tensor:
    t = t.clamp(0, 1)
    return t * t * (3 - 2 * t)


def _cover(distance: Tensor, width: float) -> Tensor:
    """How much of a pixel a shape covers: 1 inside, 0 outside, smooth over `width`."""
    return _smoothstep(0.5 - distance / width)


def _pixels(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of pixel centres, each (H * W,)."""
    line = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x.reshape(-1), y.reshape(-1)


def _background(config: ToyTableConfig, state: WorldState) -> Tensor:
    """The empty tray before lighting, (B, C, H * W)."""
    x, y = _pixels(config.size, state.gripper.device)
    pixel = 1 / config.size
    grid = torch.stack((x, y), dim=-1).reshape(1, config.size, config.size, 2) * 2 - 1
    batch = state.gripper.shape[0]
    noise = functional.grid_sample(
        state.table_noise,
        grid.expand(batch, -1, -1, -1) * (1 - 1 / _LATTICE),
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    ).flatten(2)  # (B, 2, H * W)
    coarse, other = noise[:, 0], noise[:, 1]
    cos, sin = torch.cos(state.table_angle)[:, None], torch.sin(state.table_angle)[:, None]
    across = x * cos + y * sin
    along = y * cos - x * sin
    frequency = state.table_frequency[:, None]
    wave = 2 * math.pi * frequency
    # Wood: wavy grain on planks; stripes: soft bands; cloth: blotches and a coarse weave.
    grain = 0.5 + 0.5 * torch.sin(wave * across + 2.2 * coarse + 1.5 * torch.sin(4 * along))
    plank = across * 3 + 0.4
    seam = 1 - _cover((plank - torch.floor(plank) - 0.5).abs() / 3 - (0.5 / 3 - pixel), 2 * pixel)
    tone = (torch.floor(plank) * 2.4).sin()
    wood = 0.55 * grain + 0.22 * tone + 0.9 * seam
    stripes = _smoothstep(0.5 + 1.6 * torch.sin(wave * across))
    weave = 0.12 * torch.sin(2 * math.pi * 9 * across) * torch.sin(2 * math.pi * 9 * along)
    cloth = 0.5 + 0.5 * coarse + weave
    plain = 0.25 + 0.25 * other
    kinds = torch.stack((wood, stripes * 0.8, cloth, plain), dim=1)
    rows = torch.arange(batch, device=x.device)
    mix = (kinds[rows, state.table_kind] + 0.08 * other).clamp(0, 1.3).unsqueeze(1)
    first, second = state.table_colour[:, 0, :, None], state.table_colour[:, 1, :, None]
    image = first + (second - first) * mix

    # The wall of the tray, and the shadow it casts on the floor.
    edge = torch.minimum(torch.minimum(x, 1 - x), torch.minimum(y, 1 - y))
    light_x, light_y = state.light[:, :1], state.light[:, 1:]
    cast = torch.minimum(
        torch.where(light_x > 0, x, 1 - x) - config.rim - 0.03 * light_x.abs(),
        torch.where(light_y > 0, y, 1 - y) - config.rim - 0.03 * light_y.abs(),
    )
    image = image * (1 - 0.28 * _cover(cast, 0.03)).unsqueeze(1)
    image = image * (1 - 0.12 * _cover(edge - config.rim, 0.06))
    wall = _cover(edge - config.rim, pixel)
    wood_edge = second * 0.62
    image = image + (wood_edge - image) * wall
    return image


def _light(config: ToyTableConfig, state: WorldState) -> Tensor:
    """Colour and brightness of the light over the table, (B, C, H * W)."""
    x, y = _pixels(config.size, state.gripper.device)
    slope = (x - 0.5) * -state.light[:, :1] + (y - 0.5) * -state.light[:, 1:]
    slope = 1 + state.light_slope[:, None] * slope
    return state.light_colour.unsqueeze(-1) * slope.unsqueeze(1)


def _capsule(x: Tensor, y: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the segment and signed distance to its line, each (F, H * W)."""
    way = end - start
    length = _norm(way, keep=True).clamp(min=1e-6)
    ux, uy = way[:, :1] / length, way[:, 1:] / length
    px, py = x - start[:, :1], y - start[:, 1:]
    along, across = px * ux + py * uy, py * ux - px * uy
    beyond = along - torch.minimum(along.clamp(min=0), length)
    return torch.sqrt(beyond * beyond + across * across), across


def _draw_toys(config: ToyTableConfig, state: WorldState, image: Tensor) -> Tensor:
    """Draw shadows, then toys, each in a patch around its centre; `image` is (F, C, H * W)."""
    size, n = config.size, state.toys.shape[1]
    pixel = 1 / size
    side = min(size, math.ceil(2 * (config.max_radius + _TOY_SHADOW + 0.02) * size) + 2)
    corner = torch.round(state.toys * size - side / 2).clamp(0, size - side).long()
    line = torch.arange(side, device=image.device)
    rows = (corner[..., 1, None] + line).unsqueeze(-1)  # (F, n, side, 1)
    columns = (corner[..., 0, None] + line).unsqueeze(-2)  # (F, n, 1, side)
    where = (rows * size + columns).flatten(2)  # (F, n, P)
    x = ((columns + 0.5) / size - state.toys[..., 0, None, None]).expand(-1, -1, side, -1)
    y = ((rows + 0.5) / size - state.toys[..., 1, None, None]).expand(-1, -1, -1, side)
    x, y = x.flatten(2), y.flatten(2)
    angle, radius = state.toy_angle.unsqueeze(-1), state.toy_radius.unsqueeze(-1)
    form = _form(state.toy_shape).unsqueeze(-2)
    light = state.light.unsqueeze(1)  # (F, 1, 2)
    solid = _toy_distance(x, y, angle, radius, form)  # (F, n, P)
    moved = _toy_distance(
        x - _TOY_SHADOW * light[..., :1], y - _TOY_SHADOW * light[..., 1:], angle, radius, form
    )
    # The edge towards the light is bright, the one away from it dark: the change of distance
    # along the light is the slope of a bevel.
    bevel = ((moved - solid) / _TOY_SHADOW).clamp(-1, 1) * _smoothstep(1 + solid / 0.045)
    # A ring's solid is a disc: its distance tells how far a pixel is from the centre.
    hole, rounding = form[..., 5] * radius, form[..., 4] * radius
    inner = torch.where(hole > 0, hole - (solid + rounding), -1.0)
    inner_moved = torch.where(hole > 0, hole - (moved + rounding), -1.0)
    distance = torch.maximum(solid, inner)
    shadow = 1 - 0.5 * _cover(torch.maximum(moved, inner_moved), 0.045)
    cover = _cover(distance, 1.5 * pixel) * state.toy_mask.unsqueeze(-1)
    shadow = torch.where(state.toy_mask.unsqueeze(-1), shadow, 1.0)
    shade = 1 + 0.26 * bevel - 0.30 * _smoothstep(1 + distance / (1.5 * pixel))
    image = image.clone()
    for k in range(n):
        index = where[:, k].unsqueeze(1).expand(-1, 3, -1)
        image.scatter_(2, index, image.gather(2, index) * shadow[:, k].unsqueeze(1))
    for k in range(n):
        index = where[:, k].unsqueeze(1).expand(-1, 3, -1)
        under = image.gather(2, index)
        colour = state.toy_colour[:, k].unsqueeze(-1) * shade[:, k].unsqueeze(1)
        image.scatter_(2, index, under + (colour - under) * cover[:, k].unsqueeze(1))
    return image


def _draw_arm(config: ToyTableConfig, state: WorldState, image: Tensor) -> Tensor:
    """Draw the arm's shadow, its two links and the gripper; `image` is (F, C, H * W)."""
    x, y = _pixels(config.size, image.device)
    pixel = 1 / config.size
    base, hand, elbow = state.arm_base, state.gripper, _elbow(state)
    fall = state.light * _ARM_SHADOW

    # Shadows: the gripper is near the table and casts a close one.
    upper, _ = _capsule(x, y, base + fall, elbow + fall)
    fore, _ = _capsule(x, y, elbow + fall, hand + 0.5 * fall)
    shaded = torch.minimum(upper - _LINK_RADII[0], fore - _LINK_RADII[1])
    image = image * (1 - 0.42 * _cover(shaded, 0.05)).unsqueeze(1)

    def paint(under: Tensor, distance: Tensor, tone: Tensor) -> Tensor:
        return under + (tone - under) * _cover(distance, 1.5 * pixel).unsqueeze(1)

    grey = state.arm_grey.unsqueeze(-1)
    tint = image.new_tensor([0.96, 1.0, 1.05]).unsqueeze(-1)
    for start, end, radius in ((base, elbow, _LINK_RADII[0]), (elbow, hand, _LINK_RADII[1])):
        distance, across = _capsule(x, y, start, end)
        round_shade = 1.25 - 0.75 * (across / radius + 0.25) ** 2
        tone = (grey * round_shade.clamp(0.35, 1.25)).unsqueeze(1) * tint
        image = paint(image, distance - radius, tone)
    for joint, radius in ((base, 0.10), (elbow, 0.066)):
        distance = torch.sqrt((x - joint[:, :1]) ** 2 + (y - joint[:, 1:]) ** 2)
        image = paint(image, distance - radius, (grey * 0.8).unsqueeze(1) * tint)
        image = paint(image, distance - 0.55 * radius, (grey * 1.9).unsqueeze(1) * tint)

    # The gripper: a bar across the forearm with a round hub, all of one hue, and symmetric about
    # the point that `gripper_from_pixels` looks for.
    ahead = functional.normalize(hand - elbow, dim=-1)
    radius = config.gripper_radius
    aside = torch.stack((-ahead[:, 1], ahead[:, 0]), dim=-1) * (0.75 * radius)
    bar, _ = _capsule(x, y, hand - aside, hand + aside)
    distance = torch.sqrt((x - hand[:, :1]) ** 2 + (y - hand[:, 1:]) ** 2)
    colour = image.new_tensor(_GRIPPER_COLOUR).unsqueeze(-1)
    body = torch.minimum(bar - 0.5 * radius, distance - 0.95 * radius)
    image = paint(image, body, colour * 0.78)
    return paint(image, distance - 0.62 * radius, colour)


def _draw(config: ToyTableConfig, state: WorldState, background: Tensor, light: Tensor) -> Tensor:
    """Frames of F states over their backgrounds and lights (F, C, H * W); uint8 (F, H, W, C)."""
    image = _draw_toys(config, state, background)
    image = _draw_arm(config, state, image) * light
    image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return image.transpose(1, 2).reshape(-1, config.size, config.size, 3).contiguous()


def render(config: ToyTableConfig, state: WorldState) -> Tensor:
    """Draw a batch of worlds: uint8 (B, H, W, 3), RGB, anti-aliased."""
    return _draw(config, state, _background(config, state), _light(config, state))


# ---------------------------------------------------------------------------------------------
# Clips, and what can be read back from pixels


def generate(
    config: ToyTableConfig,
    *,
    batch: int,
    frames: int,
    seed: int,
    first_clip: int = 0,
    device: torch.device | str = "cpu",
) -> ToyClips:
    """Clips first_clip ... first_clip + batch - 1 of `seed`, each `frames` long, on `device`.

    Raises:
        ConfigError: `batch` or `frames` is less than 1.
    """
    if frames < 1:
        raise ConfigError(f"ToyTable generate: frames must be at least 1; got {frames}.")
    state = reset(config, batch=batch, seed=seed, first_clip=first_clip, device=device)
    noise = policy_noise(batch=batch, steps=frames - 1, seed=seed, first_clip=first_clip)
    noise, operator = noise.to(device), start_policy(state)
    background, light = _background(config, state), _light(config, state)
    pictures = [_draw(config, state, background, light)]
    states, actions = [state], []
    for t in range(frames - 1):
        action, operator = policy(config, state, operator, noise[t])
        actions.append(clamp_action(config, state, action))
        state = step(config, state, action)
        states.append(state)
        pictures.append(_draw(config, state, background, light))
    return ToyClips(
        frames=torch.stack(pictures, dim=1),
        actions=torch.stack(actions, 1) if actions else state.gripper.new_zeros(batch, 0, 2),
        gripper=torch.stack([s.gripper for s in states], dim=1),
        toys=torch.stack([s.toys for s in states], dim=1),
        toy_angle=torch.stack([s.toy_angle for s in states], dim=1),
        toy_mask=state.toy_mask,
    )


def gripper_from_pixels(frames: Tensor) -> Tensor:
    """Where the gripper is, read from its hue alone: (..., H, W, 3) -> (..., 2), table widths.

    `frames` is uint8, or floating point in [0, 1]. The centroid of magenta within a small
    window around where there is most of it; NaN where a frame shows no magenta, as a bad
    prediction may not.

    Raises:
        InputError: the last axis is not three colours.
    """
    if frames.ndim < 3 or frames.shape[-1] != 3:
        raise InputError(
            f"gripper_from_pixels: frames must be (..., H, W, 3); got {tuple(frames.shape)}."
        )
    height, width = frames.shape[-3:-1]
    image = frames.reshape(-1, height, width, 3).float()
    if frames.dtype == torch.uint8:
        image = image / 255
    red, green, blue = image.unbind(-1)
    # Squared, so that the thin blend between a red and a blue toy counts for little.
    magenta = (torch.minimum(red, blue) - green - 0.15).clamp(min=0) ** 2
    reach = 0.06 * width
    window = 2 * math.ceil(reach) + 1
    density = functional.avg_pool2d(
        magenta.unsqueeze(1), window, stride=1, padding=window // 2, count_include_pad=True
    ).flatten(1)
    peak = density.argmax(-1)
    rows = torch.arange(height, device=image.device)
    columns = torch.arange(width, device=image.device)
    near_row = (rows - (peak // width).unsqueeze(-1)).abs() <= 1.3 * reach
    near_column = (columns - (peak % width).unsqueeze(-1)).abs() <= 1.3 * reach
    weight = magenta * near_row.unsqueeze(2) * near_column.unsqueeze(1)
    total = weight.sum((1, 2))
    x = (weight.sum(1) * (columns + 0.5)).sum(-1) / total / width
    y = (weight.sum(2) * (rows + 0.5)).sum(-1) / total / height
    found = torch.stack((x, y), dim=-1)
    found = torch.where((total > 0.02).unsqueeze(-1), found, torch.nan)
    return found.reshape(*frames.shape[:-3], 2)
