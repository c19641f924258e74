"""The web page (Gradio): speech in, the streamed answer out.

Beside it the text LLM on the transcript, and the cascade.
"""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI

from nemo_mtbi.data.audio_stream import AudioBlocks, gaps_of, open_audio, seconds_of
from nemo_mtbi.data.messages import NOTHING_HEARD
from nemo_mtbi.errors import ConfigError, DataError, MTBIError
from nemo_mtbi.evaluation.asr import RATE, WhisperASR
from nemo_mtbi.models.generation import SpeechLLM
from nemo_mtbi.serving.batching import Batcher
from nemo_mtbi.serving.limits import Limits
from nemo_mtbi.serving.request import Listening, Piece, Request
from nemo_mtbi.serving.sampling import Sampling
from nemo_mtbi.tasks.library import load_library

EXAMPLES = sorted(str(f) for f in (Path(__file__).parent / "examples").glob("*.flac"))  # synthesized with SVOX Pico
SILENCE_PEAK = 1e-3  # of full scale: -60 dBFS
QUIET = "The recording is silent, so this answer is about nothing. Is the microphone on?"

KEPT_UPLOADS = (3600, 3600)  # seconds between two looks at uploads and recordings, and after which they go


class Page:
    """What the page's buttons do.

    Args:
        model: the speech LLM.
        batcher: answers the questions; its bounded queue is shared with the endpoint.
        limits: of one question.
        asr: transcribes for the cascade; None leaves the cascade out.
    """

    def __init__(self, model: SpeechLLM, batcher: Batcher, limits: Limits, asr: WhisperASR | None) -> None:
        self.model, self.batcher, self.limits, self.asr = model, batcher, limits, asr

    def speech(self, audio: str | None, prompt: str, max_tokens: float) -> Iterator[tuple[str, str]]:
        """-> the answer so far, and a remark."""
        opened = self._open(audio)
        seconds = seconds_of(opened, self.model.sampling_rate)
        quiet = isinstance(opened, list) and np.abs(opened[0]).max() < SILENCE_PEAK
        remark = QUIET if quiet else f"{seconds:.1f} s"
        for text, heard in self._answer([self.model.user_turn(self._question(prompt))], [opened], max_tokens):
            gaps = "".join(f"; cannot be read from {gap}" for gap in gaps_of(opened))
            yield text, (remark if heard is None else f"{heard:.0%} of {remark} heard") + gaps

    def text(self, transcript: str, prompt: str, max_tokens: float) -> Iterator[str]:
        """What the text LLM says to the transcript that was typed in."""
        if not transcript.strip():
            raise gr.Error("Type what was said.")
        self._check_length(transcript)
        for text, _ in self._answer([self._written(transcript, prompt)], [], max_tokens):
            yield text

    def cascade(self, audio: str | None, prompt: str, max_tokens: float) -> Iterator[tuple[str, str]]:
        """-> the ASR's transcript, and the text LLM's answer to it so far."""
        assert self.asr is not None
        try:
            samples = np.concatenate(list(self._open(audio, RATE)))
        except DataError as error:  # of long audio, which is read as it is needed
            raise gr.Error(str(error)) from error
        heard = self.asr.transcripts([samples])[0]
        yield heard, ""
        for text, _ in self._answer([self._written(heard or NOTHING_HEARD, prompt)], [], max_tokens):
            yield heard, text

    def _written(self, transcript: str, prompt: str) -> dict[str, Any]:
        return self.model.text_turn(self._question(prompt), transcript)

    def _question(self, prompt: str) -> str:
        if not prompt or not prompt.strip():
            raise gr.Error("Choose or write a prompt.")
        self._check_length(prompt)
        return prompt

    def _check_length(self, text: str) -> None:
        if len(text) > self.limits.max_text_characters:
            raise gr.Error(f"{len(text):,} characters; the limit here is {self.limits.max_text_characters:,}.")

    def _open(self, audio: str | None, rate: int | None = None) -> AudioBlocks:
        if not audio:
            raise gr.Error("Record or upload speech first.")
        try:
            opened = open_audio(audio, rate or self.model.sampling_rate, longest=self.limits.max_audio_seconds)
        except MTBIError as error:
            raise gr.Error(str(error).replace(str(audio), "The file")) from error
        seconds = seconds_of(opened, rate or self.model.sampling_rate)
        if seconds > self.limits.max_audio_seconds:
            raise gr.Error(f"{seconds:.0f} s of audio; the limit here is {self.limits.max_audio_seconds:.0f} s.")
        return opened

    def _answer(
        self, dialog: list[dict[str, Any]], audios: list[Any], max_tokens: float
    ) -> Iterator[tuple[str, float | None]]:
        """The answer so far, and the share of long audio that is heard before it begins; None afterwards."""
        events: queue.Queue[Any] = queue.Queue()
        limit = min(int(max_tokens), self.limits.max_tokens)
        request = Request(dialog, audios, limit, events.put, events.put, Sampling(text_llm=not audios))
        try:
            self.batcher.submit(request)
        except MTBIError as error:
            raise gr.Error(str(error)) from error
        text = ""
        try:
            while isinstance(event := events.get(), Piece | Listening):
                if isinstance(event, Listening):
                    yield "", event.share
                else:
                    text += event.text
                    yield text, None
            if isinstance(event, Exception):
                raise gr.Error(f"The model failed: {event}")
            yield text + (" ..." if event == "length" else ""), None
        finally:
            request.cancel()


