"""Where the speech stands in the user's message: one layout for teacher, training and inference."""

from typing import Any

from nemo_mtbi.data.rendering import Message, Spoken
from nemo_mtbi.errors import ConfigError

SPEECH_POSITIONS = ("after", "before")


def user_message(prompt: str, spoken: Spoken | str, speech_position: str) -> Message:
    """The user's turn: prompt and speech on lines of their own.

    Args:
        prompt: the task prompt.
        spoken: the utterance (or the audio tag at inference).
        speech_position: ``after`` or ``before`` the prompt.

    Raises:
        ConfigError: another position.
    """
    if speech_position not in SPEECH_POSITIONS:
        raise ConfigError(f"speech_position={speech_position!r}: use {' or '.join(SPEECH_POSITIONS)}.")
    parts: list[Any] = [prompt.strip(), "\n", spoken]
    if speech_position == "before":
        parts.reverse()
    return {"role": "user", "content": parts}
