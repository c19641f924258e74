"""Names that the benchmark's parts share: its columns and its own systems."""

SEEN_PROMPTS, UNSEEN_PROMPTS, UNSEEN_TASKS = COLUMNS = ("seen_prompts", "unseen_prompts", "unseen_tasks")
TOPLINE, CASCADE, NORMALIZED_CASCADE = "text_topline", "cascade", "cascade_normalized"
