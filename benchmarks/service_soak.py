"""A soak of the service: many clients for minutes, some that stall and some that send garbage.

The server runs in a process of its own. Whoever reads should get every tick, whatever the others
do: printed and written is what share of the ticks each one got, and the server's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from canvasmar_rt.benchmarks.latency import machine, resident_bytes
from canvasmar_rt.command import run_command
from canvasmar_rt.errors import ConfigError, EngineError
from canvasmar_rt.files import check_writable, write_file
from canvasmar_rt.rollout import load
from canvasmar_rt.service.protocol import unpack
from canvasmar_rt.service.server import run
from canvasmar_rt.service.settings import Settings

SETTLE_S = 10.0
"""Memory is compared with that at this time after the last client came."""
SAMPLE_S = 2.0
RETRY_S = 1.0
STALL_AGAIN_S = 30.0
"""A stalled client comes back after this."""
START_S = 600.0
STOP_S = 10.0

GARBAGE: tuple[str | bytes, ...] = (
    "{", "[]", '{"type": "action"}', '{"type": "action", "action": [1e9]}', b"\0" * 64, "x" * 5000,
    "x" * 100_000,
)  # fmt: skip


@dataclasses.dataclass
class Reader:
    """A client that reads, and steers now and then.

    got: pictures received; missed: ticks it was not shown; late: of those got, after the deadline;
    ar_steps: how many it got by AR steps; ended: why it was cut off before the soak's end.
    """

    got: int = 0
    missed: int = 0
    late: int = 0
    ar_steps: Counter[int] = dataclasses.field(default_factory=Counter)
    first_s: float = 0.0
    ended: str = ""

    async def play(self, url: str, seed: int) -> None:
        chance = random.Random(seed)
        async with connect(url, compression=None, proxy=None) as socket:
            hello = json.loads(await socket.recv())
            expected = 0
            try:
                while True:
                    message = await socket.recv()
                    assert isinstance(message, bytes)
                    header, _ = unpack(message)
                    if not self.got:
                        self.first_s = time.perf_counter()
                    self.got += 1
                    self.missed += header.frame - expected
                    expected = header.frame + 1
                    self.late += not header.deadline_met
                    self.ar_steps[header.ar_steps] += 1
                    if chance.random() < 0.3:
                        await self._steer(socket, hello, chance)
            except ConnectionClosed as closed:
                self.ended = str(closed)

    async def _steer(
        self, socket: ClientConnection, hello: dict[str, Any], chance: random.Random
    ) -> None:
        limit, count = hello["action_limit"], hello["action_dim"]
        action = [chance.uniform(-limit, limit) for _ in range(count)]
        await socket.send(json.dumps({"type": "action", "action": action}))

    def report(self, tick_s: float, until: float) -> dict[str, Any]:
        """What it got up to `until`, on the clock of `time.perf_counter`."""
        seconds = until - self.first_s
        return {
            "pictures": self.got,
            "missed": self.missed,
            "late": self.late,
            "ar_steps": {str(k): n for k, n in sorted(self.ar_steps.items())},
            "seconds": round(seconds, 2),
            "share_of_rate": round(self.got / (1 + seconds // tick_s), 4),
            "ended": self.ended,
        }


async def _stall(url: str) -> None:
    """Take nothing; come back from time to time."""
    while True:
        with contextlib.suppress(ConnectionClosed, OSError):
            async with connect(
                f"{url}?format=raw", compression=None, proxy=None, max_queue=1, close_timeout=1
            ):
                await asyncio.sleep(STALL_AGAIN_S)


async def _babble(url: str, ends: Counter[str]) -> None:
    """Send garbage, count how that ended, come back."""
    for i in range(10**9):
        with contextlib.suppress(ConnectionClosed, OSError):
            async with connect(url, compression=None, proxy=None) as socket:
                await socket.send(GARBAGE[i % len(GARBAGE)])
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        await socket.recv()
                ends[f"{socket.close_code} {socket.close_reason}"] += 1
        await asyncio.sleep(RETRY_S)


async def _watch(pid: int, samples: list[float]) -> None:
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        (line,) = (x for x in status.splitlines() if x.startswith("VmRSS"))
        samples.append(int(line.split()[1]) / 1024)
        await asyncio.sleep(SAMPLE_S)


async def _soak(
    url: str, pid: int, seconds: float, clients: int, stalled: int, garbage: int, tick_s: float
) -> dict[str, Any]:
    """Everything that was seen while the clients were there."""
    readers = [Reader() for _ in range(clients - stalled)]
    socket_url = url.replace("http", "ws") + "ws"
    ends: Counter[str] = Counter()
    samples: list[float] = []
    others = [asyncio.create_task(_stall(socket_url)) for _ in range(stalled)]
    others += [asyncio.create_task(_babble(socket_url, ends)) for _ in range(garbage)]
    playing = [asyncio.create_task(r.play(socket_url, i)) for i, r in enumerate(readers)]
    while not all(r.got for r in readers):
        await asyncio.sleep(0.1)
    await asyncio.sleep(min(SETTLE_S, seconds / 4))
    others.append(asyncio.create_task(_watch(pid, samples)))
    await asyncio.sleep(seconds)
    until = time.perf_counter()
    played = [reader.report(tick_s, until) for reader in readers]
    with urllib.request.urlopen(f"{url}metrics", timeout=5) as answer:
        metrics = answer.read().decode()
    for task in others + playing:
        task.cancel()
    await asyncio.gather(*others, *playing, return_exceptions=True)
    counted = [
        line.rsplit(" ", 1)
        for line in metrics.splitlines()
        if not line.startswith("#") and "_created" not in line and "_bucket" not in line
    ]
    return {
        "lowest_share_of_rate": min(r["share_of_rate"] for r in played),
        "readers": played,
        "resident_mb_at_start": round(samples[0], 1),
        "resident_mb_at_end": round(samples[-1], 1),
        "resident_mb_at_most": round(max(samples), 1),
        "garbage_ended": dict(ends),
        "server": {name: float(value) for name, value in counted},
    }


def _serve(model: str, threads: int | None, settings: Settings, told: Connection) -> None:
    run(load(model, threads=threads), settings, host="127.0.0.1", port=0, ready=told.send)


@contextlib.contextmanager
def _server(
    model: str, threads: int | None, settings: Settings, report: dict[str, Any]
) -> Iterator[tuple[str, int]]:
    """Address and process of a running server; how long it took to stop goes into `report`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(model, threads, settings, there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(START_S):
            raise EngineError(f"the server was not ready after {START_S:g} s")
        yield here.recv(), process.pid or 0
        begun = time.perf_counter()
        process.terminate()
        process.join(STOP_S)
        report["seconds_to_stop"] = round(time.perf_counter() - begun, 2)
    except EOFError:
        raise EngineError("the server did not start; it says why above") from None
    finally:
        process.kill()
        process.join()


def soak(
    model: str,
    settings: Settings,
    *,
    seconds: float,
    clients: int,
    stalled: int,
    garbage: int,
    threads: int | None = None,
) -> dict[str, Any]:
    """Run it; of `clients`, `stalled` take nothing; those that send garbage come on top.

    Raises:
        ConfigError: if no client is left that reads.
        EngineError: if the server does not start, or where /proc is not to be had.
    """
    if clients <= stalled:
        raise ConfigError(f"of {clients} clients at least one must read; {stalled} are to stall")
    resident_bytes()  # where it cannot be had, nor can the server's
    config = load(model).config
    tick_s = settings.tick_s(config)
    report: dict[str, Any] = {
        "config": {
            "model": model, "seconds": seconds, "clients": clients, "stalled": stalled,
            "garbage": garbage, "threads": threads, "tick_ms": 1e3 * tick_s,
            "budget_ms": 1e3 * settings.budget_s(config), "slots": settings.slots,
            "stall_s": settings.stall_s,
        },
        "metadata": machine(),
    }  # fmt: skip
    with _server(model, threads, settings, report) as (url, pid):
        report |= asyncio.run(_soak(url, pid, seconds, clients, stalled, garbage, tick_s))
    return report


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
stdout = Console(emoji=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Bundle or packaged name.")] = "toytable-int8",
    seconds: Annotated[float, typer.Option(min=4, help="Length, once all clients play.")] = 300,
    clients: Annotated[int, typer.Option(min=1, help="Clients, the stalled ones included.")] = 8,
    stalled: Annotated[int, typer.Option(min=0, help="Of these, clients that take nothing.")] = 2,
    garbage: Annotated[int, typer.Option(min=0, help="More clients, that send garbage.")] = 1,
    slots: Annotated[int, typer.Option(min=1, help="Videos predicted at once.")] = 8,
    fps: Annotated[float | None, typer.Option(help="Pixel frames a second; the model's.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the model.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON to write.")] = None,
) -> None:
    """What clients of the service get while others stall and send garbage."""
    if output is not None:
        check_writable(output)
    settings = Settings(slots=slots, fps=fps, max_sessions=clients + garbage)
    report = soak(
        model, settings, seconds=seconds, clients=clients, stalled=stalled, garbage=garbage,
        threads=threads,
    )  # fmt: skip
    table = Table("reader", "pictures", "missed", "late", "share of the tick rate", "by AR steps")
    for i, r in enumerate(report["readers"]):
        steps = ", ".join(f"{k}: {n}" for k, n in r["ar_steps"].items())
        table.add_row(
            str(i), str(r["pictures"]), str(r["missed"]), str(r["late"]),
            f"{r['share_of_rate']:.1%}", steps,
        )  # fmt: skip
    stdout.print(table)
    stdout.print(
        f"resident memory {report['resident_mb_at_start']} MB, at the end "
        f"{report['resident_mb_at_end']} MB; garbage ended: {report['garbage_ended']}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
    if output is not None:
        write_file(output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(app)
