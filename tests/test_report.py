"""The report: values on the page equal the evaluations, charts and pictures are drawn, the page needs no network."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import packed_checkpoint
from matplotlib.image import imread

from gptq_belle import Calibration, QuantConfig, quantize_checkpoint
from gptq_belle.bench.footprint import Footprint
from gptq_belle.common import plots
from gptq_belle.evaluation import report_charts, report_results
from gptq_belle.evaluation.report_models import read_models
from gptq_belle.evaluation.report_results import EvaluationOptions, ModelResults

TEXT = "北京是中国的首都,有三千多年的历史。The quick brown fox jumps over the lazy dog. " * 4
TEST = [{"class": "math", "question": "1+1?", "std_answer": "2"},
        {"class": "open qa", "question": "北京在哪里?", "std_answer": "在中国。"},
        {"class": "<b>", "question": "写一首诗。", "std_answer": ""}]


@pytest.fixture(scope="module")
def models(tiny_llama, tmp_path_factory):
    """The base, two quantized models with records, and one without a record."""
    folder = tmp_path_factory.mktemp("reporting")
    made = {}
    for bits in (8, 4):
        made[bits] = folder / f"bits-{bits}"
        quantize_checkpoint(tiny_llama, made[bits], QuantConfig(bits=bits, group_size=32), device="cpu",
                            calibration=Calibration(rows=4, seq_len=64, allow_short=True))
    return tiny_llama, made[8], made[4], packed_checkpoint(tiny_llama, folder / "other")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, TEST)), encoding="utf-8")
    return ("--text", folder / "text.txt", "--test", folder / "test.jsonl", "--window", 64, "--max-tokens", 6)


@pytest.fixture(autouse=True)
def _footprints(request, monkeypatch):
    """Only one test measures memory, because each new process takes some seconds."""
    if "real_footprints" not in request.fixturenames:
        monkeypatch.setattr(report_results.footprint, "measure_in_new_process",
                            lambda path, **_: Footprint(0.1, 10**6, 2 * 10**6, None, None))


@pytest.fixture
def real_footprints():
    """A test with this fixture measures memory."""


class Page(HTMLParser):
    """Tags, their links, and the text of a page in one language."""

    def __init__(self, path, language="en"):
        super().__init__()
        self.tags, self.links, self.words, self.hidden = [], [], [], 0
        self.other = {"en": "zh", "zh": "en"}[language]
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action", "poster")]
        if tag == "span" and ("lang", self.other) in attrs:
            self.hidden += 1

    def handle_endtag(self, tag):
        self.hidden -= tag == "span" and self.hidden > 0

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)


def test_a_whole_report(belle, models, inputs, tmp_path, real_footprints):
    base, eight, four, _ = models
    code, out, _ = belle("report", eight, four, "--base", base, *inputs, "--out", tmp_path, "--json")
    assert code == 0
    found = json.loads(out)
    assert [row["path"] for row in found["models"]] == [str(base), str(eight), str(four)]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    names = {"errors-1", "errors-2", "kl", "classes", "size"}
    assert set(found["pictures"]) == names == {path.stem for path in tmp_path.glob("*.png")}
    assert set(re.findall(r'<figure class="\w+" id="([\w-]+)">', page)) == {
        "errors-0", "errors-1", "kl", "classes", "agreement", "size", "memory"}
    assert not re.search(rf"{eight.parent}|{base.parent}|{inputs[1].parent}", page)
    for name in names:
        image = imread(tmp_path / f"{name}.png")[..., :3]
        assert min(image.shape[:2]) > 200
        assert image.std() > 0.05  # something is drawn
    text = Page(tmp_path / "report.html").text
    assert all(10**5 < row["footprint"]["peak_bytes"] < 10**9 for row in found["models"])
    for row in found["models"][1:]:
        kl = row["text"]["divergence"]
        assert f"{kl['kl_mean']:.6f} ± {kl['kl_error']:.6f}" in text
        assert f"{row['test']['total']['agreement']:.1f}" in text
        assert sum(row["text"]["histogram"]) == kl["tokens"]
    record = json.loads((four / "quantization_report.json").read_text())
    assert record["calibration"]["sha256"] in text
    assert f"{record['linears'][0]['error']:.2e}" in text
    assert record["calibration"]["seen"] not in page


def test_eval_commands_give_the_same_results(belle, models, inputs, tmp_path):
    base, _, four, _ = models
    _, out, _ = belle("report", four, "--base", base, *inputs, "--out", tmp_path, "--json")
    of_report = json.loads(out)["models"][1]
    text, test = inputs[:2], inputs[2:4]
    _, out, _ = belle("eval", "kl", four, "--base", base, *text, "--window", 64, "--json")
    assert json.loads(out) == of_report["text"]["divergence"]
    _, out, _ = belle("eval", "ppl", four, *text, "--window", 64, "--json")
    assert json.loads(out)["per_byte"] == pytest.approx(of_report["text"]["perplexity"]["per_byte"], rel=1e-9)
    _, out, _ = belle("eval", "belle", four, "--base", base, *test, "--max-tokens", 6, "--json")
    assert json.loads(out)["figures"] == of_report["test"]["figures"]


def test_page_has_no_links_and_escapes_its_content(belle, models, inputs, tmp_path):
    base, _, four, _ = models
    assert belle("report", four, "--base", base, *inputs, "--out", tmp_path)[0] == 0
    page = Page(tmp_path / "report.html")
    assert not page.links
    assert not {"link", "iframe", "b", "object", "img"} & set(page.tags)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(", text)


def test_both_languages_have_every_text(belle, models, tmp_path):
    belle("report", models[2], "--out", tmp_path)
    english, chinese = (Page(tmp_path / "report.html", language).text for language in ("en", "zh"))
    for english_words, chinese_words in (("Error by layer and linear", "各层各线性层的误差"),
                                         ("bits per weight", "每个权重的位数"), ("packed weights", "打包权重")):
        assert english_words in english
        assert chinese_words in chinese
    assert not re.search("[\u4e00-\u9fff]", english.replace("中文", ""))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count('<span lang="en">') == text.count('<span lang="zh">') > 10


def test_missing_sections_name_the_command_to_run(belle, models, tmp_path):
    code, _, _ = belle("report", models[2], models[3], "--out", tmp_path)
    assert code == 0
    text = Page(tmp_path / "report.html").text
    assert f"gptq-belle report {models[2].name} {models[3].name} --base MODEL --text FILE" in text
    assert "--test FILE" in text
    assert {path.stem for path in tmp_path.glob("*.png")} == {"errors-0", "size"}


def test_text_without_a_base_gives_perplexity_only(belle, models, inputs, tmp_path):
    code, out, _ = belle("report", models[3], *inputs, "--out", tmp_path, "--json")
    (row,) = json.loads(out)["models"]
    assert code == 0
    assert f"{row['text']['perplexity']['perplexity']:.4f}" in Page(tmp_path / "report.html").text
    assert row["test"]["total"]["agreement"] is None
    assert {path.stem for path in tmp_path.glob("*.png")} == {"classes", "size"}


def test_valid_results_are_not_computed_again(belle, models, inputs, tmp_path, monkeypatch):
    from gptq_belle.cli import options

    loaded, load = [], options.load_model
    monkeypatch.setattr(options, "load_model", lambda path, *rest: loaded.append(path) or load(path, *rest))
    base, eight, four, _ = models
    args = ("--base", base, *inputs, "--out", tmp_path, "--json")
    first = json.loads(belle("report", four, *args)[1])
    assert loaded == [base, four, base, four]
    loaded.clear()
    again = json.loads(belle("report", eight, four, *args)[1])
    assert loaded == [base, eight, eight]
    assert again["models"][2] == first["models"][1]
    loaded.clear()
    (tmp_path / "evaluations.json").write_text("{")
    assert belle("report", four, *args)[0] == 0
    assert len(loaded) == 4


def test_model_card_shows_table_and_picture(belle, models, inputs, tmp_path):
    base, _, four, _ = models
    path = tmp_path / "model"
    shutil.copytree(four, path)
    before = (path / "README.md").read_text(encoding="utf-8")
    for _ in range(2):
        assert belle("report", path, "--base", base, *inputs)[0] == 0
        card = (path / "README.md").read_text(encoding="utf-8")
        start, end = card.index("<!-- results -->"), card.index("<!-- end of results -->")
        assert card.count("## Quality") == 1
        assert card[:start] + card[end:].removeprefix("<!-- end of results -->\n\n") == before
        (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", card)
        assert (path / picture).is_file()
        assert (path / "report" / "report.html").is_file()
        assert "| KL to full precision |" in card
    assert belle("inspect", path)[0] == 0


def test_overlapping_text_is_rejected(belle, models, tmp_path):
    from gptq_belle.quantization.calibration.data_files import read_documents

    turns = [document for document in read_documents("builtin").documents if not isinstance(document, str)]
    rows = [{"class": "a", "question": turn.question, "std_answer": turn.answer} for turn, *_ in turns]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code, _, err = belle("report", models[1], models[2], "--test", tmp_path / "test.jsonl", "--out", tmp_path / "out")
    assert code == 4
    assert all(str(named) in err for named in (len(turns), tmp_path / "test.jsonl", models[1]))


def test_records_of_other_versions_are_shown_unchanged(models, tmp_path):
    """Unknown keys become columns and tables; unreadable rows are ignored."""
    from gptq_belle.evaluation.report import render_page

    path = tmp_path / "model"
    shutil.copytree(models[2], path)
    record = json.loads((path / "quantization_report.json").read_text())
    record["linears"][0]["kind"] = "refit"
    record["choices"] = [{"block": 0, "winner": "plain", "held_out": 0.25}, {"block": 1, "winner": "best"}]
    record["linears"].append({"name": "odd"})
    del record["versions"]
    (path / "quantization_report.json").write_text(json.dumps(record))
    shown = read_models({path: ModelResults()}, None)
    page = render_page(shown, EvaluationOptions(), None)
    assert "refit" in page
    assert "model: choices" in page
    assert "0.25" in page


def test_names_without_a_font_become_question_marks(monkeypatch):
    monkeypatch.setattr(plots, "chinese_fonts", list)
    assert plots.drawable("模型-4bit $x") == r"??-4bit \$x"
    monkeypatch.setattr(plots, "chinese_fonts", lambda: ["Noto Sans CJK SC"])
    assert plots.drawable("模型") == "模型"


def test_charts_keep_their_proportions(models):
    """Shades and widths follow the values; a bar of zero and a missing value differ."""
    shown = read_models({path: ModelResults(test={"classes": {}, "figures": {
        "math": {"agreement": share}, "code": {"agreement": None}}}) for path, share in zip(models[1:3], (100.0, 0.0),
                                                                                       strict=True)}, None)
    shades = {model.label: [cell[1] for _, cells in report_charts.error_map(model, shown)["rows"] for cell in cells]
              for model in shown}
    assert max(shades["bits-8"]) < min(shades["bits-4"])
    assert [min(shades["bits-8"]), max(shades["bits-4"])] == [0, 1]
    rows = report_charts.class_chart(shown, report_charts.agreement).rows
    assert [(row.english, row.segments[0][1], row.text) for row in rows] == [("math", 100, "100"), ("", 0, "0")]
    sizes = [sum(width for _, width in row.segments) for row in report_charts.size_chart(shown).rows]
    assert max(sizes) == pytest.approx(100, abs=2)
    assert sizes[1] / sizes[0] == pytest.approx(shown[1].inspection.bytes / shown[0].inspection.bytes, rel=0.05)


@pytest.mark.parametrize(("value", "text"), [(0.0019, "1.9e-3"), (12.0, "1.2e1"), (0.0, "0")])
def test_short_exponents(value, text):
    assert report_charts.short_exponent(value) == text
