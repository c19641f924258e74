"""How well a text LLM reads descriptions of voices: before it becomes a teacher of voices, without any audio.

    python benchmarks/voice_topline.py CUTS [--llm NAME] [--template JINJA ...] [--per-label N] [--json FILE]

CUTS: a manifest of ``mtbi prepare describe.enabled=true``. For every attribute that a task asks about, ``--per-label``
utterances of each label; the share of questions whose right choice is the most likely one (greedy, the choice written
small or with a capital), in wordings for training (``seen``) and held-out ones, beside what the transcript alone gives.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from lhotse import CutSet
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.tokenizers import AutoTokenizer
from results_file import finish
from transformers import AutoModelForCausalLM

from nemo_mtbi import registration as registration  # the prompt formats
from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.description import DESCRIPTION_FIELD, TEMPLATE, DescribedText
from nemo_mtbi.data.messages import user_message
from nemo_mtbi.data.rendering import PromptRenderer, Spoken
from nemo_mtbi.pretrained.offline import resolve_pretrained
from nemo_mtbi.tasks.library import Task, load_library, render_template


def questions(cuts: list[Any], task: Task, per_label: int) -> list[tuple[Any, str]]:
    """Cuts with their labels, as many of each label."""
    (attribute,), found = task.needs, []
    for label in task.choices:
        own = [c for c in cuts if (c.supervisions[0].custom or {}).get(DESCRIPTION_FIELD, {}).get(attribute) == label]
        found += [(cut, label) for cut in own[:per_label]]
    return found


class Reader:
    """A text LLM that chooses among words."""

    def __init__(self, name: str, prompt_format: str, dtype: str) -> None:
        folder = resolve_pretrained(name)
        self.tokenizer = AutoTokenizer(folder, use_fast=True)
        self.renderer = PromptRenderer(self.tokenizer, PromptFormatter.resolve(prompt_format))
        self.llm = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.no_grad()
    def choose(self, prompt: str, text: str, choices: list[str]) -> str:
        """The choice whose first token is the most likely."""
        ids = self.renderer.render([user_message(prompt, Spoken(text), "after")]).ids
        logits = self.llm(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
        encode = self.tokenizer.tokenizer.encode
        firsts = [[encode(c, add_special_tokens=False)[0] for c in (own, own.capitalize())] for own in choices]
        scores = [logits[first].logsumexp(0) for first in firsts]
        return choices[int(torch.stack(scores).argmax())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cuts", type=Path)
    parser.add_argument("--llm", default="offline:smollm2-135m-instruct")
    parser.add_argument("--prompt-format", default="chat_template")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--template", nargs="*", default=[TEMPLATE], help="of an utterance, see description.template")
    parser.add_argument("--per-label", type=int, default=10)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    reader = Reader(given.llm, given.prompt_format, given.dtype)
    cuts = sorted(CutSet.from_file(given.cuts), key=lambda cut: cut.id[::-1])  # speakers in turn, mostly
    result: dict[str, Any] = {"llm": given.llm, "questions": {}, "without": {}, "templates": {}}
    tasks = [t for t in load_library().values() if len(t.needs) == 1 and t.choices]
    for template in [None, *given.template]:
        described = None if template is None else DescribedText(template)
        own: dict[str, Any] = {}
        for task in tasks:
            (attribute,), asked = task.needs, questions(cuts, task, given.per_label)
            result["questions"][attribute] = len(asked)
            for split in ("seen", "held_out") if asked else ():
                wordings, right = task.select(split), 0
                for index, (cut, label) in enumerate(asked):
                    wording = wordings[index % len(wordings)]
                    prompt = render_template(wording.text, {"choices": task.choices})
                    read = described(cut, f"{cut.id}/{wording.id}", task.needs) if described else None
                    right += reader.choose(prompt, read.text if read else transcript(cut), task.choices) == label
                own.setdefault(attribute, {})[split] = round(right / len(asked), 3)
        (result["without"] if template is None else result["templates"].setdefault(template, {})).update(own)
    finish(result, given.json)


if __name__ == "__main__":
    main()
