"""Functions of the library that sample videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.arguments import checked

if TYPE_CHECKING:
    from finetune.captioning.prompts import EnhanceReport
    from finetune.core.types import Bucket, DtypeName, Offload, Quantization, SamplePrompt
    from finetune.inference.editing import InvertReport
    from finetune.inference.generate import GenerateReport
    from finetune.inference.request import VideoPrompt
    from finetune.inference.story import StoryReport
    from finetune.inference.vae_files import VaeReport


@checked
def generate(
    prompts: str | Sequence[str | SamplePrompt] = (),
    out: str | Path = Path("videos"),
    *,
    record: str | Path | None = None,
    compare: Sequence[float] | str | Path | None = None,
    model: str | Path | None = None,
    revision: str | None = None,
    transformer: str | Path | None = None,
    adapters: str | Path | Sequence[str | Path] | None = None,
    images: str | Path | Sequence[str | Path] = (),
    last_images: str | Path | Sequence[str | Path] = (),
    source_videos: str | Path | Sequence[str | Path] = (),
    controls: str | Path | Sequence[str | Path] = (),
    strength: float | None = None,
    extend: int | None = None,
    videos: int | None = None,
    seed: int | None = None,
    bucket: str | Bucket | None = None,
    riflex: int | None = None,
    fps: float | None = None,
    negative_prompt: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    dynamic_cfg: bool | None = None,
    scheduler: Literal["ddim", "dpm"] | None = None,
    gif: bool | None = None,
    upscale: str | Path | None = None,
    interpolate: str | None = None,
    preview: str | Path | None = None,
    enhance: str | None = None,
    endpoint: str | None = None,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None,
    budget: str | int | None = None,
    offload: Offload | Literal["auto"] | None = None,
    quantize: Quantization | None = None,
    quantize_text: Quantization | None = None,
    compile: bool | None = None,
    parallel: Literal["prompts", "cfg", "context"] | None = None,
    device: str | None = None,
) -> GenerateReport:
    """Sample a video for each prompt from a base model with any number of adapters.

    What is None is as ``record`` has it, else as ``GenerateRequest`` has it. A video that is there already, made by an
    equal request, is not made again.

    Args:
        prompts: one text or several; a ``SamplePrompt`` has a seed, first, last and further frames of its own, a
            ``VideoPrompt`` of ``finetune.inference.request`` adapters, size and source video as well.
        out: folder for the videos.
        record: a video of this function, or the JSON beside it: it is made again, but for what else is given here.
        compare: sample every prompt in columns: with each of these factors of its adapters' strengths (0 is the base),
            or with each checkpoint of this run.
        model: the base model, a folder or a hub id; None for what the first adapter was trained on.
        revision: branch, tag or commit of a hub id.
        transformer: in place of the base's: a fully fine-tuned one, from an export, or a GGUF file.
        adapters: LoRAs, each a file, an export, a checkpoint or a run, as ``PATH`` or ``PATH:STRENGTH``.
        images: first frames, for image-to-video models: one for all texts, or one for each.
        last_images: last frames, likewise.
        source_videos: what video-to-video starts from, likewise; for text-to-video models.
        controls: control videos, likewise; for models that were trained to follow one.
        strength: of video-to-video, more than 0 to 1: which part of the denoising steps is made.
        extend: by how many parts each video is continued.
        videos: of each prompt; each has the next seed.
        seed: of the first text's first video (0); each further one has the next.
        bucket: frames x height x width, such as ``49x480x720``; None: as the first adapter was trained.
        riflex: for videos longer than the model makes: their frames, for which RIFLEx lowers one frequency of the
            positions in time; 0 for the model's own positions, None: as the first adapter was trained.
        fps: of the written files; None: as the first adapter was trained.
        negative_prompt: what to steer away from.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 for none.
        dynamic_cfg: let the guidance grow with the steps.
        scheduler: what takes the steps; None for the base's own.
        gif: write animated GIFs as well.
        upscale: super-resolution weights that enlarge the files' frames; the extra ``upscale``.
        interpolate: ``minterpolate`` for twice as many frames per second in the files, ``minterpolate:4`` for four.
        preview: ``taecvx`` weights, which show each video while it is sampled, in the terminal or ``preview.png``.
        enhance: a language model that makes the prompts long first, as ``model`` of the function ``enhance``.
        endpoint: where that model is, if it is behind an OpenAI-compatible server.
        dtype: what to compute in.
        budget: of the GPU's memory, such as ``8GiB`` or bytes; None for what is free of it.
        offload: what waits in host memory meanwhile; None for as little as the budget allows.
        quantize: the transformer in fewer bits, which changes the videos.
        quantize_text: the same for the text encoder.
        compile: compile the transformer's blocks.
        parallel: what the processes of ``accelerate launch`` divide: videos, the two passes of guidance, or tokens.
        device: such as ``cuda:1`` or ``cpu``; None for the GPU if there is one.

    Raises:
        ModelError: if the base cannot be found or loaded.
        ConfigError: for a prompt, image, adapter, size or number that cannot be used; all of them at once.
        DataError: if an image or a video cannot be read.
    """
    from finetune.core.errors import ConfigError
    from finetune.core.gpu import amount
    from finetune.inference.generate import generate
    from finetune.inference.postprocess import parse_interpolation
    from finetune.inference.record import read_video_record, request_again
    from finetune.inference.request import GenerateRequest, parse_adapter

    files = {"images": images, "last_images": last_images, "videos": source_videos, "controls": controls}
    listed = _listed(prompts, files, range(seed or 0, 2**62, max(1, videos or 1)))
    from_video = record is not None or extend or any(prompt.video for prompt in listed)
    if strength is not None and not from_video:
        raise ConfigError(
            "it is of video-to-video, and no prompt has a video",
            where=f"--strength {strength:g}",
            fix="give --video or --extend; how strongly an adapter acts stands behind its path: --adapter PATH:0.3",
        )
    if enhance is not None:
        listed = _enhanced(listed, enhance, endpoint, model)
    elif endpoint is not None:
        raise ConfigError("nobody asks the endpoint", where="--endpoint", fix="name its model: --enhance MODEL")
    given: dict[str, Any] = {
        "base": None if model is None else str(model),
        "prompts": tuple(listed) or None,
        "out": Path(out),
        "revision": revision,
        "transformer": None if transformer is None else Path(transformer),
        "adapters": None if adapters is None else tuple(parse_adapter(str(path)) for path in _paths(adapters)),
        "bucket": _bucket(bucket),
        "riflex": riflex,
        "fps": fps,
        "negative_prompt": negative_prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "dynamic_cfg": dynamic_cfg,
        "scheduler": scheduler,
        "strength": strength,
        "extend": extend,
        "videos": videos,
        "compare": Path(compare) if isinstance(compare, str | Path) else None if compare is None else tuple(compare),
        "gif": gif,
        "upscale": None if upscale is None else Path(upscale),
        "interpolate": None if interpolate is None else parse_interpolation(interpolate),
        "preview": None if preview is None else Path(preview),
        "dtype": dtype,
        "budget": amount("--budget", budget) if isinstance(budget, str) else budget,
        "offload": offload,
        "quantize": quantize,
        "quantize_text": quantize_text,
        "compile": compile,
        "parallel": parallel,
        "device": device,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if record is None:
        return generate(GenerateRequest(**{"prompts": (), **given}))
    recorded = read_video_record(Path(record))
    if seed is not None and not listed:
        given["prompts"] = tuple(prompt.model_copy(update={"seed": seed}) for prompt in recorded.request.prompts)
    return generate(request_again(recorded, **given))


@checked
def vae(
    action: Literal["encode", "decode", "roundtrip"],
    file: str | Path,
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    bucket: str | Bucket | None = None,
    fps: float | None = None,
    worst: int = 4,
    dtype: DtypeName = "bf16",
    device: str | None = None,
) -> VaeReport:
    """Take a video through the VAE, in one direction into a file, or in both to see what is lost.

    Args:
        action: ``encode`` a video to a file of latents, ``decode`` such a file to an mp4, or both with every frame
            measured: ``roundtrip``.
        file: the video, or the file of latents.
        out: the file to write, of a round trip a folder; None for a name like ``file``'s in the folder of now.
        model: whose VAE, a folder or a hub id; None, for decoding, for the one that encoded.
        revision: branch, tag or commit of a hub id.
        bucket: frames x height x width to encode, such as ``49x480x720``; None: the whole video.
        fps: of what is encoded, or of the decoded file; None: the video's own.
        worst: frames that a round trip shows.
        dtype: what to compute in; training encodes in ``bf16``.
        device: such as ``cuda:1`` or ``cpu``; None for the GPU if there is one.

    Raises:
        ConfigError: for an argument that cannot be used.
        DataError: if the file cannot be read, or is no file of latents.
        ModelError: if the VAE cannot be found or loaded.
    """
    from finetune.cogvideox.config import ModelConfig
    from finetune.cogvideox.model_files import pin_revision
    from finetune.core.distributed import usable_device
    from finetune.core.errors import ConfigError
    from finetune.inference import vae_files

    source, decoding = Path(file), action == "decode"
    if decoding and bucket is not None:
        raise ConfigError("latents have a size of their own", where="--bucket", fix="leave --bucket out")
    if worst < 1:
        raise ConfigError(f"{worst} worst frames", where="--worst", fix="give 1 or more")
    if fps is not None and not 0 < fps <= 1000:
        raise ConfigError(f"{fps} frames per second", where="--fps", fix="give a positive number, at most 1000")
    if model is None:
        if not decoding:
            raise ConfigError("no model is named", where="--model", fix="name it: a folder, a hub id, 5b, ...")
        metadata, _ = vae_files.read_latents(source)
        model, revision = metadata.model, metadata.revision or None
    # clip.mp4 is what clip.safetensors was encoded from.
    endings = {"encode": ".safetensors", "decode": "-decoded.mp4", "roundtrip": "-vae"}
    names = {each: source.stem + ending for each, ending in endings.items()}
    target = Path(names[action] if out is None else out)
    if action != "roundtrip" and target.suffix != Path(names[action]).suffix:
        fix = f"write a name that ends in {Path(names[action]).suffix}"
        raise ConfigError(f"{target.name} is no name for what {action} writes", where=f"--output {target}", fix=fix)
    run = {"encode": vae_files.encode_file, "decode": vae_files.decode_file, "roundtrip": vae_files.roundtrip_file}
    return run[action](
        vae_files.VaeRequest(
            file=source,
            out=target,
            model=ModelConfig(pretrained=str(model), revision=pin_revision(str(model), revision), dtype=dtype),
            device=usable_device(device),
            bucket=_bucket(bucket),
            fps=fps,
            worst=worst,
        )
    )


@checked
def invert(
    video: str | Path,
    out: str | Path | None = None,
    *,
    model: str | Path,
    revision: str | None = None,
    prompt: str | None = None,
    source_prompt: str = "",
    negative_prompt: str = "",
    image: str | Path | None = None,
    adapters: str | Path | Sequence[str | Path] = (),
    bucket: str | Bucket | None = None,
    fps: float | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    corrections: int = 3,
    share: float = 1.0,
    seed: int | None = None,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    device: str | None = None,
) -> InvertReport:
    """Find the noise that a model makes a video from, and sample from it: the video again, or an edit of it.

    Args:
        video: what is inverted.
        out: folder for what is written; None for ``<name of the video>-edit`` or ``-inverted`` in the folder of now.
        model: a folder or a hub id.
        revision: branch, tag or commit of a hub id.
        prompt: what the edit shows; None samples the video itself again, and says how near it comes.
        source_prompt: what the video shows.
        negative_prompt: what guidance steers away from.
        image: another first frame for the edit, for image-to-video models.
        adapters: LoRAs, as for ``generate``.
        bucket: frames x height x width; None for the model's native size, of as many frames as the video has.
        fps: frames per second of what is taken of the video; None for the model's rate.
        num_inference_steps: on the way to noise, and back.
        guidance_scale: of the edit; 1 for none. The inversion has none, or it could not be undone.
        corrections: calls of the model per step that make the inversion exact, beyond the one that it takes anyhow.
        share: part of the steps in which the edit attends to the video's tokens: 1 keeps the most of it, 0 nothing.
        seed: begin the edit with this noise in place of the inverted one.
        dtype: what to compute in.
        device: such as ``cuda:1`` or ``cpu``; None for the GPU if there is one.

    Raises:
        ConfigError: for an argument that cannot be used; all of them at once.
        DataError: if the video or the image cannot be used.
        ModelError: if the model cannot be found or loaded.
    """
    from finetune.cogvideox.config import ModelConfig
    from finetune.cogvideox.model_files import pin_revision
    from finetune.core.distributed import usable_device
    from finetune.inference.editing import InvertRequest, invert_video
    from finetune.inference.request import parse_adapter

    source = Path(video)
    name = f"{source.stem}-{'inverted' if prompt is None else 'edit'}"
    return invert_video(
        InvertRequest(
            video=source,
            out=Path(name if out is None else out),
            model=ModelConfig(pretrained=str(model), revision=pin_revision(str(model), revision), dtype=dtype),
            device=usable_device(device),
            prompt=prompt,
            source_prompt=source_prompt,
            negative_prompt=negative_prompt,
            image=None if image is None else Path(image),
            adapters=tuple(parse_adapter(str(adapter)) for adapter in _paths(adapters)),
            bucket=_bucket(bucket),
            fps=fps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            corrections=corrections,
            share=share,
            seed=seed,
        )
    )


@checked
def enhance(
    prompts: str | Sequence[str | SamplePrompt],
    *,
    model: str = "Qwen/Qwen3-VL-8B-Instruct",
    revision: str | None = None,
    endpoint: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    timeout_s: float = 120.0,
    images: str | Path | Sequence[str | Path] = (),
    target: str = "5b",
    instruction: str | Path | None = None,
    device: str | None = None,
) -> EnhanceReport:
    """Have a language model write the long prompts that CogVideoX was trained on from short ones.

    Args:
        prompts: one short text or several; a ``SamplePrompt`` may have an image of its own.
        model: of transformers, a folder or a hub id; with an endpoint, its name there. With images it has to see them.
        revision: branch, tag or commit on the hub.
        endpoint: base address of an OpenAI-compatible server that is asked instead.
        key_variable: the environment variable that holds its key.
        timeout_s: for one request to it.
        images: first frames, for image-to-video models: one for all texts, or one for each; they go along.
        target: the CogVideoX that will read the prompts, whose tokenizer counts them.
        instruction: a file with what the model is asked, ``{prompt}`` and ``{words}`` in it; None for what ships.
        device: such as ``cuda:1`` or ``cpu``; None for a GPU where there is one.

    Raises:
        ConfigError: if there is no prompt, or an argument cannot be used.
        DataError: if an image cannot be read, or no answer can be used; the report has those of single prompts.
        ModelError: if the model, the tokenizer or the endpoint cannot be had.
    """
    from finetune.captioning.answers import token_limit
    from finetune.captioning.captioners import Captioner, EndpointCaptioner, LocalCaptioner
    from finetune.captioning.prompts import enhance_prompts, read_instructions
    from finetune.core.errors import ConfigError

    given = _listed(prompts, {"images": images})
    if not given:
        raise ConfigError("there is no prompt", fix="give one")

    def writer() -> Captioner:
        if endpoint is None:
            return LocalCaptioner(model, revision, device, sees=any(prompt.image for prompt in given))
        return EndpointCaptioner(endpoint, model, key_variable, timeout_s=timeout_s)

    instructions = read_instructions(None if instruction is None else Path(instruction))
    return enhance_prompts(given, writer, token_limit(target), instructions)


@checked
def story(
    idea: str,
    out: str | Path = Path("story"),
    *,
    model: str | Path,
    painter: str | Path,
    writer: str = "Qwen/Qwen3-VL-8B-Instruct",
    endpoint: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    instruction: str | Path | None = None,
    painter_steps: int | None = None,
    adapters: str | Path | Sequence[str | Path] = (),
    bucket: str | Bucket | None = None,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    offload: bool = False,
    device: str | None = None,
) -> StoryReport:
    """Make a video of an idea: a language model writes the prompt, a painter its first frame, CogVideoX the video.

    Each stage leaves a file in ``out`` and is not done again while what it was made from is the same.

    Args:
        idea: in a few words.
        out: the story's folder.
        model: an image-to-video CogVideoX, a folder or a hub id.
        painter: a text-to-image pipeline of diffusers, a folder or a hub id.
        writer: a language model, as ``model`` of ``enhance``.
        endpoint: base address of an OpenAI-compatible server that is asked in its place.
        key_variable: the environment variable that holds its key.
        instruction: a file with what it is asked, as for ``enhance``.
        painter_steps: denoising steps of the painter; None for its own default.
        adapters: LoRAs for the video, as for ``generate``.
        bucket: frames x height x width; None for the model's native size.
        seed: of the frame and of the video.
        num_inference_steps: of the video.
        guidance_scale: of the video.
        offload: keep on the GPU only the component of CogVideoX that runs; slower.
        device: such as ``cuda:1`` or ``cpu``; None for the GPU if there is one.

    Raises:
        ConfigError: if the model is none of image-to-video, or an argument cannot be used.
        DataError: if the language model's answer cannot be used.
        ModelError: if one of the models cannot be had.
    """
    from finetune.captioning.prompts import read_instructions
    from finetune.cogvideox.model_files import json_folder
    from finetune.cogvideox.spec import read_spec
    from finetune.core.checksums import digest_of
    from finetune.core.distributed import usable_device
    from finetune.core.errors import ConfigError, raise_all
    from finetune.core.types import SamplePrompt
    from finetune.inference.story import Animation, Painter, Script, tell

    name, folder = str(model), Path(out)
    spec = read_spec(str(json_folder(name)))
    shape = _bucket(bucket) or spec.training_bucket
    faults = [ConfigError(problem, where=f"--bucket {shape}") for problem in spec.check_bucket(shape)]
    if not spec.image_to_video:
        fix = "name an image-to-video model, such as 5b-i2v"
        faults.append(
            ConfigError("the model is text-to-video and takes no first frame", where=f"--model {name}", fix=fix)
        )
    if not idea.strip():
        faults.append(ConfigError("the idea is empty", fix="say what the video is to show"))
    raise_all(ConfigError, faults, what="{n} things are wrong with the story")
    listed = _paths(adapters)

    def write(text: str) -> str:
        options = {"endpoint": endpoint, "key_variable": key_variable, "instruction": instruction, "device": device}
        return enhance(text, model=writer, target=name, **options).prompts[0].prompt  # type: ignore[arg-type]

    def animate(prompt: str, frame: Path) -> Path:
        waiting = "model" if offload else "auto"
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "offload": waiting}
        prompts = [SamplePrompt(prompt=prompt, image=frame, seed=seed)]
        options = {"model": name, "adapters": listed, "bucket": shape, "device": device}
        return generate(prompts, folder, **options, **settings).videos[0]  # type: ignore[arg-type]

    asked = digest_of(read_instructions(None if instruction is None else Path(instruction)).text)
    return tell(
        idea,
        folder,
        Script(write, {"writer": writer, "endpoint": endpoint, "instruction": asked}),
        Painter(str(painter), shape, seed, painter_steps, usable_device(device)),
        Animation(
            animate,
            {
                "model": name,
                "adapters": [str(adapter) for adapter in listed],
                "bucket": str(shape),
                "seed": seed,
                "steps": num_inference_steps,
                "guidance": guidance_scale,
            },
        ),
    )


def _listed(
    prompts: str | Sequence[str | SamplePrompt],
    files: Mapping[str, str | Path | Sequence[str | Path]],
    seeds: range = range(2**62),
) -> list[VideoPrompt]:
    """Prompts as they may be given: each text with its files (arguments of ``prompts_with_seeds``) and a seed."""
    from finetune.inference.request import VideoPrompt, prompts_with_seeds

    items = [prompts] if isinstance(prompts, str) else prompts
    texts = [item for item in items if isinstance(item, str)]
    seeded = iter(prompts_with_seeds(texts, **{name: _paths(paths) for name, paths in files.items()}, seeds=seeds))
    return [next(seeded) if isinstance(item, str) else VideoPrompt.model_validate(dict(item)) for item in items]


def _enhanced(
    prompts: Sequence[VideoPrompt], writer: str, endpoint: str | None, model: str | Path | None
) -> list[VideoPrompt]:
    """Long prompts for short ones, as ``generate`` takes them; the language model is gone from memory afterwards."""
    import os

    from finetune.caching.encode import release_memory
    from finetune.core.errors import ConfigError, DataError, raise_all

    if os.environ.get("WORLD_SIZE", "1") != "1":
        fix = "run `finetune enhance` first, and generate from its file"
        raise ConfigError("several processes would write prompts of their own", where="--enhance", fix=fix)
    if model is None:
        fix = "name it: a folder, a hub id, 5b, ..."
        raise ConfigError("it is not known which model will read the prompts", where="--model", fix=fix)
    report = enhance(prompts, model=writer, endpoint=endpoint, target=str(model))
    raise_all(DataError, report.errors, what="{n} prompts stay short")
    release_memory()
    return _listed(report.prompts, {})


def _bucket(bucket: str | Bucket | None) -> Bucket | None:
    from finetune.core.errors import ConfigError
    from finetune.datasets.geometry import parse_bucket

    try:
        return None if bucket is None else parse_bucket(bucket)
    except ValueError as error:
        raise ConfigError(str(error), where=f"--bucket {bucket}") from None


def _paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
