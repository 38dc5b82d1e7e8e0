"""A folder of clips as a Ray Data job: each worker loads the model once and takes clip by clip.

A clip's video, sheet and record are written by the worker that predicted it, so the output folder
has to be one that all machines share. The record, `<name>.json`, comes last: a clip is done when
its record is there and was made from the same clip, model and options.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.data

from canvasmar_rt.actions import find_actions
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.cluster.worker import Worker
from canvasmar_rt.config import to_dict
from canvasmar_rt.errors import CanvasMarError, ConfigError, EngineError, InputError
from canvasmar_rt.files import write_file
from canvasmar_rt.predict import PredictOptions, predict_clip, video_names
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.video import find_clips

LIVES = 3
"""Workers a clip may cost: one that three workers died of is given up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the clips.

    done: videos written now.
    kept: videos that an earlier run had completed.
    failed: why there is no video, by clip.
    """

    done: tuple[Path, ...]
    kept: tuple[Path, ...]
    failed: dict[Path, str]


def predict_folder(
    source: Path,
    output: Path,
    options: PredictOptions,
    worker: Worker,
    *,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    connect: Callable[[], object] = lambda: None,
) -> Report:
    """Predict how every clip in `source` goes on, into the folder `output`, as
    `canvasmar-rt predict` does: same seed, same videos.

    What a lost worker was at is done again by another. A clip that cannot be read, or that `LIVES`
    workers died of, is reported and the others go on.

    Args:
        workers: processes at once; each loads the model and takes `worker.cpus` and `worker.gpus`.
        progress: called with the clips finished and in all.
        connect: called before the first use of Ray, once there is something to do.

    Raises:
        VideoError: if there are no clips in `source`.
        InputError: if the output holds a clip, or another's file where a record belongs.
        BundleError, ConfigError: if there is no such model or profile.
        EngineError: if a worker cannot load the model, or finds another bundle of its name.
    """
    if workers < 1:
        raise ConfigError(f"workers: at least 1 is needed, got {workers}")
    bundle = Bundle.open(worker.model)
    if options.sampling is None:
        sampling = bundle.manifest.profile(worker.profile)
        options = dataclasses.replace(options, sampling=sampling)
    targets = video_names([clip.absolute() for clip in find_clips(source)], output)
    for target in targets.values():
        path = _record_path(target)
        if path.exists() and not _read_record(path).keys() & {"begun", "bundle"}:
            raise InputError(
                f"{path}: no record of an earlier run, and would be replaced by one; give another "
                "output"
            )
    records = {clip: _record(clip, bundle.fingerprint, options) for clip in targets}
    kept = {clip: target for clip, target in targets.items() if _is_done(target, records[clip])}
    rows = [
        {"clip": str(clip), "target": str(target.absolute()), "record": json.dumps(records[clip])}
        for clip, target in targets.items()
        if clip not in kept
    ]
    for row in rows:
        _record_path(Path(row["target"])).unlink(missing_ok=True)
    progress(len(kept), len(targets))
    errors: dict[Path, str] = {}
    if rows:
        connect()
    for result in _results(rows, options, worker, bundle.fingerprint, workers):
        if result["refusal"]:
            raise EngineError(f"a worker cannot predict: {result['refusal']}")
        errors[Path(result["clip"])] = result["error"]
        progress(len(kept) + len(errors), len(targets))
    return Report(
        done=tuple(target for clip, target in targets.items() if errors.get(clip) == ""),
        kept=tuple(kept.values()),
        failed={clip: errors[clip] for clip in targets if errors.get(clip)},
    )


def _results(
    rows: list[dict[str, str]],
    options: PredictOptions,
    worker: Worker,
    fingerprint: str,
    workers: int,
) -> Any:
    """The results of `_Predict`, as they come. Ray Data starts lost workers again and gives them
    what they were at, without end."""
    if not rows:
        return
    clips: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset = clips.map(
        _Predict,
        fn_constructor_kwargs={
            "worker": worker,
            "fingerprint": fingerprint,
            "options": options,
        },
        # one clip a task, and no task waits behind another: a lost worker costs one clip's time
        compute=ray.data.ActorPoolStrategy(
            size=min(workers, len(rows)), max_tasks_in_flight_per_actor=1
        ),
        **worker.resources,
    )
    dataset.context.enable_progress_bars = False
    yield from dataset.iter_rows()


class _Predict:
    """A worker: the model, loaded once."""

    def __init__(self, *, worker: Worker, fingerprint: str, options: PredictOptions) -> None:
        self._options = options
        self._predictor: Predictor | None = None
        self._refusal = "the bundle here is another than that of the job"
        try:
            predictor = worker.load()
        except CanvasMarError as error:
            self._refusal = str(error)
        else:
            if predictor.bundle.fingerprint == fingerprint:
                self._predictor = predictor

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Predict one clip and record it. `error` is why that failed, `refusal` why this worker can
        predict none; both are empty where it went well."""
        if self._predictor is None:
            return {"clip": row["clip"], "error": "", "refusal": self._refusal}
        result = {"clip": row["clip"], "error": "", "refusal": ""}
        clip, target = Path(row["clip"]), Path(row["target"])
        path = _record_path(target)
        try:
            begun = _read_record(path).get("begun", 0)
            if begun >= LIVES:
                raise EngineError(f"{clip}: {LIVES} workers died of it; see Ray's logs")
            write_file(path, json.dumps({"begun": begun + 1}))
            summary = predict_clip(self._predictor, clip, target, self._options)
            record = json.loads(row["record"])
            write_file(path, json.dumps(record | {"summary": summary}, indent=1) + "\n")
        except CanvasMarError as error:
            result["error"] = str(error)
        return result


def _record_path(target: Path) -> Path:
    return target.with_suffix(".json")


def _record(clip: Path, bundle: str, options: PredictOptions) -> dict[str, Any]:
    """What a video was made from, JSON-ready."""
    held = find_actions(clip) if options.actions else None
    made_from = {"bundle": bundle, "options": to_dict(options), "clip": _of_file(clip)}
    return made_from if held is None else made_from | {"actions": _of_file(held)}


def _of_file(path: Path) -> dict[str, int]:
    file = path.stat()
    return {"bytes": file.st_size, "modified_ns": file.st_mtime_ns}


def _is_done(target: Path, record: dict[str, Any]) -> bool:
    """Whether the video is there and was made from just this."""
    return target.is_file() and _read_record(_record_path(target)).items() >= record.items()


def _read_record(path: Path) -> dict[str, Any]:
    """A record, empty where there is none."""
    try:
        written = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}
