"""The command line: quick help, exit codes, and one line instead of a traceback."""

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcl import cli
from vlcl.cli import run_command
from vlcl.environment import uncollected
from vlcl.errors import UserError

ROOT = Path(__file__).parents[1]
VLCL = [sys.executable, "-m", "vlcl.cli"]


def vlcl(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run([*VLCL, *arguments], capture_output=True, text=True, cwd=cwd, env=env, check=False)


def modules_after(*arguments: str) -> set[str]:
    """The modules that a command has imported when it ends."""
    code = f"""
import sys
from vlcl.cli import main
sys.argv = ["vlcl", *{arguments!r}]
try:
    main()
except SystemExit:
    print("MODULES", *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.partition("MODULES")[2].split())


def test_what_a_command_imports_is_not_searched_for_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards import make_shards

    (tmp_path / "config.yaml").write_text(f"data: {{train: {make_shards(tmp_path / 'shards', (4,))}}}")
    seen: list[tuple[str, bool]] = []

    class Watch:
        def find_spec(self, name: str, *_: object) -> None:
            if name in ("vlcl.train", "vlcl.export.command"):
                seen.append((name, gc.isenabled()))
                raise KeyboardInterrupt  # no need to import it

    for name in ("vlcl.train", "vlcl.export.command"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])
    assert CliRunner().invoke(cli.app, ["train", str(tmp_path / "config.yaml")]).exit_code == 130
    assert gc.isenabled()
    assert CliRunner().invoke(cli.app, ["export", "ViT-B-32:openai", "out"]).exit_code == 130
    assert gc.isenabled()
    assert seen == [("vlcl.train", False), ("vlcl.export.command", False)]
    with uncollected():
        kept = [[number] for number in range(1000)]
    assert not any(one is kept for one in gc.get_objects())  # never gone through again


def test_help_is_light() -> None:
    loaded = modules_after("--help")
    assert "typer" in loaded
    assert not {"torch", "pydantic", "yaml", "vlcl.config", "vlcl_data_prep"} & loaded


def test_mistakes_show_before_torch_is_imported() -> None:
    loaded = modules_after("train", "nope.yaml")
    assert "vlcl.config" in loaded
    assert "torch" not in loaded


NOT_THERE = """
train nope.yaml
train CONFIG data.train=nope
train CONFIG data.val=nope
train CONFIG data.manifest=nope.json
train CONFIG eval.zeroshot=nope
train CONFIG resume=nope
train CONFIG model.name=local-dir:nope
train CONFIG model.pretrained=nope/x.pt
bias nope
compare nope.yaml --loss em --batch-size 4 --seeds 1
compare CONFIG --loss em --batch-size 4 --seeds 1 data.train=nope
export runs/nope out
eval elevater runs/nope --data-root HERE
eval elevater HERE --data-root nope
eval zeroshot runs/nope HERE
eval zeroshot ViT-B-32:openai nope
eval retrieval runs/nope HERE
eval retrieval ViT-B-32:openai nope
eval zeroshot nope HERE
eval datacomp nope --data-root HERE
eval datacomp runs/nope --data-root HERE/none
eval datacomp ViT-B-32:openai --data-root nope
eval linear runs/nope HERE
eval linear ViT-B-32:openai nope
eval report nope
eval submission nope
data pack nope out
data index nope
data verify nope
data show nope
data stats nope
data elevater nope
"""


def test_what_is_not_there_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    """By every command, one after another in one process."""
    from shards import make_shards

    shards = make_shards(tmp_path / "shards", (4,))
    (tmp_path / "config.yaml").write_text(f"data: {{train: {shards}}}")
    lines = NOT_THERE.replace("CONFIG", str(tmp_path / "config.yaml")).replace("HERE", str(tmp_path)).split("\n")[1:-1]
    code = f"""
import sys
from vlcl.cli import main
for line in {lines!r}:
    sys.argv = ["vlcl", *line.split()]
    try:
        main()
    except SystemExit as end:
        print("END", end.code, "torch" in sys.modules, line, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    told = done.stderr.split("\nEND ")
    for line, before, after in zip(lines, told, told[1:]):
        assert after.splitlines()[0] == f"2 False {line}", before
        assert "nope" in before, before
    assert len(told) == len(lines) + 1


def test_help() -> None:
    for arguments in ((), ("--help",)):
        done = vlcl(*arguments)
        assert "train" in done.stdout
        assert "data" in done.stdout
    text = vlcl("train", "--help").stdout
    for key in ("data.train=", "train.batch_size=", "checkpoint.every=", "resume=latest", "docs/config.md"):
        assert key in text


def test_version() -> None:
    done = vlcl("--version")
    assert (done.returncode, done.stdout) == (0, "vlcl 0.1.0\n")


def test_user_errors_exit_2_without_traceback() -> None:
    done = vlcl("train", "nope.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no config file 'nope.yaml'; there are: configs/")
    done = vlcl("train", "configs/openmoji.yaml", "lr=1", "train.steps=x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 2 mistakes in the settings of configs/openmoji.yaml:\n")
    assert "Traceback" not in done.stderr


def test_unknown_commands_have_suggestions() -> None:
    for arguments, suggestion in ((("trian",), "'train'"), (("data", "indx"), "'index'")):
        done = vlcl(*arguments)
        assert done.returncode == 2
        assert f"Did you mean {suggestion}?" in done.stderr


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("data", "openmoji emoji icons mnist pack index verify elevater"),
        ("eval", "elevater zeroshot retrieval report submission"),
    ],
)
def test_commands_of_a_group_have_help(group: str, names: str) -> None:
    said = CliRunner().invoke(cli.app, [group, "--help"])
    assert said.exit_code == 0, said.output
    for name in names.split():
        assert name in said.output
        assert CliRunner().invoke(cli.app, [group, name, "--help"]).exit_code == 0


