"""The page in English and Chinese: nodes with their inputs and tooltips, help, templates, and reports, put together from parts."""

import json
import re

import pytest
from browser import Browser
from comfy_host import PACK_NAME, REPO
from seen import on_canvas

from qwen_edit import perf

pytestmark = [pytest.mark.server, pytest.mark.slow]

CHINESE = re.compile(r"[\u4e00-\u9fff]")
NODES = json.loads((REPO / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))
TEMPLATES = json.loads((REPO / "locales" / "zh" / "main.json").read_text("utf-8"))["qwenEditFast"]["templates"]
SAME_IN_BOTH = re.compile("CLIP|VAE|LoRA [1-4]|Latent")
# Adds a node and moves the mouse over its title, its slots and its widgets.
SEEN_OF_A_NODE = """
const node = LiteGraph.createNode(args[0]);
app.graph.clear();
app.graph.add(node);
node.showAdvanced = true;
node.setSize(node.computeSize());
const { canvas, ds } = app.canvas;
[node.pos, ds.scale, ds.offset] = [[0, 0], 1, [400, 100]];
app.canvas.draw(true, true);
const tip = document.querySelector(".node-tooltip");
const { left, top } = canvas.getBoundingClientRect();
async function tooltip(x, y) {
  const at = { clientX: left + ds.offset[0] + x, clientY: top + ds.offset[1] + y, bubbles: true };
  canvas.dispatchEvent(new PointerEvent("pointermove", at));
  canvas.dispatchEvent(new MouseEvent("mousemove", at));
  for (let waited = 0; waited < 100; waited++) {
    await new Promise((done) => setTimeout(done, 20));
    if (tip.style.display !== "none") return tip.textContent;
  }
}
const inputs = [];
for (const [index, { name, label, localized_name }] of node.inputs.entries())
  inputs.push([name, label ?? localized_name, await tooltip(...node.getInputPos(index))]);
const drawn = node.widgets?.filter((widget) => !widget.element && node.inputs.some(({ name }) => name === widget.name)) ?? [];
for (const { name, label, y } of drawn) inputs.push([name, label, await tooltip(node.size[0] / 2, y + 8)]);
return [node.title, await tooltip(node.size[0] / 2, -LiteGraph.NODE_TITLE_HEIGHT / 2), inputs];
"""
LINES = {
    "demo (2511, by the file's name), fp8, 12.70 GiB, attention cudnn, kernels triton": (
        "demo（2511，依据文件名），fp8，12.70 GiB，注意力 cudnn，内核 triton"
    ),
    "bf16 (2509), bf16, 38.05 GiB, attention cudnn, kernels triton": "bf16（2509），bf16，38.05 GiB，注意力 cudnn，内核 triton",
    "1 step, guidance off, shift 3.1": "1 步，无引导，偏移 3.1",
    "40 steps, true CFG 4, dynamic shift": "40 步，true CFG 4，动态偏移",
    "1000×707 → 1216×864, scale 1.22, 4 px padding": "1000×707 → 1216×864，比例 1.22，填充 4 像素",
    "64×64 → 128×128, through an upscale model (256×256), 45% of the picture edited": (
        "64×64 → 128×128，经放大模型（256×256），编辑了图片的 45%"
    ),
    "Warning: precision fp32 runs instead of fp8: fp8 does not run here: the model runs on cpu": (
        "警告：以精度 fp32 代替 fp8 运行：fp8 无法在此运行：模型在 cpu 上运行"
    ),
    "Attention pytorch: PyTorch's choice: nothing was measured on a Quadro": (
        "注意力 pytorch：PyTorch 的选择：没有在 Quadro 上测量过"
    ),
    "style: strength 0.8, 720 layers, 94.5 MiB, resident. Warning: 3 modules of the file are not applied (first: a.b)": (
        "style：强度 0.8，720 层，94.5 MiB，常驻。警告：文件中有 3 个模块未应用（第一个：a.b）"
    ),
    "fused: in the weights; the originals are kept in RAM. The 8-bit weights are rounded once more.": (
        "fused：写入权重；原值保存在内存中。8 位权重会再舍入一次。"
    ),
    "20 of the transformer's 60 blocks are streamed from RAM, 4.20 GiB in each forward: 0.09 s at the 47 GiB/s measured, "
    "while the blocks before them compute; no forward takes less. ComfyUI leaves 9.1 GiB of the card for its 12.7 GiB.": (
        "Transformer 的 60 个块中有 20 个从内存流式传输，每次前向计算 4.20 GiB：按实测 47 GiB/s 需 0.09 秒，与前面各块的计算同时进行；每次前向计算不会少于此时间"
        "。ComfyUI 为其 12.7 GiB 留出 9.1 GiB 显存。"
    ),
    "Warning: Lightning is in here twice (a and b), once too often; switch all but one of them off.": (
        "警告：Lightning 在此出现两次（a and b），多了一次；请只保留其中一个。"
    ),
    "Runs ComfyUI's own forward, because of replaced blocks or attention.": "运行 ComfyUI 自带的前向计算，原因：块或注意力被替换。",
    "a line of no template (with $& and {braces})": "a line of no template (with $& and {braces})",
    "$&: strength 1, 2 layers, 0.1 MiB, read from disk": "$&：强度 1，2 层，0.1 MiB，已从磁盘读取",
}
# Opens a node's help with its button, and waits until its pictures are there or not to be had.
HELP = """
const node = LiteGraph.createNode(args[0]);
app.graph.clear();
app.graph.add(node);
[node.pos, app.canvas.ds.scale, app.canvas.ds.offset] = [[300, 200], 1, [0, 0]];
app.canvas.selectNode(node);
const found = async (look) => {
  for (let waited = 0; waited < 100; waited++) {
    const one = look();
    if (one) return one;
    await new Promise((done) => setTimeout(done, 50));
  }
  throw new Error(`no help of ${args[0]}`);
};
(await found(() => document.querySelector("[data-testid=info-button]"))).click();
const help = await found(() => {
  const shown = document.querySelector(".node-help-content");
  return shown?.querySelector("h1")?.textContent === args[1] && shown;
});
const pictures = [...help.querySelectorAll("img")];
await found(() => pictures.every((one) => one.complete));
return [help.textContent, pictures.map((one) => one.naturalWidth)];
"""
REPORTS = """
return app.graph.nodes.flatMap((node) => (node.widgets ?? []).filter((one) => one.name === "report").map((one) => one.value))
"""


