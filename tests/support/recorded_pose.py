"""The recorded outputs of MediaPipe's networks for one picture, and tflite files that return them for any input.

tests/fixtures/pose_recorded.npz: the tensors of a walking person in a 500 x 160 picture (of the heatmap only what lies
around the points), and the landmarks that the Python package mediapipe 0.10.21 itself gives for it.
"""

from pathlib import Path

import numpy
import torch
from pixstack.models_impl.annotators import pose

RECORDED = numpy.load(Path(__file__).resolve().parents[1] / "fixtures" / "pose_recorded.npz")
HEIGHT, WIDTH = (int(v) for v in RECORDED["size"])


def expected(part: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[f"mediapipe.{part}"])


def outputs(part: str, side: int = 0) -> list[numpy.ndarray]:
    """Outputs of the network of a part, in its order; side: of hands, 0 left, 1 right."""
    if part in ("detector", "face_detector"):
        index, count = RECORDED[f"{part}.index"], int(RECORDED[f"{part}.count"])
        raw = numpy.zeros((1, count, RECORDED[f"{part}.raw"].shape[1]), numpy.float32)
        logits = numpy.full((1, count, 1), -50, numpy.float32)
        raw[0, index], logits[0, index, 0] = RECORDED[f"{part}.raw"], RECORDED[f"{part}.logits"]
        return [raw, logits]
    if part == "body":
        empty = numpy.zeros((1, 1), numpy.float32)
        heatmap = RECORDED["body.heatmap"].astype(numpy.float32)[None]
        return [RECORDED["body.raw"][None], RECORDED["body.presence"][None], empty, heatmap, empty]
    if part == "hand_box":
        return [RECORDED["hand_box.raw"][side].reshape(1, 1, 1, 4)]
    if part == "hand":
        return [RECORDED["hand.raw"][side][None], RECORDED["hand.presence"][side][None]]
    return [RECORDED["face.raw"].reshape(1, 1, 1, -1), RECORDED["face.presence"].reshape(1, 1, 1, 1)]


def networks() -> dict[str, pose.Network]:
    """Networks that return the record for any picture; hands are the left one first, then the right one."""
    calls = dict.fromkeys(pose.FILES, 0)

    def network(part):
        def answer(x):
            assert x.shape[1:] == (pose.SIDES[part], pose.SIDES[part], 3)
            calls[part] += 1
            side = (calls[part] - 1) % 2
            return [torch.from_numpy(out).expand(len(x), *out.shape[1:]) for out in outputs(part, side)]

        return answer

    return {part: network(part) for part in pose.FILES}


def write(path: Path, part: str):
    """A tflite file that pools its picture to one pixel, multiplies that by nothing and adds what was recorded."""
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import Builder

    buffers, tensors, operators, results = [schema.BufferT()], [], [], []

    def tensor(shape, values=None, kind=schema.TensorType.FLOAT32) -> int:
        entry = schema.TensorT()
        entry.shape, entry.type, entry.name = list(shape), kind, f"t{len(tensors)}"
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = numpy.frombuffer(values.tobytes(), numpy.uint8)  # a list is packed byte by byte
            buffers.append(buffer)
            entry.buffer = len(buffers) - 1
        tensors.append(entry)
        return len(tensors) - 1

    def operator(code, inputs, output, kind, options):
        entry = schema.OperatorT()
        entry.opcodeIndex, entry.inputs, entry.outputs = code, inputs, [output]
        entry.builtinOptionsType, entry.builtinOptions = kind, options
        operators.append(entry)

    side = pose.SIDES[part]
    picture, pixel = tensor((1, side, side, 3)), tensor((1, 1, 1, 3))
    pool = schema.Pool2DOptionsT()
    pool.filterHeight = pool.filterWidth = pool.strideH = pool.strideW = side
    pool.padding = schema.Padding.VALID
    operator(0, [picture], pixel, schema.BuiltinOptions.Pool2DOptions, pool)
    for values in outputs(part):
        nothing = tensor((values.size, 3), numpy.zeros((values.size, 3), numpy.float32))
        bias = tensor((values.size,), numpy.ascontiguousarray(values, numpy.float32).ravel())
        flat, result = tensor((1, values.size)), tensor(values.shape)
        operator(1, [pixel, nothing, bias], flat, schema.BuiltinOptions.FullyConnectedOptions,
                 schema.FullyConnectedOptionsT())
        shape = tensor((values.ndim,), numpy.array(values.shape, numpy.int32), schema.TensorType.INT32)
        to = schema.ReshapeOptionsT()
        to.newShape = list(values.shape)
        operator(2, [flat, shape], result, schema.BuiltinOptions.ReshapeOptions, to)
        results.append(result)
    model, graph = schema.ModelT(), schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = tensors, [picture], results, operators
    names = schema.BuiltinOperator
    for code in (names.AVERAGE_POOL_2D, names.FULLY_CONNECTED, names.RESHAPE):
        known = schema.OperatorCodeT()
        known.builtinCode = known.deprecatedBuiltinCode = code
        known.version = 1
        model.operatorCodes = [*(model.operatorCodes or []), known]
    model.version, model.subgraphs, model.buffers = 3, [graph], buffers
    builder = Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(builder.Output()))
