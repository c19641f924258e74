"""Where the speech stands in the user's message: one layout for teacher, training and inference."""

from typing import Any

from nemo_mtbi.data.rendering import AudioTag, Message, PromptRenderer, Spoken
from nemo_mtbi.errors import ConfigError

SPEECH_POSITIONS = ("after", "before")
NOTHING_HEARD_ANSWER = "I did not hear any speech."
NOTHING_HEARD = "..."  # what the LLM reads where a recognizer wrote nothing


def user_message(prompt: str, spoken: Spoken | AudioTag | str, speech_position: str) -> Message:
    """The user's turn: prompt and speech on lines of their own; the speech alone without a prompt.

    Args:
        prompt: the task prompt, or nothing.
        spoken: the utterance (at inference the audio tag, for a cascade its transcript).
        speech_position: ``after`` or ``before`` the prompt.

    Raises:
        ConfigError: another position.
    """
    if speech_position not in SPEECH_POSITIONS:
        raise ConfigError(f"speech_position={speech_position!r}: use {' or '.join(SPEECH_POSITIONS)}.")
    parts: list[Any] = [prompt.strip(), "\n", spoken] if prompt.strip() else [spoken]
    if speech_position == "before":
        parts.reverse()
    return {"role": "user", "content": parts}


def require_same_rendering(renderer: PromptRenderer, audio_tag: str, speech_position: str) -> None:
    """Check that training and inference give the LLM the same text around the speech.

    Training replaces the tokens of the transcript; inference knows no transcript and tokenizes an audio tag in its
    place. A tokenizer that merges the text before the speech differently in the two cases would make them differ.

    Raises:
        ConfigError: they differ, with this prompt format and speech position.
    """
    prompt = "Repeat this."
    rendered = renderer.render([user_message(prompt, Spoken("Some words."), speech_position)])
    words = rendered.spoken[0]
    training = [rendered.ids[: words[0].token_begin], rendered.ids[words[-1].token_end :]]
    tagged = renderer.render([user_message(prompt, AudioTag(audio_tag), speech_position)])
    place = tagged.tags[0]
    if [tagged.ids[:place], tagged.ids[place + 1 :]] != training:
        raise ConfigError(
            f"With speech_position={speech_position} and this prompt_format, the tokenizer renders the text "
            f"around the speech "
            "differently in training and at inference. Use the other speech_position or another prompt_format."
        )
