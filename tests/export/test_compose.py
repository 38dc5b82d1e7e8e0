"""The order of tokens as a graph, against the host's."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.export import compose
from canvasmar_rt.schedule import generation_order, set_sizes

TOKENS = 20


@pytest.mark.parametrize("given", [True, False], ids=["staticness", "none"])
@pytest.mark.parametrize("order", ["motion", "maskgit", "random"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_order_of_a_graph_is_the_hosts(given: bool, order: str, steps: int) -> None:
    """Also where nothing is still: the logarithm has a floor, under which noise alone decides."""
    rng = np.random.default_rng(4)
    sampling = SamplingConfig(ar_steps=steps, order=order)
    still = rng.choice([0.0, 1e-9, 3e-5, 4e-4, 0.5, 1.0], (3, TOKENS)).astype(np.float32)
    if order == "maskgit":  # without noise in the last step: no ties
        still = rng.permuted(np.geomspace(1e-5, np.ones(3), TOKENS, dtype=np.float32).T, axis=1)
    noise = rng.gumbel(size=(3, steps, TOKENS)).astype(np.float32)
    want = np.empty((3, TOKENS), np.int64)
    generation_order(still if given else None, noise, sampling, want)

    b = compose.Builder()
    sizes = set_sizes(TOKENS, steps)
    parts = compose._order(b, "staticness" if given else None, sampling, sizes)
    b.identity(compose._concat(b, parts), "order")
    inputs = {"order_noise": noise, **({"staticness": still} if given else {})}
    graph = helper.make_graph(
        b.nodes,
        "order",
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", *x.shape[1:]])
            for n, x in inputs.items()
        ],
        [helper.make_tensor_value_info("order", TensorProto.INT64, ["B", TOKENS])],
        list(b.initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, inputs)[0], want)
