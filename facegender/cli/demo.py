"""`facegender demo`: a page on which to try a model."""

from __future__ import annotations

import argparse
import base64
import io
import logging
import socket
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from facegender.cli.arguments import whole_number
from facegender.cli.predict import print_doubt, threshold_of
from facegender.errors import UserError
from facegender.runtime.dvc_context import project_root

if TYPE_CHECKING:
    from flask import Flask, Response
    from PIL import Image

    from facegender.faces.detector import Face
    from facegender.inference.predictor import Predictor

HOST = "127.0.0.1"
# No photo of a telephone is larger.
MAX_UPLOAD_BYTES = 64 << 20
# The largest of a picture are judged, and each is sent back as the model saw it.
MAX_FACES = 24
# Cells per side of the map; each costs a prediction.
MAP_CELLS = 7
_GREY = 128
# Longer side, in pixels, of the picture that is shown.
_SHOWN_SIDE = 1280
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        f"Show a page on which to try a model, at http://{HOST}, for this machine only. Pictures "
        "are judged in memory, and neither kept nor sent anywhere."
    )
    parser.add_argument("--port", type=whole_number, default=5002, help="default: %(default)s")
    parser.add_argument(
        "--model", type=Path, help="a .tflite or .keras file (default: models/model.tflite)"
    )
    parser.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    model = args.model or project_root() / "models" / "model.tflite"
    try:
        listening = socket.create_server((HOST, args.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Port {args.port} cannot be used ({reason}). Stop what uses it, or choose another: "
            "`make demo PORT=5050`."
        ) from None
    if args.model is None:
        print_doubt(project_root())
    with listening:
        from werkzeug.serving import make_server

        from facegender.inference.loading import load_predictors

        (predictor,) = load_predictors(model, 1, trusted=args.model is None)
        app = create_app(predictor, threshold_of(model))
        # It prints a line for each request.
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        # Threads, because browsers open connections that they do not use at once.
        server = make_server(HOST, args.port, app, threaded=True, fd=listening.fileno())
        print(f"http://{HOST}:{args.port}\nCtrl-C stops the server.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def create_app(predictor: Predictor, threshold: float) -> Flask:
    """Return the app that serves the page and answers its requests.

    `POST /predict` takes the bytes of a picture, and `POST /map` those of a crop that `/predict`
    returned. Both answer with JSON; an error has one key, `error`.
    """
    from flask import Flask, jsonify, request
    from werkzeug.exceptions import Forbidden, HTTPException

    from facegender.data.images import InvalidImage, UnreadableImage, decode_image

    app = Flask(__name__, static_folder="demo_page", static_url_path="/page")
    app.config["MAX_CONTENT_LENGTH"] = MAX_UPLOAD_BYTES
    # A site whose name leads to this machine (DNS rebinding) sends its own name as the host.
    app.config["TRUSTED_HOSTS"] = [HOST, "localhost"]
    # A predictor is not thread-safe, and one large picture at a time is enough for the memory.
    one_at_a_time = Lock()

    @app.before_request
    def refuse_other_sites() -> None:
        origin = request.headers.get("Origin")
        if origin is not None and origin != request.host_url.rstrip("/"):
            raise Forbidden("Only this server's own page may ask.")

    @app.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update(_HEADERS)
        return response

    @app.errorhandler(HTTPException)
    def explain(error: HTTPException) -> tuple[Response, int]:
        text = error.description or error.name
        if error.code == 413:
            text = f"The file has more than {MAX_UPLOAD_BYTES >> 20} MiB."
        return jsonify(error=text), error.code or 500

    @app.errorhandler(InvalidImage)
    def name_bad_image(error: InvalidImage) -> tuple[Response, int]:
        # Not the picture's fault, but for example too little memory.
        return jsonify(error=str(error)), 503 if isinstance(error, UnreadableImage) else 422

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("index.html")

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok")

    @app.post("/predict")
    def predict() -> Response:
        content = request.get_data(cache=False)
        with one_at_a_time:
            return jsonify(judge(content, predictor, threshold))

    @app.post("/map")
    def look() -> Response:
        content = request.get_data(cache=False)
        with one_at_a_time:
            crop = decode_image(content, predictor.size)
            return jsonify(map=occlusion_map(crop, predictor).tolist())

    return app


def judge(content: bytes, predictor: Predictor, threshold: float) -> dict[str, Any]:
    """Return a picture's faces, the largest first, and the picture itself, ready for JSON.

    Returns:
        `picture`, a data address of the upright picture; its `width` and `height`, in whose
        pixels boxes are; `threshold`; `faces`; `left_out`, the number of faces beyond MAX_FACES.

    Raises:
        InvalidImage: the picture cannot be decoded.
    """
    from facegender.data.face_images import picture_faces
    from facegender.data.images import decode_image, decode_picture

    picture, scale = decode_picture(content)
    found: list[tuple[Face | None, np.ndarray]]
    if predictor.crop:
        faces = picture_faces(picture, scale, predictor.size, predictor.crop)
        found = [item for item in faces if item[0]]
    else:
        found = [(None, decode_image(content, predictor.size))]
    shown = found[:MAX_FACES]
    probabilities = predictor.predict_all([crop for _, crop in shown])
    return {
        "picture": _shown(picture),
        "width": round(picture.width / scale),
        "height": round(picture.height / scale),
        "threshold": threshold,
        "left_out": len(found) - len(shown),
        "faces": [
            _described(face, crop, probability, threshold)
            for (face, crop), probability in zip(shown, probabilities, strict=True)
        ],
    }


def occlusion_map(crop: np.ndarray, predictor: Predictor) -> np.ndarray:
    """Return how much each part of a crop moves P(male) towards male.

    A grey square covers one part after another (Zeiler and Fergus, *Visualizing and Understanding
    Convolutional Networks*, ECCV 2014).

    Args:
        crop: uint8 array of shape (size, size, 3).

    Returns:
        float64 array of shape (MAP_CELLS, MAP_CELLS): P(male) less P(male) without that part.
    """
    edges = np.linspace(0, len(crop), MAP_CELLS + 1).round().astype(int)
    sides = [slice(low, high) for low, high in pairwise(edges)]
    rows = []
    for vertical in sides:
        covered = np.repeat(crop[None], MAP_CELLS, axis=0)
        for image, horizontal in zip(covered, sides, strict=True):
            image[vertical, horizontal] = _GREY
        rows.append(predictor.predict(covered))
    return predictor.predict(crop[None])[0] - np.array(rows)


def _described(
    face: Face | None, crop: np.ndarray, probability: float, threshold: float
) -> dict[str, Any]:
    from facegender.data.face_images import box_of
    from facegender.data.images import encode_png
    from facegender.inference.predictor import confidence, label_of
    from facegender.labels import LABELS

    label = label_of(probability, threshold=threshold, abstain_below=0)
    return {
        "box": box_of(face) if face else None,
        "label": label,
        "probability": probability,
        "confidence": confidence(probability, LABELS[label]),
        "crop": _data_address(encode_png(crop), "png"),
    }


def _shown(picture: Image.Image) -> str:
    """Return a picture as JPEG, which every browser shows, unlike HEIC."""
    small, scale = picture, _SHOWN_SIDE / max(picture.size)
    if scale < 1:
        # At least a pixel: Pillow's own functions round the side of a thin strip to 0.
        width, height = (max(1, round(side * scale)) for side in picture.size)
        small = picture.resize((width, height))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return _data_address(buffer.getvalue(), "jpeg")


def _data_address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
