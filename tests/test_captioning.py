"""Captions for a folder of clips: what is asked, what is kept, and what is made of an answer that is none."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from endpoint import said
from tiny_vlm import save_image_model, save_video_model

import finetune
from finetune.captioning import caption, captioners, review
from finetune.captioning.answers import TokenLimit
from finetune.captioning.caption import CaptionOptions, caption_folder
from finetune.captioning.captioners import EndpointCaptioner, LocalCaptioner
from finetune.cli.main import main
from finetune.core.errors import ConfigError, DataError, ModelError
from finetune.datasets.decode_pool import DecodePool

LIMIT = TokenLimit(40, lambda texts: [len(text.split()) for text in texts])


class Scripted:
    """Answers what it is told to, and remembers what it was asked."""

    def __init__(self, *answers, name="scripted"):
        self.name, self.revision = name, "1"
        self.answers = list(answers)
        self.chats = []

    def answer(self, chats, variant):
        self.chats += chats
        answers = [self.answers.pop(0) if self.answers else f"clip {len(self.chats)}, {variant}" for _ in chats]
        if KeyboardInterrupt in answers:
            raise KeyboardInterrupt
        return answers


@pytest.fixture(autouse=True)
def _decode_here(request, monkeypatch):
    """Without processes to decode in, but where a file is broken."""
    if "decode" not in request.node.name:
        monkeypatch.setattr(caption, "DecodePool", lambda workers, in_flight: DecodePool(0, in_flight=in_flight))


@pytest.fixture
def clips(demo_clips, tmp_path):
    """Four clips without captions."""
    folder = tmp_path / "clips"
    shutil.copytree(demo_clips, folder)
    (folder / "metadata.jsonl").unlink()
    return folder


def run(folder, captioner, limit=LIMIT, **options):
    options = CaptionOptions(**{"instruction": "Describe it in {words} words.", "batch": 2, **options})
    return caption_folder(folder, lambda: captioner, limit, options, progress=False)


def refuse():
    raise AssertionError("nothing was to be asked")


def rows(folder):
    return {row["file_name"]: row for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())}


def captions(folder):
    return {name: row.get("caption", row.get("prompt")) for name, row in rows(folder).items()}


# ----------------------------------------------------------------------------------------------------- what is written


def test_clips_are_shown_and_captioned_and_asked_for_once(clips):
    captioner = Scripted()
    report = run(clips, captioner)
    assert (report.written, report.present, report.human) == (4, 0, 0)
    assert sorted(captions(clips).values()) == ["clip 2, 0", "clip 2, 0", "clip 4, 0", "clip 4, 0"]
    chat = captioner.chats[0]
    assert chat.frames.shape == (4, 64, 64, 3) and chat.turns == ("Describe it in 26 words.",)
    assert chat.frames_per_s == pytest.approx(4 / (9 / 8))
    written = (clips / "captions.jsonl").read_text().splitlines()
    assert {json.loads(line)["model"] for line in written} == {"scripted"} and len(written) == 4
    again = caption_folder(clips, refuse, LIMIT, CaptionOptions("Describe it."), progress=False)
    assert (again.written, again.present) == (0, 4)


def test_a_folder_of_text_files_keeps_its_layout(clips):
    first, second, *_ = sorted(clips.glob("*.mp4"))
    first.with_suffix(".txt").write_text("by hand\n")
    report = run(clips, Scripted("one", "two", "three"))
    assert (report.human, report.written) == (1, 3) and not (clips / "metadata.jsonl").exists()
    assert first.with_suffix(".txt").read_text() == "by hand\n" and second.with_suffix(".txt").read_text() == "one\n"


def test_columns_and_peoples_captions_are_kept(clips, demo_clips):
    table = [json.loads(line) for line in (demo_clips / "metadata.jsonl").read_text().splitlines()]
    key = "prompt" if "prompt" in table[0] else "caption"
    table[0] |= {"score": 0.5}
    table[1][key] = ""
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    report = run(clips, Scripted("a boat"))
    assert (report.human, report.written) == (3, 1)
    after = rows(clips)
    assert after[table[0]["file_name"]] == table[0] and after[table[1]["file_name"]] == {**table[1], key: "a boat"}
    # What a person changes afterwards is a person's, also where everything is to be written anew.
    changed = [{**row, key: "mine"} if row[key] == "a boat" else row for row in after.values()]
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert run(clips, Scripted(), replace=True).human == 4


def test_replace_writes_anew_what_another_model_or_instruction_wrote(clips):
    run(clips, Scripted("a", "b", "c", "d"))
    assert run(clips, Scripted("x"), replace=True).written == 0  # the same model and instruction
    assert run(clips, Scripted(name="other"), replace=False).written == 0
    assert run(clips, Scripted("e", "f", "g", "h", name="other"), replace=True).written == 4
    assert sorted(captions(clips).values()) == ["e", "f", "g", "h"]
    assert run(clips, Scripted(), instruction="Say less.", replace=True).written == 4


def test_a_clip_that_became_another_is_captioned_anew(clips):
    run(clips, Scripted("a", "b", "c", "d"))
    first, second, *_ = sorted(clips.glob("*.mp4"))
    shutil.copy(second, first)
    assert run(clips, Scripted("now")).written == 1 and captions(clips)[first.name] == "now"


def test_variants_are_all_written_and_the_first_is_the_caption(clips):
    captioner = Scripted()
    assert run(clips, captioner, variants=3).written == 12 and len(captioner.chats) == 12
    row = next(iter(rows(clips).values()))
    assert len(set(row["captions"])) == 3 and row["caption"] == row["captions"][0]
    assert run(clips, Scripted(), variants=3).written == 0


def test_nothing_answered_is_lost_when_it_ends_early(clips):
    with pytest.raises(KeyboardInterrupt):
        run(clips, Scripted("a", "b", KeyboardInterrupt, "d"))
    assert sorted(captions(clips).values(), key=str) == [None, None, "a", "b"]
    with (clips / "captions.jsonl").open("a") as record:
        record.write('{"file_name": "torn')  # by a power cut
    assert run(clips, Scripted("c", "d")).written == 2
    assert sorted(captions(clips).values()) == ["a", "b", "c", "d"]
    (clips / "metadata.jsonl").unlink()  # what was answered is in the record
    assert run(clips, Scripted()).present == 4 and sorted(captions(clips).values()) == ["a", "b", "c", "d"]


# -------------------------------------------------------------------------------------------- what is made of an answer


def test_a_long_caption_is_asked_for_again_never_cut(clips):
    long, medium, short = ("word " * count for count in (90, 60, 30))
    captioner = Scripted(long, "fine", medium, short, "fine", long, long, medium)
    report = run(clips, captioner)
    texts = captions(clips)
    assert sorted(map(len, texts.values()), key=int) == sorted(
        map(len, ("fine", "fine", short.strip(), medium.strip()))
    )
    assert [len(chat.turns) for chat in captioner.chats] == [1, 1, 3, 3, 1, 1, 3, 3]
    assert captioner.chats[2].turns[1] == long.strip() and "at most 22 words" in captioner.chats[2].turns[2]
    assert report.too_long == [name for name, text in texts.items() if text == medium.strip()]  # and it says so


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('  "A kite\n\n over the sea."  ', "A kite over the sea."),
        ("<think>a kite?\nyes</think> A kite.", "A kite."),
        ("\u201cA kite.\u201d", "A kite."),
    ],
)
def test_an_answer_becomes_one_plain_paragraph(clips, answer, text):
    run(clips, Scripted(*[answer] * 4))
    assert set(captions(clips).values()) == {text}


@pytest.mark.parametrize("answer", ["", " \n", "<think>nothing</think>", "a\ufffdb", "a\x1b[31mb", "x" * 20_000])
def test_an_answer_that_is_no_caption_is_that_clips_error(clips, answer):
    report = run(clips, Scripted(answer, "b", "c", "d"))
    assert (len(report.errors), report.written) == (1, 3) and "no caption" in report.errors[0].what
    assert run(clips, Scripted("a")).written == 1


def test_a_clip_that_cannot_be_decoded_is_named_and_the_others_go_on(clips):
    broken = sorted(clips.glob("*.mp4"))[0]
    broken.write_bytes(broken.read_bytes()[:300])
    report = run(clips, Scripted())
    assert report.written == 3 and report.errors[0].where == broken.name


def test_when_nothing_works_it_stops(clips):
    for number in range(20):
        shutil.copy(sorted(clips.glob("*.mp4"))[0], clips / f"more{number}.mp4")
    with pytest.raises(DataError, match="10 clips in a row"):
        run(clips, Scripted(*[DataError("no", where="x")] * 24))


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metadata.csv": "file_name\n"}, "which is not changed"),
        ({"metadata.jsonl": "{}\n"}, "video"),
        ({"metadata.jsonl": '{"file_name": "../x.mp4"}\n'}, "x.mp4"),
        ({"metadata.jsonl": "[]\n"}, "no JSON object"),
        ({"metadata.jsonl": "{\n"}, "no JSON"),
        ({"captions.jsonl": "{}\n"}, "no record"),
    ],
)
def test_a_folder_that_cannot_be_captioned_is_refused_before_anything_is_asked(clips, content, message):
    for name, text in content.items():
        (clips / name).write_text(text)
    with pytest.raises(DataError, match=message):
        caption_folder(clips, refuse, LIMIT, CaptionOptions("Describe it."), progress=False)


@pytest.mark.parametrize("options", [{"variants": 0}, {"frames": 0}, {"side": 8}, {"batch": 0}, {"instruction": " "}])
def test_options_have_bounds(options):
    with pytest.raises(ConfigError):
        CaptionOptions(**{"instruction": "Describe it.", **options})


# ------------------------------------------------------------------------------------------- a model in this process


@pytest.mark.parametrize("save", [save_image_model, save_video_model], ids=["images", "video"])
def test_a_model_of_transformers_captions(save, clips, tiny_model, tmp_path, monkeypatch, capsys):
    if save is save_video_model:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):
            pytest.skip("processors of videos need a torchvision of torch's own build")
    model = save(tmp_path / "vlm")
    monkeypatch.setattr(captioners, "MAX_NEW_TOKENS", 12)
    words = ["--model", str(model), "--for", str(tiny_model()), "--frames", "2", "--side", "64", "--device", "cpu"]
    assert main(["caption", str(clips), *words, "--variants", "2"]) == 0
    assert "8 captions written" in capsys.readouterr().out
    first, second = next(iter(rows(clips).values()))["captions"]
    assert first and second and first != second
    record = json.loads((clips / "captions.jsonl").read_text().splitlines()[0])
    assert record["model"] == str(model) and record["tokens"] > 0
    assert finetune.caption(clips, model=str(model), target=str(tiny_model()), variants=2).present == 8


def test_a_batch_that_does_not_fit_is_halved(clips, tmp_path, monkeypatch):
    captioner = LocalCaptioner(str(save_image_model(tmp_path / "vlm")), device="cpu")
    generate, sizes = captioner._model.generate, []

    def small(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise MemoryError
        return generate(**inputs)

    monkeypatch.setattr(captioner._model, "generate", small)
    monkeypatch.setattr(captioners, "MAX_NEW_TOKENS", 12)
    assert run(clips, captioner, limit=TokenLimit(10_000, LIMIT.count), batch=4, frames=2).written == 4
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_what_is_no_video_language_model_is_said(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded as a video-language model"):
        LocalCaptioner(str(tmp_path))


# ------------------------------------------------------------------------------------------------------ an endpoint


def kinds(request):
    content = request["messages"][0]["content"]
    return [part["type"] for part in content]


def endpoint(server, **options):
    captioner = EndpointCaptioner(server.url, "some-model", "TEST_KEY", **options)
    captioner._client = captioner._client.with_options(max_retries=0)
    return captioner


def test_an_endpoint_is_shown_the_clip_itself(clips, serve, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-very-secret")
    server = serve(lambda request: said("a kite"))
    report = run(clips, endpoint(server))
    assert report.written == 4 and set(captions(clips).values()) == {"a kite"}
    key, request = server.requests[0]
    assert key == "Bearer sk-very-secret" and kinds(request) == ["video_url", "text"]
    assert request["messages"][0]["content"][0]["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert (request["model"], request["temperature"]) == ("some-model", 0.0)


def test_an_endpoint_that_takes_no_video_gets_pictures(clips, serve):
    server = serve(lambda request: (500, {"error": "no video"}) if "video_url" in kinds(request) else said("a kite"))
    assert run(clips, endpoint(server), batch=1).written == 4
    assert [kinds(request)[0] for _, request in server.requests] == ["video_url", *["image_url"] * 4]
    with_video = run_one = serve(lambda request: (500, {"error": "no video"}))
    assert run(clips, endpoint(with_video, send="video"), replace=True, instruction="Again.").written == 0
    assert run_one.requests and all(kinds(request)[0] == "video_url" for _, request in run_one.requests)


def test_a_large_clip_goes_as_pictures(clips, serve, monkeypatch):
    monkeypatch.setattr(captioners, "MAX_VIDEO_BYTES", 10)
    server = serve(lambda request: said("a kite"))
    run(clips, endpoint(server))
    assert {kinds(request)[0] for _, request in server.requests} == {"image_url"}


@pytest.mark.parametrize(
    "answer",
    [
        (200, "no JSON"),
        (200, {}),
        (200, {"choices": []}),
        (200, {"choices": "many"}),
        (200, {"choices": [{"message": None}]}),
        (200, {"choices": [{"message": {"content": None}}]}),
        (200, {"choices": [{"message": {"content": [1]}}]}),
        (400, {"error": "sk-very-secret is your key"}),
        (503, "busy"),
    ],
)
def test_an_endpoint_that_lies_or_fails_costs_that_clip(clips, serve, monkeypatch, answer):
    monkeypatch.setenv("TEST_KEY", "sk-very-secret")
    turns = iter([answer, *[said("a kite")] * 3])
    report = run(clips, endpoint(serve(lambda request: next(turns)), send="images"), batch=1)
    assert (report.written, len(report.errors)) == (3, 1)
    assert "sk-very-secret" not in str(report)


def test_an_endpoint_that_stalls_is_not_waited_for(clips, serve):
    stop = threading.Event()
    first = threading.Lock()

    def behave(request):
        if first.acquire(blocking=False):
            stop.wait(60)
        return said("a kite")

    report = run(clips, endpoint(serve(behave), timeout_s=0.5), batch=1)
    stop.set()
    assert (report.written, len(report.errors)) == (3, 1) and "in time" in report.errors[0].what


@pytest.mark.parametrize(("status", "message"), [(401, "refuses the key in TEST_KEY"), (404, "no model some-model")])
def test_what_concerns_every_clip_ends_it_at_once(clips, serve, status, message):
    server = serve(lambda request: (status, {"error": "no"}))
    with pytest.raises(ModelError, match=message):
        run(clips, endpoint(server), batch=1)
    assert len(server.requests) == 1


def test_no_endpoint_is_an_error_that_names_it(clips, serve):
    server = serve(lambda request: said("a kite"))
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(ModelError, match="cannot be reached") as error:
        captioner = EndpointCaptioner(url, "m")
        captioner._client = captioner._client.with_options(max_retries=0)
        run(clips, captioner)
    assert error.value.where == url
    with pytest.raises(ConfigError, match="no http address"):
        EndpointCaptioner("localhost", "m")


def test_the_instruction_that_ships_can_be_printed_and_edited(capsys, tmp_path):
    assert main(["caption", "--print-instruction"]) == 0
    text = capsys.readouterr().out
    assert "{words}" in text
    assert main(["caption"]) == 2 and "no folder is named" in capsys.readouterr().err


def test_captions_train(clips, tiny_model, tmp_path):
    run(clips, Scripted())
    from worlds import run_config

    report = finetune.check(run_config(tiny_model(), clips, tmp_path / "run"))
    assert len(report.dataset.clips) == 4


# -------------------------------------------------------------------------------------------------------- the review

HOSTILE = 'a </textarea></script><script>document.title = "x"</script> "kite" & more'


def test_captions_are_read_changed_and_saved_in_a_browser(clips, browser, tmp_path):
    run(clips, Scripted("a kite", "a boat", HOSTILE, *["long " * 50] * 3))
    table = rows(clips)
    table = {name: {**row, "score": 0.5, "captions": [row["caption"], "other"]} for name, row in table.items()}
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.values()))
    before = (clips / "metadata.jsonl").read_text()
    review.write_review(clips, LIMIT, tmp_path / "page.html", progress=False)
    page = browser.new_page()
    noise = []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file:") or noise.append(request.url[:50]))
    page.goto((tmp_path / "page.html").as_uri())
    fields = page.locator("textarea")
    assert [fields.nth(number).input_value() for number in range(4)] == [row["caption"] for row in table.values()]
    assert page.locator(".card", has=page.get_by_text("too long")).count() == 1
    fields.nth(0).fill(' a red "kite"\n ')
    page.locator("#sort").select_option("-tokens")  # cards move; what is saved keeps the order of the file
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "metadata.jsonl"
    saved = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    first, *others = table.values()
    assert saved == [{**first, "caption": 'a red "kite"', "captions": ['a red "kite"', "other"]}, *others]
    assert page.title() == "captions of clips" and not [
        text for text in noise if not text.startswith(("data:", "blob:"))
    ]
    assert (clips / "metadata.jsonl").read_text() == before
    page.close()


def test_a_review_says_what_is_missing_and_who_wrote(clips, tmp_path):
    names = sorted(clip.name for clip in clips.glob("*.mp4"))
    run(clips, Scripted("a kite", "a kite", DataError("no", where="x"), "a boat"))
    table = rows(clips)
    table[names[3]]["caption"] = "by me"
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.values()))
    (clips / names[1]).write_bytes(b"broken")
    review.write_review(clips, LIMIT, tmp_path / "page.html", progress=False)
    html = (tmp_path / "page.html").read_text()
    for part in (
        "4 clips, 1 without a caption",
        ">scripted<",
        ">by hand<",
        ">no caption<",
        "2 clips have this caption",
    ):
        assert part in html
    assert html.count("<b>unreadable</b>") == 1 and html.count("data:image/webp") == 3 * 4
