"""The task library and its templates."""

import pytest

from nemo_mtbi import registration as registration
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.tasks.library import FORMS, load_library, load_task, render_template, select_tasks

pytestmark = pytest.mark.unit
TASK = "name: t\ngroup: train\nprompts: {seen: [{id: a, text: b}]}\n"


def test_the_shipped_library_is_complete():
    library = load_library()
    assert len([t for t in library.values() if t.group == "train"]) >= 12
    assert len([t for t in library.values() if t.group == "held_out"]) >= 5
    ids = [p.id for t in library.values() for p in t.prompts]
    texts = [p.text for t in library.values() for p in t.prompts]
    assert len(ids) == len(set(ids)) and len(texts) == len(set(texts))
    for task in (t for t in library.values() if t.group != "control"):
        assert len(task.select("seen")) >= 7 and len(task.select("held_out")) >= 3, task.name
        assert task.form["kind"] in FORMS
    assert "no_instruction" not in [t.name for t in select_tasks(library, None)]  # drawn only by name
    assert any(p.language == "de" for p in library["repeat"].prompts)


@pytest.mark.parametrize("template", ["{{ missing }}", "{{ ''.__class__.__mro__ }}", "{% if %}"])
def test_templates_are_sandboxed_and_strict(template):
    with pytest.raises(ConfigError, match="Prompt template"):
        render_template(template, {"known": "x"})


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: other\ngroup: train\nprompts: {seen: [{id: a, text: b}]}", "name must be"),
        ("name: t\ngroup: train\nprompts: {}", "there must be prompts"),
        ("name: t\ngroup: train\nprompts: {seen: [{id: a}]}", "KeyError"),
        ("name: t\ngroup: train\nprompts: {seen: [{id: a, lang: de, text: b}]}", "a prompt has no 'lang'"),
        (
            "name: t\ngroup: train\nprompts: {seen: [{id: a, text: '{{ wie }}'}]}",
            r"Task file .*t\.yaml: Prompt template",
        ),
        (f"{TASK}form: {{kind: language}}", "form language needs a value"),
        (f"{TASK}form: {{kind: language, value: '{{{{ x }}}}'}}", r"t\.yaml: Prompt template"),
        (f"{TASK}form: {{kind: list, min_items: zwei}}", "form.min_items is 'zwei'"),
        (f"{TASK}form: {{kind: list, value: 3}}", "form list has no 'value'"),
        ("name: t\ngroup: train\ncolour: red\nprompts: {seen: [{id: a, text: b}]}", "colour"),
        ("name: [", "Error"),
        (f"{TASK}choices: [yes, no]", r"choices is \[True, False\].*in quotes"),
        (f"{TASK}choices: happy, sad", "give a list of strings"),
        (f"{TASK}needs: gender", "needs is 'gender'"),
        (f"{TASK}variables: {{style: in one word}}", "variables.style is 'in one word'"),
        (f"{TASK}variables: {{style: []}}", "variables.style is empty"),
        (f"{TASK}variables: [style]", "no mapping"),
        (f"{TASK}max_new_tokens: 0", "at least 1"),
        (f'{TASK}max_new_tokens: "8"', "whole number"),
        (f"{TASK}utterances: two", "whole number"),
        (f"{TASK}form: choice", "AttributeError|mapping with kind"),
        (f"{TASK}form: {{kind: max_words}}", "needs a value"),
        (f"{TASK}form: {{kind: choice}}", "needs choices"),
        ("name: t\ngroup: train\nprompts: {heldout: [{id: a, text: b}]}", "no split 'heldout'"),
        ("name: t\ngroup: train\nprompts: {seen: [{id: 5, text: b}]}", "prompt 5: id is 5"),
        ("name: t\ngroup: train\nprompts: {seen: [{id: a, text: b, language: no}]}", "language is False"),
        ("name: t\ngroup: train\nprompts: {seen: [{id: a, text: b}], held_out: [{id: a, text: c}]}", "there twice"),
    ],
)
def test_bad_task_files_name_the_file(tmp_path, text, message):
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_task(file)
    assert str(file) in str(error.value)


def test_unknown_tasks_are_refused():
    with pytest.raises(ConfigError, match=r"Unknown task sing.*repeat"):
        select_tasks(load_library(), ["sing"])


def test_ids_and_encodings_of_task_files(tmp_path):
    (tmp_path / "t.yaml").write_bytes("name: t\ngroup: train\nprompts: {seen: [{id: a, text: für}]}".encode("latin-1"))
    with pytest.raises(ConfigError, match="UnicodeDecodeError"):
        load_task(tmp_path / "t.yaml")
    (tmp_path / "t.yaml").write_text(TASK.replace("id: a", "id: repeat-01"))
    with pytest.raises(ConfigError, match="'repeat-01' is that of the tasks repeat and t"):
        load_library([tmp_path])
