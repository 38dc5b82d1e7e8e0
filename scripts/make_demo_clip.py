"""Write the packaged demo clip, canvasmar_rt/data/demo_toytable.npz.

Run from the checkout's root: `python -m scripts.make_demo_clip`. The archive holds `frames`
uint8 (33, 64, 64, 3), `actions` float32 (32, 2) in table widths, and `fps`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from training.toytable import ToyTableConfig, generate

# Chosen by eye among the first 200 clips: the arm pushes a red pill across a wooden tray, turns
# it on the way, and runs it into a blue disc.
SEED, CLIP, FRAMES, FPS = 2026, 182, 33, 10
TARGET = Path(__file__).parents[1] / "canvasmar_rt" / "data" / "demo_toytable.npz"


def main() -> None:
    """Draw the clip, check that a toy is pushed in it, and write it."""
    torch.set_num_threads(1)
    clips = generate(ToyTableConfig(), batch=1, frames=FRAMES, seed=SEED, first_clip=CLIP)
    moved = float((clips.toys[0, -1] - clips.toys[0, 0]).norm(dim=-1).max())
    if moved < 0.25:
        raise SystemExit(
            f"make_demo_clip: clip {CLIP} of seed {SEED} should show a toy pushed by at least "
            f"0.25 table widths, but the furthest moved {moved:.2f}; ToyTable has changed, so "
            "choose another clip by eye."
        )
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        TARGET,
        frames=clips.frames[0].numpy(),
        actions=clips.actions[0].numpy(),
        fps=np.array(FPS),
    )
    print(f"{TARGET.name}: {TARGET.stat().st_size / 1000:.0f} kB, a toy moved {moved:.2f} widths")


if __name__ == "__main__":
    main()
