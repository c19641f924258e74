"""The record of what was trained on: examples and response tokens of each task and prompt."""

from collections import Counter
from typing import Any

from nemo_mtbi.checkpoints.seen_record import EARLIER, TASKS
from nemo_mtbi.data.example import Example
from nemo_mtbi.parallel.ranks import gathered_objects


class SeenRecord:
    """Counts of this rank. After a resume one rank goes on with the sum of all, so the sum over ranks stays right.

    Attributes:
        earlier: tasks and their prompts of what training began with (``init_from``).
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.earlier: dict[str, list[str]] = {}

    def add(self, examples: list[Example], stage: str) -> None:
        """Count a micro-batch of a stage (``alignment`` or ``imitation``)."""
        self.counts["alignment_examples" if stage == "alignment" else "examples"] += len(examples)
        if stage == "alignment":
            return
        for example in examples:
            key = f"{example.task}/{example.prompt_id}"
            self.counts[f"{key}/examples"] += 1
            self.counts[f"{key}/response_tokens"] += len(example.response_ids)

    def over_ranks(self, group: Any) -> Counter[str]:
        """Sum over the data-parallel ranks; all of them call this together."""
        return sum((Counter(part) for part in gathered_objects(dict(self.counts), group)), Counter())

    def manifest(self, group: Any) -> dict[str, Any]:
        """``seen.json``, summed over the data-parallel ranks."""
        counts = self.over_ranks(group)
        tasks: dict[str, dict[str, dict[str, int]]] = {}
        for key, value in counts.items():
            if key.count("/") == 2:
                task, prompt, kind = key.split("/")
                tasks.setdefault(task, {}).setdefault(prompt, {})[kind] = value
        result = {"examples": counts["examples"], "alignment_examples": counts["alignment_examples"], TASKS: tasks}
        return result | ({EARLIER: self.earlier} if self.earlier else {})
