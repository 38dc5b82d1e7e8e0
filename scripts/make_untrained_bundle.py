"""Write the packaged bundle `toytable-untrained`: ToyTable's shapes, a fraction of its weights, and
no training. It lets the demo, the tests and an embedding program run before a model is trained.

    python -m scripts.make_untrained_bundle
"""

import dataclasses
from pathlib import Path

from canvasmar_rt.bundle import PACKAGED
from canvasmar_rt.config import FlowConfig, preset
from canvasmar_rt.export.exporter import ExportOptions, export_bundle
from canvasmar_rt.models.canvasmar import build

NAME = "toytable-untrained"


def main(output: Path = PACKAGED / NAME) -> None:
    model, sampling = preset("toytable")
    small = dataclasses.replace(
        model,
        name=NAME,
        autoencoder=dataclasses.replace(model.autoencoder, widths=(8, 16, 16), blocks=1),
        flow=FlowConfig(width=64, blocks=2),
        dim=64,
        heads=2,
        temporal_layers=2,
        canvas_layers=1,
        spatial_layers=3,
        encoder_layers=1,
    )
    export_bundle(
        build(small),
        sampling,
        output,
        ExportOptions(),
        source="random weights, seed 0: untrained, so what it predicts is noise",
        force=True,
        progress=print,
    )


if __name__ == "__main__":
    main()
