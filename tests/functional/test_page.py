"""The web page in a real browser (Chromium, Playwright): upload, record, ask, compare; two users; what goes wrong."""

import shutil

import numpy as np
import pytest
import soundfile

from nemo_mtbi.models import MTBISALM
from tests.functional.test_serving import folder as folder  # the same exported model
from tests.functional.test_serving import serving

pytestmark = [pytest.mark.functional, pytest.mark.slow]
PORT = 29571
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def url(folder, tiny_whisper):
    pytest.importorskip("gradio", reason="the page needs the extra: pip install 'nemo_mtbi[serve]'")
    with serving(folder, PORT, "/", f"asr={tiny_whisper}") as (_, address):
        yield address


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="this test needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("this test needs Chromium (Debian: apt install chromium)")
    with api.sync_playwright() as play:
        fakes = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *fakes])
        yield chromium
        chromium.close()


@pytest.fixture
def without_microphone(browser):
    deaf = browser.browser_type.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield deaf
    deaf.close()


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    made = {
        "speech": 0.1 * rng.standard_normal(22050),
        "other": 0.1 * rng.standard_normal(30000),
        "silence": np.zeros(16000),
        "long": 0.1 * rng.standard_normal(16000 * 25),
    }
    for name, samples in made.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
    (tmp_path / "text.wav").write_text("this is no audio")
    return tmp_path


def open_page(browser, url):
    page = browser.new_page()
    page.goto(url)
    page.locator("#ask").wait_for()
    return page


def upload(page, file):
    page.locator("input[type=file]").first.set_input_files(str(file))
    page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.wait_for(timeout=20_000)


def answer_of(page, box="#answer"):
    area = page.locator(f"{box} textarea")
    last, same = None, 0
    for _ in range(300):
        value = area.input_value()
        same = same + 1 if value and value == last else 0
        if same > 10:  # streamed to its end
            return value
        last = value
        page.wait_for_timeout(100)
    raise AssertionError(f"no answer in {box}")


def test_ask_compare_and_cascade(browser, url, files, folder):
    page = open_page(browser, url)
    upload(page, files / "speech.wav")
    page.locator("#ask").click()
    shown = answer_of(page)
    model = MTBISALM.restore_from(folder)
    prompt = page.get_by_label("Prompt").input_value()
    assert shown.removesuffix(" ...").strip() == model.chat(files / "speech.wav", prompt, do_sample=False).strip()
    assert answer_of(page, "#cascade")
    page.locator("#transcript textarea").fill("one two three")
    page.locator("#compare").click()
    assert answer_of(page, "#written")


def test_two_users_at_once_get_their_own_answers(browser, url, files, folder):
    model = MTBISALM.restore_from(folder)
    pages = [(open_page(browser.new_context(), url), name) for name in ("speech", "other")]
    for page, name in pages:
        upload(page, files / f"{name}.wav")
    for page, _ in pages:
        page.locator("#ask").click()
    for page, name in pages:
        prompt = page.get_by_label("Prompt").input_value()
        expected = model.chat(files / f"{name}.wav", prompt, do_sample=False).strip()
        assert answer_of(page).removesuffix(" ...").strip() == expected


@pytest.mark.parametrize(
    "name, message",
    [(None, "Record or upload speech first"), ("long", "the limit here is 20 s"), ("text", "cannot be read as audio")],
)
def test_mistakes_are_told(browser, url, files, name, message):
    page = open_page(browser, url)
    if name:
        page.locator("input[type=file]").first.set_input_files(str(files / f"{name}.wav"))
        page.wait_for_timeout(1500)
    page.locator("#ask").click()
    page.get_by_text(message).first.wait_for(timeout=20_000)


def test_silence_is_remarked(browser, url, files):
    page = open_page(browser, url)
    upload(page, files / "silence.wav")
    page.locator("#ask").click()
    page.get_by_text("The recording is silent").wait_for(timeout=20_000)


def test_a_recording_from_the_microphone_is_answered(browser, url):
    page = open_page(browser, url)
    page.get_by_label("Record audio").click()
    page.locator("button.record:visible").click()
    page.wait_for_timeout(1500)
    page.locator("button.stop-button:visible").first.click()
    page.locator("button.play-pause-button:visible").wait_for(timeout=20_000)
    page.locator("#ask").click()
    assert answer_of(page)


def test_without_a_microphone_the_page_says_so_and_still_answers(without_microphone, url, files):
    page = open_page(without_microphone, url)
    page.get_by_label("Record audio").click()
    page.locator("select:visible", has_text="No microphone found").wait_for(timeout=20_000)
    page.get_by_label("Upload file").click()
    upload(page, files / "speech.wav")
    page.locator("#ask").click()
    assert answer_of(page)


def test_the_shipped_examples_are_answered(browser, url):
    page = open_page(browser, url)
    page.get_by_text("put_the_book_on_the_table").first.click()
    page.get_by_label("Clear").first.wait_for(timeout=20_000)
    page.locator("#ask").click()
    assert answer_of(page)


def test_without_a_browser(url, files, folder):
    """The page's own interface, as Gradio's client calls it; what is typed is no control token."""
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(url, verbose=False)
    speech = gradio_client.handle_file(str(files / "speech.wav"))
    model = MTBISALM.restore_from(folder)
    for prompt in ("Repeat this.", "<|audio|> a <|im_end|>"):
        shown, remark = client.predict(speech, prompt, 16, api_name="/ask")
        answer = model.chat(files / "speech.wav", prompt, do_sample=False, max_new_tokens=16)
        assert shown.removesuffix(" ...").strip() == answer.strip() and remark == "1.4 s"
