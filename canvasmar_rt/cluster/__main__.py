"""`python -m canvasmar_rt.cluster`: `predict` and `serve` of the `canvasmar-rt` command, on Ray."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from canvasmar_rt.bundle import DEMO_CLIP, Bundle
from canvasmar_rt.cli import DEFAULT_MODEL, GPU_MODEL, Engine, Frames, Origin, Profile, Quiet, Seed
from canvasmar_rt.cluster.worker import Worker
from canvasmar_rt.command import print_error, run_command, stderr, stderr_bar
from canvasmar_rt.errors import EngineError, InputError
from canvasmar_rt.predict import PredictOptions
from canvasmar_rt.service.settings import Settings
from canvasmar_rt.service.starts import cut_starts

try:
    import ray
    from ray import serve as ray_serve

    from canvasmar_rt.cluster.predict import predict_folder
    from canvasmar_rt.cluster.proxy import ENVIRONMENT
    from canvasmar_rt.cluster.service import Replicas, application
except ImportError as missing:
    why = f'canvasmar_rt.cluster needs Ray ({missing}): pip install "canvasmar-rt[cluster]"'
    print_error(EngineError(why))
    sys.exit(2)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Predict and serve on the machines of a Ray cluster.",
)

Model = Annotated[
    str | None,
    typer.Option(
        help=f"Bundle directory, the same on every machine, or the name of a packaged one; by "
        f"default {DEFAULT_MODEL}, with GPUs {GPU_MODEL}.",
        show_default=False,
    ),
]
Cpus = Annotated[float, typer.Option(help="CPUs reserved for each worker.")]
Gpus = Annotated[float, typer.Option(help="GPUs reserved for each worker; it runs there.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to work on; by default RAY_ADDRESS, or one of this machine alone.",
        show_default=False,
    ),
]


def _worker(
    model: str | None, engine: str, profile: str | None, cpus: float, gpus: float
) -> Worker:
    return Worker(
        model=model or (GPU_MODEL if gpus else DEFAULT_MODEL),
        engine=engine, profile=profile, cpus=cpus, gpus=gpus,
    )  # fmt: skip


def _connect(address: str | None, cpus: float, gpus: float) -> None:
    os.environ.update(ENVIRONMENT)  # for a cluster that starts here and now
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    told = address or os.environ.get("RAY_ADDRESS") or ""
    try:
        _reach(told)
        ray.init(address, logging_level=logging.WARNING, include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"{told or 'this machine'}: no Ray cluster is to be "
            f"had there ({str(error).splitlines()[0]}); give the --address that 'ray start' told, "
            "or none for this machine alone"
        ) from None
    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for option, kind, wanted in (("--gpus", "GPU", gpus), ("--cpus", "CPU", cpus)):
        if wanted > have.get(kind, 0) and not told:  # clusters may grow
            raise EngineError(
                f"{option} {wanted:g}: Ray finds {have.get(kind, 0):g} {kind}s on this machine; "
                f"give the --address of a cluster that has as many, or leave {option} out"
            )


def _reach(address: str) -> None:
    """See that somebody listens at a HOST:PORT, for whom Ray would wait for minutes.

    Raises:
        OSError: if nobody does.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), 5).close()


@app.command()
def predict(
    source: Annotated[Path, typer.Argument(help="A folder of videos or .npz archives.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder that every machine can write to.")
    ],
    workers: Annotated[int, typer.Option(help="Processes at once.")] = 1,
    model: Model = None,
    profile: Profile = None,
    engine: Engine = "onnxruntime",
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    frames: Frames = 16,
    context: Annotated[int, typer.Option(help="Pixel frames of the clip to start from.")] = 5,
    seed: Seed = 0,
    actions: Annotated[bool, typer.Option(help="Use the actions kept with the clips.")] = False,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Continue every clip of a folder. What an earlier run completed is kept."""
    worker = _worker(model, engine, profile, cpus, gpus)
    options = PredictOptions(frames=frames, context=context, seed=seed, actions=actions)
    with stderr_bar(quiet) as bar:
        task = bar.add_task("clips", total=None)
        report = predict_folder(
            source, output, options, worker, workers=workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            connect=lambda: _connect(address, cpus, gpus),
        )  # fmt: skip
    for why in report.failed.values():
        print_error(InputError(why))
    if not quiet:
        stderr.print(
            f"{len(report.done)} predicted, {len(report.kept)} there already, "
            f"{len(report.failed)} failed; in {escape(str(output))}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if report.failed:
        raise typer.Exit(1)


@app.command()
def serve(
    replicas: Annotated[int, typer.Option(help="Replicas there are at least.")] = 1,
    most: Annotated[
        int | None, typer.Option(help="Replicas there are at most; by default no more.")
    ] = None,
    sessions: Annotated[
        float | None,
        typer.Option(help="Sessions a replica should have; by default as many as play at once."),
    ] = None,
    model: Model = None,
    profile: Profile = None,
    engine: Engine = "onnxruntime",
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    slots: Annotated[int, typer.Option(help="Sessions that play at once in a replica.")] = (
        Settings.slots
    ),
    max_sessions: Annotated[
        int, typer.Option(help="Sessions of a replica; those beyond the slots wait.")
    ] = Settings.max_sessions,
    fps: Annotated[
        float | None, typer.Option(help="Pixel frames a second; the model's by default.")
    ] = None,
    clip: Annotated[
        Path, typer.Option(help="What start pictures are cut from; the same on every machine.")
    ] = DEMO_CLIP,
    origin: Origin = None,
    host: Annotated[str, typer.Option(help="Address that every machine listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that every machine listens on.")] = 8000,
    address: Address = None,
) -> None:
    """Serve the learned world from replicas; runs until it is interrupted."""
    worker = _worker(model, engine, profile, cpus, gpus)
    service = application(
        worker,
        Settings(
            slots=slots,
            max_sessions=max_sessions,
            fps=fps,
            clip=clip.absolute(),
            origins=tuple(origin or ()),
        ),
        Replicas(least=replicas, most=most or replicas, sessions=sessions),
    )
    manifest = Bundle.open(worker.model).manifest  # what every replica will need
    manifest.profile(worker.profile)
    cut_starts(manifest.model, clip)
    _connect(address, cpus, gpus)
    try:
        ray_serve.start(http_options={"host": host, "port": port}, proxy_location="EveryNode")
        ray_serve.run(service, name="canvasmar", blocking=True)
    except RuntimeError as error:
        raise EngineError(
            f"the service did not start ({str(error).splitlines()[0]}); Ray's log above says why"
        ) from None


if __name__ == "__main__":
    run_command(app)