@pytest.fixture(scope="module")
def chinese(browser: Browser) -> Browser:
    """The page in Chinese from the first test on that asks for it."""
    browser.set("Comfy.Locale", "zh")
    browser.set("LiteGraph.Node.TooltipDelay", 0)
    browser.open()
    return browser


def translated(browser: Browser, lines: list[str]) -> list[str]:
    return browser.js(
        f"const {{ inOwnWords }} = await import('/extensions/{PACK_NAME}/js/sentences.js'); return args[0].map(inOwnWords)",
        lines,
    )


CUT_OFF = """
return app.graph.nodes.flatMap((node) => (node.widgets ?? []).filter((one) => one.name === "report"))
  .filter(({ element }) => element.scrollHeight > element.clientHeight).map((one) => one.value)
"""


def words(markdown: str) -> str:
    """What is to be read of a page, without its marks and blanks."""
    shown = re.sub(r"!\[.*?\]\(.*?\)|^ *\d+\. |^```\w*$", "", markdown, flags=re.MULTILINE)
    return re.sub(r"[\W_]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", shown))


def shows_help(browser: Browser, page: str) -> None:
    for kind in NODES:
        markdown = (REPO / "web" / "docs" / page.format(kind)).read_text("utf-8")
        text, pictures = browser.js(HELP, kind, markdown.split("\n")[0].removeprefix("# "))
        assert re.sub(r"[\W_]", "", text) == words(markdown), kind
        assert len(pictures) == markdown.count("![")
        assert min(pictures) > 0, kind


def test_the_help_of_every_node_opens_on_an_english_page(browser: Browser):
    shows_help(browser, "{}.md")
    assert browser.problems() == []


def test_an_english_page_shows_what_the_server_wrote(browser: Browser):
    assert translated(browser, list(LINES)) == list(LINES)


def test_the_help_of_every_node_opens_on_a_chinese_page(chinese: Browser):
    chinese.problems()
    shows_help(chinese, "{}/zh.md")
    assert chinese.problems() == []


