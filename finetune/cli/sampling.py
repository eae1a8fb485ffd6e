"""Verbs that sample videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import finetune
from finetune.cli.app import OK, USER_ERROR, Device, flag, is_main, option, print_next, print_notes, verb

_PANEL = "Videos"


_Scheme = Literal["int8", "int8-dynamic", "fp8", "fp8-dynamic", "fp8-cast", "nf4", "bnb-int8"]

_MODEL, _SHOWN, _SAMPLING, _FILES, _COMPUTE = "Model", "What is shown", "Sampling", "Files", "Computing"


@verb(
    _PANEL,
    'finetune generate --adapter runs/run/export --prompt "a red kite at sea"',
    "finetune generate --adapter a:0.8 --adapter b:0.5 --prompts prompts.txt",
    'finetune generate --model 5b-i2v --image boat.png --prompt "it sails away"',
    'finetune generate --adapter runs/run/export --compare 0,0.5,1 --prompt "a red kite at sea"',
    "finetune generate --from videos/000-a-red-kite-at-sea-seed0.mp4 --output again",
)
def generate(
    model: Annotated[str | None, option("Folder, hub id, 5b...; left out: the adapter's own.", "MODEL", _MODEL)] = None,
    revision: Annotated[str | None, option("Branch, tag or commit of a hub id.", "REV", _MODEL)] = None,
    transformer: Annotated[
        Path | None, option("A fully fine-tuned one, from an export; or GGUF.", "PATH", _MODEL)
    ] = None,
    adapter: Annotated[
        list[str], option("A LoRA: file, export, checkpoint or run; give it again for more.", "PATH:STRENGTH", _MODEL)
    ] = [],
    prompt: Annotated[list[str], option("Give it again for more videos.", "TEXT", _SHOWN)] = [],
    prompts: Annotated[
        Path | None, option("Text file with a prompt per line, or .jsonl (docs/inference.md).", "FILE", _SHOWN)
    ] = None,
    image: Annotated[list[Path], option("First frame: one for all --prompt, or one for each.", "FILE", _SHOWN)] = [],
    last_image: Annotated[list[Path], option("Last frame, likewise.", "FILE", _SHOWN)] = [],
    video: Annotated[list[Path], option("Video-to-video: what to start from, likewise.", "FILE", _SHOWN)] = [],
    control: Annotated[
        list[Path], option("Control video (depth, edges, ...) to follow, likewise.", "FILE", _SHOWN)
    ] = [],
    strength: Annotated[float | None, option("Of video-to-video, to 1 (0.8).", "X", _SHOWN)] = None,
    extend: Annotated[int | None, option("Continue each video by so many parts.", "N", _SHOWN)] = None,
    videos: Annotated[int | None, option("Of each prompt (1).", "N", _SHOWN)] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Make this video (its .mp4 or .json) again, but for what else is given.",
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    compare: Annotated[
        str | None, option("In columns: factors of the strengths, such as 0,0.5,1; or a run.", "X,Y|RUN", _SHOWN)
    ] = None,
    negative_prompt: Annotated[str | None, option("What to steer away from.", "TEXT", _SHOWN)] = None,
    enhance: Annotated[
        str | None, option("Language model that makes prompts long first (docs/tools.md).", "MODEL", _SHOWN)
    ] = None,
    endpoint: Annotated[str | None, option("The server that has it.", "URL", _SHOWN)] = None,
    seed: Annotated[
        int | None, option("Of the first video (0); each further one has the next.", "N", _SAMPLING)
    ] = None,
    bucket: Annotated[
        str | None, option("Frames x height x width; left out: as the adapter was trained.", "FxHxW", _SAMPLING)
    ] = None,
    riflex: Annotated[
        int | None, option("Positions for longer videos; 0: none; left out: the adapter's.", "FRAMES", _SAMPLING)
    ] = None,
    steps: Annotated[int | None, option("Denoising steps (50).", "N", _SAMPLING)] = None,
    guidance: Annotated[float | None, option("Classifier-free guidance (6); 1 for none.", "X", _SAMPLING)] = None,
    dynamic_cfg: Annotated[bool, flag("--dynamic-cfg", "Let the guidance grow with the steps.", _SAMPLING)] = False,
    scheduler: Annotated[
        Literal["ddim", "dpm"] | None, option("What takes the steps; left out: the model's own.", None, _SAMPLING)
    ] = None,
    output: Annotated[Path, option("Folder for the videos.", "DIR", _FILES)] = Path("videos"),
    fps: Annotated[float | None, option("Left out: as the adapter was trained.", "X", _FILES)] = None,
    gif: Annotated[bool, flag("--gif", "Write animated GIFs as well.", _FILES)] = False,
    upscale: Annotated[Path | None, option("Enlarge by super-resolution weights.", "FILE", _FILES)] = None,
    interpolate: Annotated[
        str | None, option("minterpolate: twice as many frames per second; minterpolate:4.", "HOW", _FILES)
    ] = None,
    preview: Annotated[Path | None, option("Show videos meanwhile, by taecvx weights.", "FILE", _FILES)] = None,
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"] | None, option("Left out: as the model is stored.", None, _COMPUTE)
    ] = None,
    budget: Annotated[
        str | None, option("GPU memory to keep within; left out: what is free.", "8GiB", _COMPUTE)
    ] = None,
    offload: Annotated[
        Literal["auto", "none", "model", "group", "sequential"],
        option("What waits in host memory; auto: as little as fits.", None, _COMPUTE),
    ] = "auto",
    quantize: Annotated[_Scheme | None, option("The transformer in fewer bits: other videos.", None, _COMPUTE)] = None,
    quantize_text: Annotated[_Scheme | None, option("The same for T5.", None, _COMPUTE)] = None,
    compile: Annotated[bool, flag("--compile", "Compile the transformer's blocks.", _COMPUTE)] = False,
    parallel: Annotated[
        Literal["prompts", "cfg", "context"] | None,
        option("What the processes of `accelerate launch` divide.", None, _COMPUTE),
    ] = None,
    device: Annotated[
        str | None, option("Such as cuda:1 or cpu; left out: a GPU where there is one.", "NAME", _COMPUTE)
    ] = None,
) -> None:
    """Sample videos from a base model with any number of adapters."""
    from finetune.inference.compare import parse_comparison
    from finetune.inference.request import prompts_with_seeds, read_prompts

    seeds = range(seed or 0, 2**62, max(1, videos or 1))
    listed = () if prompts is None else read_prompts(prompts, seeds=seeds)
    files = {"last_images": last_image, "videos": video, "controls": control}
    typed = prompts_with_seeds(prompt, image, **files, seeds=seeds[len(listed) :])
    report = finetune.generate(
        [*listed, *typed],
        output,
        record=source,
        compare=None if compare is None else parse_comparison(compare),
        seed=seed,
        model=model,
        revision=revision,
        transformer=transformer,
        adapters=adapter or None,
        strength=strength,
        extend=extend,
        videos=videos,
        bucket=bucket,
        riflex=riflex,
        fps=fps,
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        dynamic_cfg=dynamic_cfg or None,
        scheduler=scheduler,
        gif=gif or None,
        upscale=upscale,
        interpolate=interpolate,
        preview=preview,
        enhance=enhance,
        endpoint=endpoint,
        dtype=dtype,
        budget=budget,
        offload=offload,
        quantize=quantize,
        quantize_text=quantize_text,
        compile=compile or None,
        parallel=parallel,
        device=device,
    )
    if is_main():  # of the processes of a launch, which all have it
        print(report)


@verb(
    _PANEL,
    "finetune vae roundtrip clip.mp4 --model 5b",
    "finetune vae encode clip.mp4 --model 5b --bucket 49x480x720 --fps 8",
    "finetune vae decode clip.safetensors",
)
def vae(
    action: Annotated[
        Literal["encode", "decode", "roundtrip"],
        typer.Argument(help="A video to a file of latents; such a file to an mp4; both, and what was lost."),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The video, or the file of latents.")],
    model: Annotated[
        str | None, option("Whose VAE: a folder, a hub id or 5b...; decode knows which encoded.", "MODEL")
    ] = None,
    revision: Annotated[str | None, option("Branch, tag or commit of a hub id.", "REV")] = None,
    bucket: Annotated[str | None, option("Frames x height x width; left out: the whole video.", "FxHxW")] = None,
    fps: Annotated[float | None, option("To encode at, or of the decoded file; left out: the video's own.")] = None,
    worst: Annotated[int, option("Frames that roundtrip shows in worst.png.", "N")] = 4,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], option("What to compute in.")] = "bf16",
    device: Device = None,
    output: Annotated[
        Path | None, option("The file, of roundtrip the folder; left out: named like FILE, here.", "PATH")
    ] = None,
) -> None:
    """Take a video through the VAE: to latents, back, or both with PSNR and SSIM of every frame."""
    report = finetune.vae(
        action,
        file,
        output,
        model=model,
        revision=revision,
        bucket=bucket,
        fps=fps,
        worst=worst,
        dtype=dtype,
        device=device,
    )
    print(report)
    if action == "encode":
        print_next("vae", "decode", str(report.files[0]))


@verb(
    _PANEL,
    "finetune invert clip.mp4 --model 5b",
    'finetune invert clip.mp4 --model 5b --source-prompt "a cat on grass" --prompt "a fox on grass"',
    'finetune invert clip.mp4 --model 5b-i2v --image painted.png --prompt "a painted cat" --share 0.5',
)
def invert(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="What is inverted.")],
    model: Annotated[str, option("A folder, a hub id or 5b...", "MODEL")],
    revision: Annotated[str | None, option("Branch, tag or commit of a hub id.", "REV")] = None,
    prompt: Annotated[
        str | None, option("What the edit shows; left out: the video again, and how near it comes.", "TEXT")
    ] = None,
    source_prompt: Annotated[str, option("What the video shows.", "TEXT")] = "",
    negative_prompt: Annotated[str, option("What to steer the edit away from.", "TEXT")] = "",
    image: Annotated[Path | None, option("Another first frame for the edit (image-to-video).", "FILE")] = None,
    adapter: Annotated[list[str], option("A LoRA, as generate takes it.", "PATH:STRENGTH")] = [],
    bucket: Annotated[
        str | None, option("Frames x height x width; left out: the model's, as many frames as there are.", "FxHxW")
    ] = None,
    fps: Annotated[float | None, option("Of what is taken of the video; left out: the model's.")] = None,
    steps: Annotated[int, option("To noise, and back.")] = 50,
    guidance: Annotated[float, option("Classifier-free guidance of the edit; 1 for none.")] = 6.0,
    corrections: Annotated[
        int, option("More calls of the model per step, each of which makes the inversion more exact.", "N")
    ] = 3,
    share: Annotated[float, option("Part of the steps in which the edit looks at the video: 0 to 1.")] = 1.0,
    seed: Annotated[int | None, option("Begin the edit with this noise, not with the inverted one.", "N")] = None,
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], option("What to compute in.")] = "auto",
    device: Device = None,
    output: Annotated[Path | None, option("Folder; left out: named like VIDEO, here.", "DIR")] = None,
) -> None:
    """Find the noise that a model makes a video from, and sample the video again, or an edit of it."""
    print(
        finetune.invert(
            video,
            output,
            model=model,
            revision=revision,
            prompt=prompt,
            source_prompt=source_prompt,
            negative_prompt=negative_prompt,
            image=image,
            adapters=adapter,
            bucket=bucket,
            fps=fps,
            num_inference_steps=steps,
            guidance_scale=guidance,
            corrections=corrections,
            share=share,
            seed=seed,
            dtype=dtype,
            device=device,
        )
    )


Endpoint = Annotated[str | None, option("An OpenAI-compatible server, such as http://localhost:8000/v1.", "URL")]

KeyVariable = Annotated[str, typer.Option("--key-variable", metavar="NAME", help="Holds the server's key.")]

Instruction = Annotated[Path | None, option("What the language model is asked, in place of what ships.", "FILE")]

WRITER = "Qwen/Qwen3-VL-8B-Instruct"


@verb(
    _PANEL,
    'finetune enhance --prompt "a red kite at sea"',
    "finetune enhance --prompts ideas.txt --endpoint http://localhost:8000/v1 --model qwen3 --output prompts.jsonl",
    'finetune enhance --image boat.png --prompt "it sails away" --for 5b-i2v',
)
def enhance(
    prompt: Annotated[list[str], option("A short prompt; give it again for more.", "TEXT")] = [],
    prompts: Annotated[Path | None, option("File of short prompts, as generate takes it.", "FILE")] = None,
    image: Annotated[list[Path], option("First frame: one for all --prompt, or one for each.", "FILE")] = [],
    model: Annotated[
        str, option("Of transformers, or its name at the endpoint; sees images if given.", "MODEL")
    ] = WRITER,
    revision: Annotated[str | None, option("Branch, tag or commit of a hub id.", "REV")] = None,
    endpoint: Endpoint = None,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    timeout: Annotated[float, option("Seconds for one answer of the endpoint.", "S")] = 120.0,
    target: Annotated[
        str, typer.Option("--for", metavar="MODEL", help="The CogVideoX that reads them, which counts tokens.")
    ] = "5b",
    instruction: Instruction = None,
    print_instruction: Annotated[
        bool, flag("--print-instruction", "Print what the model is asked (with --image: then), to be changed.")
    ] = False,
    device: Device = None,
    output: Annotated[
        Path | None, option("Write them as .jsonl for generate --prompts, seeds and images kept.", "FILE")
    ] = None,
) -> int:
    """Turn short prompts into the long ones that CogVideoX was trained on, with a language model."""
    if print_instruction:
        from finetune.captioning.prompts import read_instructions

        shipped = read_instructions(instruction)
        print(shipped.image if image else shipped.text, end="")
        return OK
    from finetune.inference.request import prompts_with_seeds, read_prompts, write_prompts

    listed = () if prompts is None else read_prompts(prompts)
    report = finetune.enhance(
        [*listed, *prompts_with_seeds(prompt, image, seeds=range(len(listed), 2**62))],
        model=model,
        revision=revision,
        endpoint=endpoint,
        key_variable=key_variable,
        timeout_s=timeout,
        target=target,
        instruction=instruction,
        device=device,
    )
    print(report)
    print_notes([f"of prompt {at + 1} the end will not be read: {report.tokens[at]} tokens" for at in report.too_long])
    if output is not None:
        write_prompts(output, report.prompts)
        print_next("generate", "--model", target, "--prompts", str(output))
    print_notes([str(error) for error in report.errors], "error")
    return USER_ERROR if report.errors else OK


@verb(
    _PANEL,
    'finetune story "a lighthouse keeper finds a whale" --model 5b-i2v --painter black-forest-labs/FLUX.1-schnell',
)
def story(
    idea: Annotated[str, typer.Argument(metavar="IDEA", help="In a few words.")],
    model: Annotated[str, option("An image-to-video CogVideoX: a folder, a hub id or 5b-i2v...", "MODEL")],
    painter: Annotated[str, option("A text-to-image pipeline of diffusers: a folder or a hub id.", "MODEL")],
    writer: Annotated[str, option("Of transformers, or its name at the endpoint.", "MODEL")] = WRITER,
    endpoint: Endpoint = None,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    instruction: Instruction = None,
    painter_steps: Annotated[int | None, option("Of the painter; left out: its own default.", "N")] = None,
    adapter: Annotated[list[str], option("A LoRA for the video, as generate takes it.", "PATH:STRENGTH")] = [],
    bucket: Annotated[str | None, option("Frames x height x width; left out: the model's.", "FxHxW")] = None,
    seed: Annotated[int, option("Of the frame and of the video.")] = 0,
    steps: Annotated[int, option("Denoising steps of the video.")] = 50,
    guidance: Annotated[float, option("Classifier-free guidance of the video; 1 for none.")] = 6.0,
    offload: Annotated[bool, flag("--offload", "Keep on the GPU only what is in use; slower.")] = False,
    device: Device = None,
    output: Annotated[Path, option("The story's folder; the same again goes on there.", "DIR")] = Path("story"),
) -> None:
    """Make a video of an idea: its prompt is written, its first frame painted, and the frame animated."""
    print(
        finetune.story(
            idea,
            output,
            model=model,
            painter=painter,
            writer=writer,
            endpoint=endpoint,
            key_variable=key_variable,
            instruction=instruction,
            painter_steps=painter_steps,
            adapters=adapter,
            bucket=bucket,
            seed=seed,
            num_inference_steps=steps,
            guidance_scale=guidance,
            offload=offload,
            device=device,
        )
    )