def test_print_config(tmp_path: Path) -> None:
    done = vlcl("train", "configs/openmoji.yaml", "optim.lr=1e-2", "--print-config")
    assert done.returncode == 0, done.stderr
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = vlcl("train", str(tmp_path / "again.yaml"), "--print-config")
    assert "lr: 0.01" in again.stdout
    assert again.stdout == done.stdout


def test_a_closed_pipe_is_quiet() -> None:
    code = "from vlcl.cli import run_command; run_command(lambda: [print('x' * 99) for _ in range(9999)])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


AGAIN = "Make room, or name another place; then type the same command again"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("no such shard"), 2, "error: no such shard\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.EACCES, "Permission denied", "a"), 2, "error: Permission denied: a\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 2,
         f"error: a cannot be written: disk full: no space left. {AGAIN}\n"),
        (OSError(errno.EROFS, "Read-only file system"), 2, f"error: Read-only file system. {AGAIN}\n"),
    ],
)  # fmt: skip
def test_run_command(raised: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise raised

    with pytest.raises(SystemExit) as caught:
        run_command(fail)
    assert caught.value.code == code
    assert capsys.readouterr().err == line


def test_run_command_passes_on() -> None:
    assert run_command(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):
        run_command(Path("nowhere").read_text)


def test_a_path_that_is_not_there_is_told_without_torch(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    code = (
        "import sys; from vlcl.cli import app\n"
        "try: app(['train', 'config.yaml', 'data.train=nowhere'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "False")
    assert "no shards match 'nowhere'" in done.stderr


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch is imported, which reads it then: `main` imports none, as `test_help_is_light` shows."""
    monkeypatch.setattr(cli, "app", lambda **_: None)
    for before, after in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if before:
            monkeypatch.setenv("OMP_WAIT_POLICY", before)
        cli.main()
        assert os.environ["OMP_WAIT_POLICY"] == after


def offered(words: str, cwd: Path = ROOT) -> list[str]:
    """What bash is offered for the last of `words`, as the script of `vlcl --install-completion` asks for it."""
    place = str(len(words.split(" ")) - 1)
    env = {**os.environ, "_VLCL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": place}
    return subprocess.run(VLCL, capture_output=True, text=True, cwd=cwd, env=env, check=True).stdout.split()


def test_a_shell_completes_commands_configs_and_keys() -> None:
    assert {"train", "models", "eval"} <= set(offered("vlcl "))
    assert "datacomp" in offered("vlcl eval d")
    assert offered("vlcl train configs/openm") == ["configs/openmoji.yaml"]
    assert offered("vlcl train openmoji train.st") == ["train.steps="]
    assert "loss.gamma=" in offered("vlcl train openmoji loss.g")


def test_a_run_in_place_of_a_config_is_told_where_its_settings_are(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    done = CliRunner().invoke(cli.app, ["train", str(tmp_path)])
    assert done.exit_code == 2
    assert f"which is a folder; the settings of that run are in '{tmp_path / 'config.yaml'}'" in done.output
