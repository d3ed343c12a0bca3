"""``Engine.generate`` and ``async_generate``: what only a Python program can send, and the same as over HTTP."""

from __future__ import annotations

import asyncio
import io
from functools import partial
from typing import Any

from tests.parity.engine import EngineClient
from tests.parity.form import GREEDY, NONE, ONE, TWO, Forms, picture, prompt
from tests.parity.tokens import ids_of

FORMS = Forms("Engine", servers="engine")
P = [picture(seed) for seed in range(150, 160)]


def _generate(text: Any, images: Any = None, **more: Any) -> Any:
    return lambda client: client.generate(text, images, **more)


def pil(mode: str = "RGB", seed: int = 1) -> Any:
    from PIL import Image as Pillow

    from sglang_mm_conn.demo.images import pixels

    return Pillow.fromarray(pixels([seed], 112, 84)).convert(mode)


def jpeg() -> bytes:
    out = io.BytesIO()
    pil().save(out, "JPEG")
    return out.getvalue()


def precomputed(client: EngineClient, **changed: Any) -> dict[str, Any]:
    import torch

    rows = torch.randn(12, client.hidden, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([[1, 6, 8]])
    return {"format": "precomputed_embedding", "feature": rows, "image_grid_thw": grid, **changed}


def processed(client: EngineClient, images: int = 1) -> dict[str, Any]:
    """What the model's processor makes of a prompt and images."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(client.model)
    made = processor(text=[prompt("what?", images=images)], images=[pil(seed=seed) for seed in range(images)],
                     return_tensors="pt")  # fmt: skip
    return {"format": "processor_output", **made}


FORMS.ask("a text", _generate(NONE))
FORMS.ask("a data URI", _generate(ONE, P[0]))
FORMS.ask("bytes of a JPEG", lambda client: client.generate(ONE, jpeg()))
FORMS.ask("bytes that are none", _generate(ONE, b"nonsense"))
for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I", "F", "HSV"):
    FORMS.ask(f"a Pillow image, {mode}", lambda client, mode=mode: client.generate(ONE, pil(mode)))  # type: ignore[misc]
FORMS.ask("several Pillow images", lambda client: client.generate(TWO, [pil(seed=1), pil(seed=2)]))
FORMS.ask("a batch of Pillow images", lambda client: client.generate([ONE, ONE], [pil(seed=1), pil(seed=2)]))
FORMS.ask("a path", lambda client: client.generate(ONE, str(client.files.path("photo.png"))))
FORMS.ask("bytes and a data URI", lambda client: client.generate(TWO, [jpeg(), P[0]]))
FORMS.ask("a video as bytes", lambda client: client.generate(
    prompt("what?", media="<|vision_start|><|video_pad|><|vision_end|>"),
    video_data=client.files.data("video.mp4")))  # fmt: skip
# As sglang's documents have it: a placeholder for each row. Fewer end a colocated program, and so does an embedding for
# any of these models but Qwen2.5-VL.
EMBEDDINGS = Forms("Engine", servers="engine", kinds=("qwen2_5_vl",))
ROWS = ONE.replace("<|image_pad|>", "<|image_pad|>" * 12)
EMBEDDINGS.ask("a video as frames", lambda client: client.generate(
    prompt("what?", media="<|vision_start|><|video_pad|><|vision_end|>"),
    video_data=[[pil(seed=seed) for seed in range(4)]]))  # fmt: skip
EMBEDDINGS.ask("precomputed embeddings", lambda client: client.generate(ROWS, [precomputed(client)]))
EMBEDDINGS.ask("precomputed embeddings, token ids", lambda client: client.generate(
    None, [precomputed(client)], input_ids=ids_of(ROWS)))  # fmt: skip
EMBEDDINGS.ask("precomputed embeddings, two samples", lambda client: client.generate(
    ROWS, [precomputed(client)], sampling={"n": 2}))  # fmt: skip
EMBEDDINGS.ask("precomputed embeddings in a batch with a text", lambda client: client.generate(
    [ROWS, NONE], [[precomputed(client)], None]))  # fmt: skip
EMBEDDINGS.ask("precomputed embeddings in a batch with an image", lambda client: client.generate(
    [ROWS, ONE], [[precomputed(client)], [P[0]]]))  # fmt: skip
EMBEDDINGS.ask("precomputed embeddings beside an image", lambda client: client.generate(
    TWO, [precomputed(client), P[0]]))  # fmt: skip
FORMS.ask("what a processor returns", lambda client: client.generate(
    None, [processed(client)], input_ids=processed(client)["input_ids"][0].tolist()))  # fmt: skip
FORMS.ask("what a processor returns of two images", lambda client: client.generate(
    None, [processed(client, 2)], input_ids=processed(client, 2)["input_ids"][0].tolist()))  # fmt: skip
FORMS.ask("what a processor returns, two samples", lambda client: client.generate(
    None, [processed(client)], input_ids=processed(client)["input_ids"][0].tolist(), sampling={"n": 2}))  # fmt: skip
FORMS.ask("an unknown format", _generate(ONE, [{"format": "no_such"}]))
FORMS.ask("a stream", _generate(ONE, P[1], stream=True))
FORMS.ask("a batch", _generate([ONE, TWO, NONE], [[P[2]], [P[3], P[4]], None]))
FORMS.ask("a batch as a stream", _generate([ONE, ONE], [P[2], P[3]], stream=True))
FORMS.ask("two samples", _generate(ONE, P[5], sampling={"n": 2}))
FORMS.ask("log-probabilities", _generate(ONE, P[5], return_logprob=True, logprob_start_len=0))
FORMS.ask("hidden states", _generate(ONE, picture(160), return_hidden_states=True))  # not in the cache
FORMS.ask("token ids", lambda client: client.generate(None, P[6], input_ids=ids_of(ONE)))
FORMS.ask("a batch of token ids", lambda client: client.generate(None, [P[6], P[7]], input_ids=[ids_of(ONE)] * 2))
FORMS.ask("too few images", _generate(TWO, [P[0]]))
FORMS.ask("too many images", _generate(ONE, [P[0], P[1]]))
FORMS.ask("an id", _generate(ONE, P[8], rid="parity-engine"))


async def _at_once(client: EngineClient) -> list[Any]:
    asks = [client.engine.async_generate(ONE, GREEDY, image_data=image) for image in P[:4]]
    return list(await asyncio.gather(*asks))


async def _one(client: EngineClient) -> Any:
    return await client.engine.async_generate(ONE, GREEDY, image_data=P[9])


async def _stream(client: EngineClient) -> Any:
    chunks = await client.engine.async_generate(ONE, GREEDY, image_data=P[9], stream=True)
    return [chunk async for chunk in chunks][-1]


async def _left(client: EngineClient) -> Any:
    """The caller is cancelled while it waits, and asks again."""
    asked = asyncio.ensure_future(client.engine.async_generate(ONE, {**GREEDY, "max_new_tokens": 400}, image_data=P[9]))
    await asyncio.sleep(0.2)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    return await _one(client)


for name, ask in {"async": _one, "async, four at once": _at_once, "async, a stream": _stream,
                  "async, cancelled": _left}.items():  # fmt: skip
    FORMS.ask(name, partial(EngineClient.run, ask=ask))

ALL = [*FORMS, *EMBEDDINGS]
