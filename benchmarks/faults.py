"""The fault table: what was tried against the real server, and what survived.

    COMFYUI_PATH=... python benchmarks/faults.py [--fast] [-k EXPRESSION]

runs the tests that belong to each fault and prints a table. A fault counts as survived if the test passed: what had to
happen did, and where the edit can go on, the next good edit on the same server gave the same picture as before, bit for
bit. The result is kept as benchmarks/results/faults.json and .md.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results"

# Fault -> the tests that try it: files below tests/, and the beginnings of their functions' names.
FAULTS: dict[str, dict[str, list[str]]] = {
    "weights truncated, a web page, an LFS pointer, zip or pickle; another architecture; missing or unexpected tensors;"
    " overlapping offsets, trailing bytes, a huge header": {
        "comfyui/test_faults.py": ["test_a_bad_file_chosen_as_model", "test_a_bad_encoder_or_vae_file", "test_an_incomplete_folder",
                                   "test_a_file_that_is_replaced"],
        "comfyui/test_gguf_loader.py": ["test_bad_files_are_refused"],
        "test_gguf.py": ["test_another_", "test_a_format_that_is_not_decoded", "test_damaged", "test_truncated",
                         "test_tensors_that_overlap", "test_a_shape_that_is_not", "test_gguf_under_another_name"],
    },
    "random damage to headers of safetensors and GGUF files (fuzzing)": {
        "test_fuzzing.py": ["test_safetensors", "test_gguf", "test_a_gguf"],
    },
    "a LoRA of another model, with NaN or infinity, ranks that do not fit, rank zero, no alpha; a damaged file": {
        "comfyui/test_lora.py": ["test_bad_loras", "test_a_partly_matching"],
        "comfyui/test_fault_table.py": ["test_a_bad_file_chosen_as_lora", "test_a_missing_alpha"],
        "test_fuzzing.py": ["test_lora_files"],
    },
    "NaN or infinity in pictures, latents or the result": {
        "comfyui/test_faults.py": ["test_a_latent_with_bad_numbers", "test_nan_from_the_model"],
        "comfyui/test_save.py": ["test_what_is_no_picture"],
    },
    "NaN, infinite, huge, negative or mistyped values, as widgets and through links": {
        "comfyui/test_faults.py": ["test_numbers_out_of_range", "test_values_of_the_wrong_type", "test_anything_else_through"],
        "comfyui/test_fuzz_prompts.py": ["test_no_values_break"],
        "test_fuzzing.py": ["test_recipes"],
    },
    "names that are not offered: ../, absolute, NUL, UNC, through links": {
        "comfyui/test_faults.py": ["test_a_combo_takes_only"],
        "comfyui/test_fault_table.py": ["test_links_of_the_owner", "test_a_folder_whose_index", "test_a_text_encoder_in_gguf"],
        "comfyui/test_security_server.py": ["test_"],
        "comfyui/test_batch.py": ["test_nothing_outside_the_input", "test_nothing_outside_the_output"],
        "comfyui/test_save.py": ["test_nothing_is_written_outside"],
    },
    "pictures that are empty, of one pixel, 1:40, grey, RGBA, like a mask, in fp16": {
        "comfyui/test_faults.py": ["test_a_picture_that_is_none", "test_odd_pictures", "test_a_grey_picture", "test_alpha_is"],
        "comfyui/test_fault_table.py": ["test_a_half_precision_picture"],
        "test_fuzzing.py": ["test_plans", "test_pictures_of_any_shape"],
    },
    "a side of 20000 pixels": {
        "comfyui/test_faults.py": ["test_a_side_of_20000"],
        "comfyui/test_fault_table.py": ["test_a_side_of_20000"],
    },
    "references and lists of different sizes, lists of uneven length, latents of another shape": {
        "comfyui/test_faults.py": ["test_references_of_different", "test_more_than_three", "test_a_batch_of_two", "test_lists_of_uneven",
                                   "test_a_latent_of_another_shape", "test_the_first_of_a_latent_batch"],
        "comfyui/test_fault_table.py": ["test_a_list_of_pictures"],
    },
    "prompts that are empty, of 100,000 characters, with special tokens or no Unicode": {
        "comfyui/test_faults.py": ["test_special_tokens", "test_an_empty_prompt", "test_a_prompt_of_100k", "test_control_characters"],
        "test_fuzzing.py": ["test_prompts"],
    },
    "out of memory, once and twice, raised and really allocated": {
        "comfyui/test_faults.py": ["test_out_of_memory"],
        "comfyui/test_fault_table.py": ["test_memory_that_runs_out", "test_a_batch_too_large"],
        "comfyui/test_loader_precision.py": ["test_out_of_memory"],
    },
    "cancelled in the middle of a step and while weights are read": {
        "comfyui/test_faults.py": ["test_cancel"],
    },
    "attention or kernels that do not run here": {
        "comfyui/test_faults.py": ["test_attention_that_does_not_run", "test_the_loader_says_which_attention"],
        "test_kernels_choice.py": ["test_plain_pytorch_runs", "test_kernels_that_do_not_run", "test_out_of_memory_says_nothing"],
    },
    "the server killed in the middle of its queue (slow tier; ten times and more: soak.py kill)": {
        "comfyui/test_clients.py": ["test_a_server_killed_mid_queue"],
        "comfyui/test_soak.py": ["test_a_batch_survives_kill_9"],
    },
    "two clients at once, sixty edits in the queue (500: soak.py load)": {
        "comfyui/test_clients.py": ["test_two_clients_queue_at_once"],
        "comfyui/test_soak.py": ["test_sixty_edits_from_two_clients"],
    },
    "anything as a manifest (fuzzing), items that are bad, a server that stays away": {
        "test_manifest.py": ["test_anything_as_a_manifest", "test_a_bad_row_is_named"],
        "comfyui/test_batch.py": ["test_bad_items_are_named", "test_a_bad_picture_of_a_folder", "test_results_that_cannot_be_written"],
        "comfyui/test_manifest_run.py": ["test_what_goes_wrong_with_a_picture", "test_a_server_that_answers_and_takes_no_prompt",
                                         "test_an_item_that_takes_the_server_away"],
    },
    "parts that do not fit: ControlNet, patches, conditioning or a MODEL of another kind": {
        "comfyui/test_faults.py": ["test_patches_that", "test_a_native_patch", "test_a_controlnet", "test_a_reference_method",
                                   "test_conditioning_of_another", "test_a_model_of_another_kind"],
    },
    "disk full or read-only where the log is": {
        "comfyui/test_fault_table.py": ["test_a_log_that_cannot_be_written"],
    },
    "a package missing (slow tier)": {
        "comfyui/test_surroundings.py": ["test_without_a_package"],
    },
    "ComfyUI newer or older than what the pack needs (slow tier)": {
        "comfyui/test_surroundings.py": ["test_a_comfyui_without"],
    },
}  # fmt: skip


def functions(tests: dict[str, list[str]]) -> list[tuple[str, str]]:
    """File and name of every test function that ``tests`` means.

    Raises:
        ValueError: a beginning that no test has.
    """
    found = []
    for file, beginnings in tests.items():
        tree = ast.parse((REPO / "tests" / file).read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        for beginning in beginnings:
            matching = [(file, name) for name in names if name.startswith(beginning)]
            if not matching:
                raise ValueError(f"tests/{file} has no test that begins with {beginning}.")
            found += matching
    return found


def run_tests(extra: list[str]) -> tuple[list[ElementTree.Element], float]:
    """pytest's record of each test of the table, and the seconds that all took."""
    wanted = dict.fromkeys(f"tests/{file}::{name}" for tests in FAULTS.values() for file, name in functions(tests))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            *wanted,
            "-q",
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit2",
            *extra,
        ]
        begin = time.monotonic()
        subprocess.run(command, cwd=REPO, check=False, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        seconds = time.monotonic() - begin
        return list(ElementTree.parse(report).getroot().iter("testcase")), seconds


def belongs(case: ElementTree.Element, wanted: list[tuple[str, str]]) -> bool:
    module, name = case.get("classname", "").replace(".", "/") + ".py", case.get("name", "").partition("[")[0]
    return any(name == function and f"/{module}".endswith(f"/{file}") for file, function in wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="without the slow tier")
    parser.add_argument("-k", default="", help="only tests that match, as for pytest; nothing is kept")
    options = parser.parse_args()
    extra = (["-m", "not slow"] if options.fast else []) + (["-k", options.k] if options.k else [])
    cases, seconds = run_tests(extra)
    rows = []
    for fault, tests in FAULTS.items():
        # a test whose good edit failed afterwards has two records, of which one holds the error
        here, wanted = {}, functions(tests)
        for case in cases:
            if belongs(case, wanted):
                key = (case.get("classname"), case.get("name"))
                failed = case.find("failure") is not None or case.find("error") is not None
                state = "skipped" if case.find("skipped") is not None else "failed" if failed else "passed"
                here[key] = "failed" if "failed" in (state, here.get(key)) else state
        tried = [state for state in here.values() if state != "skipped"]
        rows.append({"fault": fault, "tried": len(tried), "survived": tried.count("passed")})
    lines = ["| fault | tried | survived |", "|---|---|---|"]
    lines += [f"| {row['fault']} | {row['tried']} | {row['survived']} |" for row in rows]
    tried, survived = (sum(row[what] for row in rows) for what in ("tried", "survived"))
    lines.append(f"| **all** | **{tried}** | **{survived}** |")
    print("\n".join(["", *lines]))
    if not options.k:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "faults.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        record = {
            "rows": rows,
            "tried": tried,
            "survived": survived,
            "seconds": round(seconds),
            "slow_tier": not options.fast,
        }
        (RESULTS / "faults.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if rows and tried == survived else 1


if __name__ == "__main__":
    sys.exit(main())
