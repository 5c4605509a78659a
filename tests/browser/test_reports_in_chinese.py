"""Reports on a Chinese page are Chinese, in parts that are put together too; other lines stay as they are."""

import re
from collections.abc import Iterator

import pytest
from browser import Browser
from comfy_host import PACK_NAME

pytestmark = [pytest.mark.server, pytest.mark.slow]

CHINESE = re.compile(r"[\u4e00-\u9fff]")
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
REPORTS = """
return app.graph.nodes.flatMap((node) => (node.widgets ?? []).filter((one) => one.name === "report").map((one) => one.value))
"""


@pytest.fixture
def chinese(browser: Browser) -> Iterator[Browser]:
    browser.set("Comfy.Locale", "zh")
    browser.open()
    yield browser
    browser.set("Comfy.Locale", "en")
    browser.open()


def translated(browser: Browser, lines: list[str]) -> list[str]:
    return browser.js(
        f"const {{ inOwnWords }} = await import('/extensions/{PACK_NAME}/js/sentences.js'); return args[0].map(inOwnWords)",
        lines,
    )


def test_lines_are_put_together_from_what_is_known(chinese: Browser):
    assert dict(zip(LINES, translated(chinese, list(LINES)), strict=True)) == LINES


def test_an_english_page_shows_what_the_server_wrote(browser: Browser):
    assert translated(browser, list(LINES)) == list(LINES)


def test_the_reports_of_an_edit_are_chinese(chinese: Browser):
    chinese.open_template("lightning")
    chinese.js("await app.queuePrompt(0, 1)")
    chinese.wait(REPORTS.replace("return ", "return 2 < ") + ".length", 180)
    lines = [line for report in chinese.js(REPORTS) for line in report.split("\n") if "  " not in line]
    assert [line for line in lines if re.search("[a-z]{2},? [a-z]{2}", line)] == []
    assert sum(bool(CHINESE.search(line)) for line in lines) > 3
    assert chinese.problems() == []
