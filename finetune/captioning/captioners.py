"""Who writes captions and prompts: a model of ``transformers`` here, or one behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import io
import mimetypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.core.errors import ConfigError, DataError, FinetuneError, ModelError, first_line, is_out_of_memory

MAX_NEW_TOKENS = 512
"""Of an answer: more than twice what CogVideoX reads."""

TEMPERATURE = 0.8
"""For every variant but the first, which is the likeliest text and so the same each time."""

MAX_VIDEO_BYTES = 20 * 2**20
"""Of a file that is sent as it is; a larger one goes as pictures."""

Answer = str | FinetuneError


@dataclass(frozen=True)
class Chat:
    """What a model is asked about one clip, about a picture, or about nothing that can be seen."""

    about: str
    """For messages: the clip's file, or the prompt."""
    turns: tuple[str, ...]
    """The instruction, an answer, what is asked next, and so on; the last is the user's."""
    video: Path | None = None
    """The clip's file; None for pictures that belong to none."""
    frames: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 1, 1, 3), np.uint8))
    """Evenly spaced over the clip, or the picture alone, [F, H, W, 3] RGB."""
    frames_per_s: float = 1.0


class Captioner(Protocol):
    """A source of captions."""

    name: str
    """Of the model, as a caption's record states it."""
    revision: str
    """The exact weights, as far as they can be told; else empty."""

    def answer(self, chats: Sequence[Chat], variant: int) -> list[Answer]:
        """An answer to each chat's last turn, or the error that this chat met.

        Args:
            chats: answered side by side.
            variant: 0 asks for the likeliest text, any other number for one drawn with this seed.

        Raises:
            FinetuneError: for what no chat is to blame for, such as a server that is not there.
        """
        ...


# --- a model in this process ------------------------------------------------------------------------------------------


class LocalCaptioner:
    """A chat model of ``transformers``; sees a video where its processor has them, else pictures.

    Args:
        model: a folder or a hub id.
        revision: branch, tag or commit on the hub.
        device: such as ``cuda:0``; None for a GPU where there is one.
        sees: it has to be an image-text-to-text model; False takes one that only reads as well.

    Raises:
        ModelError: if it cannot be found or loaded, or is of another kind.
    """

    def __init__(
        self, model: str, revision: str | None = None, device: str | None = None, *, sees: bool = True
    ) -> None:
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoProcessor,
            AutoTokenizer,
        )

        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            if not sees:
                config = AutoConfig.from_pretrained(model, revision=revision)
                sees = type(config) in AutoModelForImageTextToText._model_mapping
            reader = AutoProcessor if sees else AutoTokenizer
            kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            self._processor: Any = reader.from_pretrained(model, revision=revision)
            self._model: Any = kind.from_pretrained(model, revision=revision, dtype="auto", use_safetensors=True)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            example = "an image-text-to-text model, such as Qwen/Qwen3-VL-8B-Instruct"
            raise ModelError(
                f"{model} cannot be loaded as a {'video-' if sees else ''}language model: {first_line(error)}",
                fix=f"name the folder or hub id of {example if sees else 'a chat model, such as Qwen/Qwen3-8B'};"
                " pip install 'cogvideox-finetune[caption]' has what its processor needs",
            ) from error
        if not getattr(self._processor, "chat_template", None):
            raise ModelError(f"{model} has no chat template", fix="take an instruction-tuned model")
        self._model.to(self._device).eval()
        self._sees = sees
        # Answers begin where questions end.
        getattr(self._processor, "tokenizer", self._processor).padding_side = "left"
        self.name = model
        self.revision = getattr(self._model.config, "_commit_hash", None) or revision or ""

    def answer(self, chats: Sequence[Chat], variant: int) -> list[Answer]:
        """An answer to each chat's last turn; a batch that does not fit into memory is halved."""
        try:
            return list(self._generate(chats, variant))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(chats) == 1:
                what = f"one chat of {len(chats[0].frames)} frames does not fit into memory with {self.name}"
                raise ModelError(what, fix="lower --frames or --side, or take a smaller model") from error
        middle = len(chats) // 2
        return [*self.answer(chats[:middle], variant), *self.answer(chats[middle:], variant)]

    def _generate(self, chats: Sequence[Chat], variant: int) -> list[str]:
        import torch

        inputs = self._inputs(chats)
        torch.manual_seed(variant)
        sampling = {"do_sample": True, "temperature": TEMPERATURE} if variant else {"do_sample": False}
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **sampling)
        answers: list[str] = self._processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answers

    def _inputs(self, chats: Sequence[Chat]) -> Any:
        videos = getattr(self._processor, "video_processor", None) if chats[0].video is not None else None
        options: dict[str, Any] = {"padding": True}
        if not self._sees:
            messages = [_words(chat) for chat in chats]
            template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            return self._processor.apply_chat_template(messages, **template, **options).to(self._device)
        if videos is not None:
            options |= {"do_sample_frames": False, "video_metadata": [_metadata(chat) for chat in chats]}
            if "cap_pixels_per_frame" in getattr(videos.valid_kwargs, "__annotations__", {}):
                options["cap_pixels_per_frame"] = True  # else few frames cost as many tokens as many
        return self._processor.apply_chat_template(
            [_conversation(chat, as_video=videos is not None) for chat in chats],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        ).to(self._device, self._model.dtype)


def _conversation(chat: Chat, *, as_video: bool) -> list[dict[str, Any]]:
    if as_video:
        shown: list[dict[str, Any]] = [{"type": "video", "video": chat.frames}]
    else:
        shown = [{"type": "image", "image": Image.fromarray(frame)} for frame in chat.frames]
    messages: list[dict[str, Any]] = []
    for number, text in enumerate(chat.turns):
        content = [*(shown if number == 0 else ()), {"type": "text", "text": text}]
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return messages


