"""Records for the tests of the benchmark."""

from nemo_mtbi.tasks.library import load_library

TASKS = load_library()


def record(task, answer, utterance="u", **more):
    return {
        "task": task,
        "prompt": "p",
        "answer": answer,
        "utterance": utterance,
        "transcript": "the cat sat",
        "language": "en",
        **more,
    }