def test_the_table_of_a_run_is_chinese_in_its_columns(chinese: Browser):
    run = perf.Run()
    run.node_started("7", "KSampler")
    for value in (1, 2, 3):
        run.progress("7", value)
    run.node_finished("7")
    record = run.record("so far")
    record["device"] |= {"peak_mib": 2048.0, "utilisation_mean": 93.0}
    for cold in (True, False):
        record |= {"cold": cold, "models_loaded": ["QwenImage", "WanVAE"]}
        table = perf.stage_table(record).splitlines()
        own = translated(chinese, table)
        assert [line.split() for line in own[:4]] == [
            ["阶段", "毫秒", "占比", "显卡毫秒"],
            *(
                line.replace("denoise", "去噪").replace("host", "节点之间").replace("total", "合计").split()
                for line in table[1:4]
            ),
        ]
        assert re.fullmatch(r"KSampler：3 步，每步 [\d.]+ 毫秒（(实际|显卡)）", own[4])
        state = "冷启动（加载了 QwenImage, WanVAE）" if cold else "热运行"
        assert re.fullmatch(rf"到目前为止，{state}，进程 [\d.]+ GiB +显存峰值 2.00 GiB +GPU 繁忙 93 %", own[5])


def test_lines_are_put_together_from_what_is_known(chinese: Browser):
    assert dict(zip(LINES, translated(chinese, list(LINES)), strict=True)) == LINES


def test_nodes_speak_chinese_with_every_input_and_tooltip(chinese: Browser):
    for kind, texts in NODES.items():
        title, description, inputs = chinese.js(SEEN_OF_A_NODE, kind)
        assert (title, description) == (texts["display_name"], texts["description"])
        expected = texts["inputs"].keys() - {"control_after_generate", "pictures"}
        seen = {name.replace(".", "_") for name, _, _ in inputs}
        assert expected - seen == {one for one in expected if re.fullmatch("pictures_picture_([3-9]|10)", one)}
        for name, label, tooltip in inputs:
            text = texts["inputs"][name.replace(".", "_")]
            assert (label, tooltip) == (text["name"], text["tooltip"]), f"{kind}.{name}"
            assert CHINESE.search(label) or SAME_IN_BOTH.fullmatch(label), f"{kind}.{name}: {label}"
            assert CHINESE.search(tooltip), f"{kind}.{name}: {tooltip}"
    chinese.load_api(json.loads((REPO / "workflows" / "api" / "single_edit.json").read_text("utf-8")), "single_edit")
    assert on_canvas(chinese, 5) == ["40 步 · CFG 4 · 动态偏移"]


def test_a_template_is_chinese_once_and_what_is_saved_of_it_stays_the_users_own(chinese: Browser):
    chinese.problems()
    chinese.open_template("two_references")
    graph = chinese.js("return app.graph.serialize()")
    titles = set(TEMPLATES["titles"].values())
    assert {node["title"] for node in graph["nodes"]} | {group["title"] for group in graph["groups"]} <= titles
    (note,) = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert note["widgets_values"] == [TEMPLATES["notes"]["two_references"]]
    slots = (
        "return app.graph.nodes.find((n) => n.type === 'QwenEditEncode').inputs.map((i) => i.label ?? i.localized_name)"
    )
    assert {"图片 1", "图片 2", "图片 3"} <= set(chinese.js(slots))
    chinese.js("""
        const encode = app.graph.nodes.find((n) => n.type === "QwenEditEncode");
        const picture = app.graph.nodes.find((n) => n.type === "LoadImage");
        picture.connect(0, encode, encode.inputs.findIndex(({ name }) => name === "pictures.picture_3"));
    """)
    assert "图片 4" in chinese.js(slots)
    assert "qwenEditTemplate" not in graph["extra"]
    assert not chinese.js("return app.extensionManager.workflow.activeWorkflow.isModified")
    graph["nodes"][0]["title"] = note["widgets_values"][0] = "Edit"
    chinese.js("await app.loadGraphData(args[0])", graph)
    again = chinese.js("return app.graph.serialize().nodes")
    assert [node["title"] for node in again] == [node["title"] for node in graph["nodes"]]
    assert "Edit" in [node["title"] for node in again]
    assert ["Edit"] in [node.get("widgets_values") for node in again]
    assert chinese.problems() == []


def test_the_reports_of_an_edit_are_chinese(chinese: Browser):
    chinese.open_template("lightning")
    chinese.js("await app.queuePrompt(0, 1)")
    chinese.wait(REPORTS.replace("return ", "return 2 < ") + ".length", 180)
    lines = [line for report in chinese.js(REPORTS) for line in report.split("\n") if "  " not in line]
    assert [line for line in lines if re.search("[a-z]{2},? [a-z]{2}", line)] == []
    assert sum(bool(CHINESE.search(line)) for line in lines) > 3
    assert chinese.js(CUT_OFF) == []
    assert chinese.problems() == []