def _words(chat: Chat) -> list[dict[str, Any]]:
    """A conversation in words alone, as models that only read take it."""
    return [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(chat.turns)]


def _metadata(chat: Chat) -> dict[str, Any]:
    """Of frames that are chosen already: models write their times between them."""
    count, height, width, _ = chat.frames.shape
    return {
        "total_num_frames": count,
        "fps": chat.frames_per_s,
        "duration": count / chat.frames_per_s,
        "frames_indices": list(range(count)),
        "height": height,
        "width": width,
    }


# --- a model behind an endpoint ---------------------------------------------------------------------------------------


class EndpointCaptioner:
    """A model behind an OpenAI-compatible endpoint, such as vLLM's or SGLang's.

    A clip goes as a ``video_url`` with its own bytes; where that is refused, or the file is large, as pictures. A
    request that fails for a moment (429, 5xx, no connection) is repeated by the client.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        model: the name that the server knows it by.
        key_variable: the environment variable that holds the key; the key itself is never written anywhere.
        send: ``video``, ``images``, or ``auto`` for the first that the server takes.
        timeout_s: for one request.

    Raises:
        ConfigError: if the client is not installed, or the address is none.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key_variable: str = "OPENAI_API_KEY",
        *,
        send: Literal["auto", "video", "images"] = "auto",
        timeout_s: float = 120.0,
    ) -> None:
        try:
            import openai
        except ImportError:
            fix = "pip install 'cogvideox-finetune[caption]'"
            raise ConfigError("an endpoint needs the openai client", fix=fix) from None
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"{base_url} is no http address", fix="such as http://localhost:8000/v1")
        self._key = os.environ.get(key_variable) or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=self._key, timeout=timeout_s, max_retries=2)
        self._base_url = base_url
        self._key_variable = key_variable
        self._send = send
        self.name = model
        self.revision = ""

    def answer(self, chats: Sequence[Chat], variant: int) -> list[Answer]:
        """An answer to each chat's last turn: one request per chat, all at once."""
        with ThreadPoolExecutor(len(chats)) as threads:
            return list(threads.map(lambda chat: self._answer(chat, variant), chats))

    def _answer(self, chat: Chat, variant: int) -> Answer:
        import openai

        video = chat.video
        as_video = video is not None and (
            self._send == "video"
            or (self._send == "auto" and video.stat().st_size <= MAX_VIDEO_BYTES and _video_type(video) != "")
        )
        try:
            return self._request(chat, variant, as_video)
        except openai.APITimeoutError:
            return self._fault(chat, "no answer came in time", "repeat the command, or raise --timeout")
        except openai.APIConnectionError as error:
            reason = first_line(error.__cause__ or error)
            fix = "start the server, or correct --endpoint"
            raise ModelError(f"the endpoint cannot be reached: {reason}", where=self._base_url, fix=fix) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            what = f"the endpoint refuses the key in {self._key_variable}"
            raise ModelError(what, where=self._base_url, fix=f"set {self._key_variable}, or name another") from None
        except openai.NotFoundError as error:
            what = f"the endpoint has no model {self.name}: {self._reason(error)}"
            raise ModelError(what, where=self._base_url, fix="correct --model or --endpoint") from None
        except openai.APIStatusError as error:
            if as_video and self._send == "auto" and error.status_code not in (408, 413, 429):
                self._send = "images"
                return self._answer(chat, variant)
            what = f"the endpoint answered {error.status_code}: {self._reason(error)}"
            return self._fault(chat, what, "repeat the command; what is captioned is kept")
        except (openai.OpenAIError, ValueError) as error:  # such as an answer that is no JSON
            what = f"the endpoint's answer cannot be read: {self._reason(error)}"
            return self._fault(chat, what, "check that it serves chat completions")

    def _request(self, chat: Chat, variant: int, as_video: bool) -> Answer:
        messages: Any = _words(chat)
        shown = [_video_part(chat.video)] if as_video and chat.video else [_image_part(frame) for frame in chat.frames]
        if shown:  # else a plain text, which every server takes
            messages[0]["content"] = [*shown, {"type": "text", "text": chat.turns[0]}]
        response: Any = self._client.chat.completions.create(
            model=self.name,
            messages=messages,
            max_tokens=MAX_NEW_TOKENS,
            temperature=TEMPERATURE if variant else 0.0,
            seed=variant,
        )
        choices = getattr(response, "choices", None)  # the client takes any JSON, and a string for what is none
        message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        text = getattr(message, "content", None)
        if not isinstance(text, str):
            return self._fault(chat, "the endpoint's answer holds no text", "check that it serves chat completions")
        return text

    def _reason(self, error: Any) -> str:
        return f"{first_line(error).replace(self._key, '(key)'):.200}"

    @staticmethod
    def _fault(chat: Chat, what: str, fix: str) -> DataError:
        return DataError(what, where=chat.about, fix=fix)


def _video_type(video: Path) -> str:
    kind = mimetypes.guess_type(video.name)[0] or ""
    return kind if kind in ("video/mp4", "video/quicktime", "video/webm", "video/x-matroska") else ""


def _video_part(video: Path) -> dict[str, Any]:
    content = base64.b64encode(video.read_bytes()).decode("ascii")
    return {"type": "video_url", "video_url": {"url": f"data:{_video_type(video) or 'video/mp4'};base64,{content}"}}


def _image_part(frame: NDArray[np.uint8]) -> dict[str, Any]:
    content = io.BytesIO()
    Image.fromarray(frame).save(content, "JPEG", quality=90)
    encoded = base64.b64encode(content.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