def mount_page(
    app: FastAPI, model: SpeechLLM, batcher: Batcher, limits: Limits, asr: str | None, examples: list[str]
) -> FastAPI:
    """The endpoint's app with the page at ``/``.

    Args:
        asr: Whisper model of the cascade; None: no cascade.
        examples: audio files to choose from.

    Raises:
        ConfigError: an example does not exist; the ASR is no Whisper.
    """
    absent = [e for e in examples if not Path(e).is_file()]
    if absent:
        raise ConfigError(f"examples: there is no file {absent[0]}.")
    recognizer = WhisperASR(asr) if asr else None
    blocks = build(Page(model, batcher, limits, recognizer), examples)
    blocks.has_launched = True  # else Gradio opens any file of this machine that a request names
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        allowed_paths=[str(Path(e).resolve()) for e in examples],  # the files, and nothing beside them
        max_file_size=limits.max_body_bytes,
    )


def build(page: Page, examples: list[str]) -> gr.Blocks:
    """The page itself."""
    prompts = [
        p.text
        for task in load_library().values()
        for p in task.prompts
        if p.language == "en" and "{{" not in p.text and p.text.strip()
    ]
    most = page.limits.max_tokens
    with gr.Blocks(title="Speech LLM", analytics_enabled=False, delete_cache=KEPT_UPLOADS) as blocks:
        gr.Markdown("# Ask about speech")
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(
                    sources=["upload", "microphone"], type="filepath", label="Speech", buttons=["download"]
                )
                if examples:
                    gr.Examples([[e] for e in examples], [audio], label="Examples")
                prompt = gr.Dropdown(
                    prompts, value=prompts[0], allow_custom_value=True, label="Prompt (choose one or write your own)"
                )
                length = gr.Slider(1, most, min(128, most), step=1, label="Longest answer, tokens")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                remark = gr.Markdown()
            with gr.Column():
                answer = gr.Textbox(label="Speech LLM", lines=5, elem_id="answer", buttons=["copy"])
                if page.asr is not None:
                    heard = gr.Textbox(label="Cascade: what the ASR heard", lines=1)
                    cascaded = gr.Textbox(label="Cascade: the text LLM's answer to that", lines=3, elem_id="cascade")
                transcript = gr.Textbox(label="Text LLM: type what was said", lines=2, elem_id="transcript")
                compare = gr.Button("Ask the text LLM", elem_id="compare")
                written = gr.Textbox(label="Text LLM's answer", lines=3, elem_id="written")
        asked = ask.click(page.speech, [audio, prompt, length], [answer, remark], concurrency_limit=8, api_name="ask")
        if page.asr is not None:
            asked.then(
                page.cascade, [audio, prompt, length], [heard, cascaded], concurrency_limit=1, api_visibility="private"
            )
        compare.click(page.text, [transcript, prompt, length], [written], concurrency_limit=8, api_visibility="private")
    return blocks.queue(max_size=64)
