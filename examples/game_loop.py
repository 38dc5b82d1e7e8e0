"""Play in the learned world: arrow keys drive the arm, R starts over, Escape quits.

    pip install pygame
    python -m examples.game_loop
    python -m examples.game_loop --headless --frames 60 --out game.mp4

There is no simulator: every frame shown is predicted, two at a time, within a budget that keeps
the window at 20 frames a second. Headless, a script holds the keys and what was shown is written.
"""

from __future__ import annotations

import argparse
import collections
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

import canvasmar_rt
from canvasmar_rt.bundle import DEMO_CLIP
from canvasmar_rt.errors import CanvasMarError, InputError
from canvasmar_rt.files import check_writable
from canvasmar_rt.video import write_clip, write_png

Frames = npt.NDArray[np.uint8]

SCALE = 8  # screen pixels a pixel
SPEED = 0.035  # table widths a frame
RATE = 20  # frames a second
CONTEXT = 5  # frames of the packaged clip to start from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="toytable-int8", help="bundle with actions of 4 numbers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=35, help="ms for a prediction")
    parser.add_argument("--frames", type=int, help="stop after so many")
    parser.add_argument("--headless", action="store_true", help="no window; scripted keys")
    parser.add_argument("--out", type=Path, help="write what was shown: .mp4, .gif, or last .png")
    options = parser.parse_args()
    if not options.budget > 0:
        parser.error("--budget must be above 0")
    if options.frames is not None and options.frames < 1:
        parser.error("--frames must be above 0")
    if options.out:
        if options.out.suffix.lower() not in (".mp4", ".gif", ".png"):
            parser.error(f"--out {options.out}: name an .mp4, a .gif or a .png")
        try:
            check_writable(options.out)
        except InputError as error:
            parser.error(f"--out {error}")
    if options.headless:
        os.environ["SDL_VIDEODRIVER"] = "dummy"
        options.frames = options.frames or 60
    os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"
    try:
        import pygame
    except ImportError:
        parser.error("needs pygame: pip install pygame")

    with np.load(DEMO_CLIP) as clip:
        context, told = clip["frames"][:CONTEXT], clip["actions"][: CONTEXT - 1]
    try:
        predictor = canvasmar_rt.load(options.model, threads=options.threads)
    except CanvasMarError as error:
        parser.error(str(error))
    if predictor.config.action_dim != 4:
        parser.error(f"--model: takes {predictor.config.action_dim} numbers of action, not 4")
    rollout = predictor.start(context, actions=told.reshape(-1, 4))
    rollout.warmup(deadlines=True)
    start = rollout.state()

    pygame.display.init()
    height, width = context.shape[1:3]
    screen = pygame.display.set_mode((SCALE * width, SCALE * height))
    ticker = pygame.time.Clock()
    keys = {
        pygame.K_LEFT: (-1, 0),
        pygame.K_RIGHT: (1, 0),
        pygame.K_UP: (0, -1),
        pygame.K_DOWN: (0, 1),
    }
    script = [pygame.K_LEFT, pygame.K_UP, pygame.K_RIGHT, pygame.K_DOWN]
    film: list[Frames] = []
    shown, running = 0, True
    steps = collections.Counter[int]()
    while running:
        for event in pygame.event.get():
            pressed = event.key if event.type == pygame.KEYDOWN else None
            if event.type == pygame.QUIT or pressed == pygame.K_ESCAPE:
                running = False
            elif pressed == pygame.K_r:
                rollout.restore(start)
        pressed_now = pygame.key.get_pressed()
        held = [script[shown // 8 % 4]] if options.headless else [k for k in keys if pressed_now[k]]
        push = SPEED * np.array([keys[key] for key in held], np.float32).reshape(-1, 2).sum(axis=0)
        prediction = rollout.step(np.tile(push, 2), budget_ms=options.budget)
        steps[prediction.ar_steps] += 1
        for frame in prediction.frames[0]:
            picture = pygame.surfarray.make_surface(frame.swapaxes(0, 1))
            pygame.transform.scale(picture, screen.get_size(), screen)
            pygame.display.flip()
            pygame.display.set_caption(
                f"{ticker.get_fps():.0f} frames/s, {1e3 * prediction.timings['total']:.0f} ms, "
                f"{prediction.ar_steps} AR steps"
            )
            if options.out:
                small = pygame.transform.scale(screen, (4 * width, 4 * height))
                film.append(pygame.surfarray.array3d(small).swapaxes(0, 1).copy())
            shown += 1
            ticker.tick(RATE)
        running = running and (options.frames is None or shown < options.frames)
    pygame.quit()
    print(f"{shown} frames shown; predictions by AR steps, 0 the canvas alone: {dict(steps)}")
    if options.out and options.out.suffix.lower() == ".png":
        write_png(options.out, film[-1])
    elif options.out:
        write_clip(options.out, np.stack(film), RATE)


if __name__ == "__main__":
    main()
