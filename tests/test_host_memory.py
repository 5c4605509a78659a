"""What a container leaves of the machine's memory."""

from qwen_edit.host_memory import available_memory


def cgroup(folder, limit, used, reclaimable, names):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {reclaimable}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_a_containers_limit_counts(tmp_path):
    own, root = tmp_path / "own", tmp_path / "v2"
    cgroup(root / "pod" / "container", 10_000, 4_000, 1_000, V2)
    cgroup(root / "pod", "max", 9_000, 0, V2)
    own.write_text("0::/pod/container\n")
    assert available_memory(root, own) == 7_000
    cgroup(root / "pod", 12_000, 9_000, 500, V2)  # a parent leaves less
    assert available_memory(root, own) == 3_500
    own.write_text("0::/../name/outside\n")  # inside, the container's own group is the root
    cgroup(root, 6_000, 5_500, 0, V2)
    assert available_memory(root, own) == 500


def test_a_limit_of_the_older_kind_counts(tmp_path):
    own, root = tmp_path / "own", tmp_path / "v1"
    cgroup(root / "memory" / "docker", 8_000, 7_000, 250, V1)
    own.write_text("12:cpu,cpuacct:/docker\n7:memory:/docker\n")
    assert available_memory(root, own) == 1_250


def test_without_a_limit_the_machine_counts(tmp_path):
    assert available_memory(tmp_path, tmp_path / "none") > 2**20
    (tmp_path / "own").write_text("0::/\n")
    assert available_memory(tmp_path, tmp_path / "own") > 2**20
