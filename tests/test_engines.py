"""Work by shard: in processes of this machine, on a Ray cluster of two nodes; workers that are killed, and going on.

.venv/bin/python -m pytest tests/test_engines.py
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from shards import make_shards, picture, read_members
from typer.testing import CliRunner

from vlcl import cli
from vlcl.config import load_config
from vlcl.data.manifest import open_source, read_manifest
from vlcl.errors import UserError
from vlcl_data_prep.engine import map_shards
from vlcl_data_prep.pack import pack_shards
from vlcl_data_prep.results import kept_results
from vlcl_data_prep.stats import stats_of
from vlcl_data_prep.tally import FORM as TALLIES
from vlcl_data_prep.tally import How, tally_shard
from vlcl_data_prep.verify import FORM, Rules, _check_shard, verify_shards


def damage(index: int, files: dict[str, bytes]) -> None:
    if index in (3, 11):
        files["png"] = b"<html>"
    if index == 7:
        files["txt"] = b""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("engines") / "shards", (4, 5, 6, 2), damage)


def urls_of(shards: Path) -> list[str]:
    return sorted(map(str, shards.glob("*.tar")))


def check_or_die(url: str, folder: str, times: int, victim: str = "00002.tar") -> Any:
    """verify's own function, but the process that has the victim is killed, so many times."""
    if url.endswith(victim):
        deaths = sorted(Path(folder).iterdir())
        if len(deaths) < times:
            (Path(folder) / str(len(deaths))).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
    return _check_shard(url, rules=Rules())


def counted(url: str, folder: str) -> Any:
    """verify's own function, which leaves a file for each time that it is called."""
    (Path(folder) / f"{Path(url).stem}-{time.monotonic_ns()}").touch()
    return _check_shard(url, rules=Rules())


@pytest.mark.parametrize("workers", [2, 3])
def test_a_killed_process_costs_a_second_try(shards: Path, tmp_path: Path, workers: int) -> None:
    expected = [_check_shard(url, rules=Rules()) for url in urls_of(shards)]
    found = list(map_shards(partial(check_or_die, folder=str(tmp_path), times=2), urls_of(shards), workers))
    assert found == expected
    assert len(list(tmp_path.iterdir())) == 2


def test_a_shard_that_kills_each_time_is_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"00002\.tar: the process that worked on it was killed, 3 times"):
        list(map_shards(partial(check_or_die, folder=str(tmp_path), times=99), urls_of(shards), 2))


def test_an_interrupted_command_goes_on_from_the_finished_shards(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, calls = str(tmp_path / "t.tsv"), tmp_path / "calls"
    calls.mkdir()
    work, urls, first = partial(counted, folder=str(calls)), urls_of(shards), []
    with suppress(KeyboardInterrupt), kept_results(table, FORM, "verify") as kept:
        found = map_shards(work, urls, 1, None, kept=kept)
        first = [next(found), next(found)]
        with pytest.raises(UserError, match="another process works on"), kept_results(table, FORM, "verify"):
            pass
        raise KeyboardInterrupt
    assert "2 shards kept: the same command goes on from there" in capsys.readouterr().err
    os.utime(urls[0], ns=(0, 0))  # as if it was written anew
    with kept_results(table, FORM, "verify") as kept:
        again = list(map_shards(work, urls, 1, "verify", kept=kept))
        assert len(list(kept.folder.glob("*.safetensors"))) == 5  # one is of the older shard
    assert again == [_check_shard(url, rules=Rules()) for url in urls]
    assert again[:2] == first
    assert sorted(path.name[:5] for path in calls.iterdir()) == ["00000", "00000", "00001", "00002", "00003"]
    assert "verify: 1 of 4 shards done before" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["calls"], "what was kept goes with the end"


def test_other_rules_a_damaged_file_and_a_broken_shard_are_worked_on_anew(shards: Path, tmp_path: Path) -> None:
    cut = tmp_path / "shards"
    shutil.copytree(shards, cut)
    os.truncate(cut / "00001.tar", 2000)
    table, urls = str(tmp_path / "t.tsv"), urls_of(cut)
    with suppress(KeyboardInterrupt), kept_results(table, FORM, "verify") as kept:
        list(map_shards(partial(_check_shard, rules=Rules()), urls, 1, kept=kept))
        assert [url in kept for url in urls] == [True, False, True, True], "a network may be back the next time"
        raise KeyboardInterrupt
    damaged = next(path for path in kept.folder.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with kept_results(table, FORM, "verify") as kept:
        assert list(map_shards(partial(_check_shard, rules=Rules()), urls, 1, kept=kept)) == [
            _check_shard(url, rules=Rules()) for url in urls
        ]
    with kept_results(table, FORM, "verify, other rules") as kept:
        assert not any(url in kept for url in urls)


def test_counts_of_stats_are_kept_as_they_are(shards: Path, tmp_path: Path) -> None:
    config = load_config(None, [f"data.train={shards}"]).data
    from vlcl.config.samples import keys_of, limits_of

    work = partial(tally_shard, how=How(keys_of(config), limits_of(config), config.background, None))
    with kept_results(str(tmp_path / "t.html"), TALLIES, "stats") as kept:
        new = list(map_shards(work, urls_of(shards), 1, kept=kept))
        assert [kept.load(url) for url in urls_of(shards)] == [work(url) for url in urls_of(shards)] == new
    assert new[0][0].dropped == {"not an image": 1}


@pytest.mark.parametrize("engine", ["spark", "local:4", "rays"])
def test_an_engine_that_is_none(shards: Path, engine: str) -> None:
    done = CliRunner().invoke(cli.app, ["data", "verify", str(shards), "--engine", engine])
    assert done.exit_code == 2
    assert f"--engine '{engine}': allowed are local, ray, and ray:HOST:PORT" in done.stderr


def test_an_address_where_nobody_answers(shards: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    done = CliRunner().invoke(cli.app, ["data", "verify", str(shards), "--engine", "ray:127.0.0.1:1"])
    assert done.exit_code == 2
    assert "no Ray cluster at 127.0.0.1:1: [Errno 111] Connection refused. On its head: ray start --head" in done.stderr


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlcl_data_prep.engine.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Ray, which is not installed: pip install 'vlcl\[ray\]'"):
        map_shards(len, [], engine="ray")


def test_ray_is_imported_only_where_it_is_asked_for(shards: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from vlcl_data_prep.verify import verify_shards; from vlcl_data_prep import pack, stats\n"
        f"verify_shards({str(shards)!r}, 1, output={str(tmp_path / 't.tsv')!r}); print('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def write_list(folder: Path, rows: int = 11) -> Path:
    """Pictures with captions; rows 3, 4 and 5 have none, and 8 no caption."""
    (folder / "images").mkdir(parents=True)
    lines = ["filepath,title"]
    for row in range(rows):
        if row not in (3, 4, 5):
            (folder / "images" / f"{row}.png").write_bytes(picture(row))
        lines.append(f"images/{row}.png,{'' if row == 8 else f'picture {row}'}")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_pack_in_processes_makes_the_same_bytes_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlcl_data_prep import pack as module

    source = write_list(tmp_path / "source")
    one = pack_shards(source, tmp_path / "one", samples_per_shard=3)
    two = pack_shards(source, tmp_path / "two", samples_per_shard=3, workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert one == two
    assert (one.pairs, one.shards, one.skipped) == (7, 3, {"missing file": 3, "empty caption": 1})
    assert sorted(files_of(tmp_path / "one")) == ["00000.tar", "00001.tar", "00002.tar", "skipped.tsv"]
    assert "\n8\tempty caption\timages/8.png\n" in (tmp_path / "one" / "skipped.tsv").read_text()

    def refuse(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_refuse_if_mostly_bad", refuse)
        with suppress(KeyboardInterrupt):
            pack_shards(source, tmp_path / "three", samples_per_shard=3, workers=2)
    assert not (tmp_path / "three").exists()
    assert "4 shards kept" in capsys.readouterr().err
    monkeypatch.setattr(module, "pack_part", refuse)  # nothing is packed a second time
    assert pack_shards(source, tmp_path / "three", samples_per_shard=3, workers=2) == one
    assert files_of(tmp_path / "three") == files_of(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "source", "three", "two"]


def test_pack_to_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.chdir(tmp_path)
    source, out = write_list(tmp_path / "source"), "memory://packed/pairs"
    store = fsspec.filesystem("memory")
    written: list[str] = []
    put = type(store).put_file

    def failing(self: Any, path: str, url: str, *args: Any, **options: Any) -> None:
        written.append(url.rpartition("/")[2])
        if written == ["00000.tar", "00002.tar"]:  # 00001 has no good row
            raise OSError("the network is away")
        put(self, path, url, *args, **options)

    monkeypatch.setattr(type(store), "put_file", failing)
    try:
        with pytest.raises(UserError, match=r"cannot write memory://packed/pairs/00002\.tar: the network is away"):
            pack_shards(source, out, samples_per_shard=3)
        assert not store.exists("/packed/pairs/manifest.json")
        summary = pack_shards(source, out, samples_per_shard=3)
        assert written == ["00000.tar", "00002.tar", "00002.tar", "00003.tar", "skipped.tsv"]
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        here = pack_shards(source, tmp_path / "here", samples_per_shard=3)
        assert summary == here
        there = read_manifest(f"{out}/manifest.json").shards
        local = read_manifest(str(tmp_path / "here" / "manifest.json")).shards
        assert [(x.samples, x.bytes, x.checksum) for x in there] == [(x.samples, x.bytes, x.checksum) for x in local]
        assert [x.name for x in there] == ["00000.tar", "00002.tar", "00003.tar"]
        assert open_source(out).manifest.num_samples == 7
        with pytest.raises(UserError, match="holds 5 files, and nothing is deleted in a store"):
            pack_shards(source, out)
        done = CliRunner().invoke(cli.app, ["data", "pack", str(source), "memory://packed/new"])
        assert done.exit_code == 0, done.output
        assert "listed in memory://packed/new/skipped.tsv" in done.stdout
        assert "next: vlcl train CONFIG data.train=memory://packed/new" in done.stdout
    finally:
        store.rm("/packed", recursive=True)


def test_pictures_within_a_list_do_not_travel(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"image": [picture(0)], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="the pictures are in the list itself"):
        pack_shards(tmp_path / "a.parquet", tmp_path / "out", workers=2)
    assert pack_shards(tmp_path / "a.parquet", tmp_path / "out").pairs == 1


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a CPU each, on this machine."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # functions of this file, on the nodes
    small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20}
    soon = {"health_check_period_ms": 1000}  # a lost node is known of in seconds
    cluster: Any = Cluster(
        initialize_head=True, head_node_args={**small, "include_dashboard": False, "_system_config": soon}
    )
    cluster.second = cluster.add_node(**small)
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    yield cluster
    cluster.shutdown()


def node_of(url: str, seconds: float = 0.5) -> str:
    import ray

    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id()


def test_verify_and_stats_on_two_nodes_find_what_they_find_here(
    cluster: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    engine = f"ray:{cluster.address}"
    monkeypatch.chdir(shards.parent)  # relative paths too
    here = verify_shards("shards", 1, progress=False)
    assert [problem.reason for problem in here] == ["not an image", "empty caption", "not an image"]
    done = CliRunner().invoke(
        cli.app, ["data", "verify", "shards", "--engine", engine, "--output", f"{tmp_path}/t.tsv"]
    )
    assert done.exit_code == 1, done.output
    assert "verify: on Ray, 2 nodes with 2 CPUs" in done.stderr
    assert [line.split("\t")[:4] for line in (tmp_path / "t.tsv").read_text().splitlines()[1:]] == [
        [problem.shard, str(problem.position), problem.key, problem.reason] for problem in here
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["t.tsv"]
    assert not ray.is_initialized()
    source = write_list(tmp_path / "source")
    packed = [
        pack_shards(source, tmp_path / str(n), samples_per_shard=3, engine=e) for n, e in enumerate(("local", engine))
    ]
    assert packed[0] == packed[1]
    assert files_of(tmp_path / "0") == files_of(tmp_path / "1")
    assert len(read_members(tmp_path / "1")) == 7
    config = load_config(None, [f"data.train={shards}"])
    counts = [stats_of(config, urls_of(shards), 1, False, False, engine=engine).tally for engine in ("local", engine)]
    assert counts[0] == counts[1]
    assert counts[0].samples == 17


def test_a_killed_worker_and_a_lost_node_cost_nothing_but_time(cluster: Any, shards: Path, tmp_path: Path) -> None:
    import ray

    ray.init(address=cluster.address, log_to_driver=False)  # a connection of the user's, which stays
    try:
        urls = urls_of(shards)
        expected = [_check_shard(url, rules=Rules()) for url in urls]
        work = partial(check_or_die, folder=str(tmp_path), times=2)
        assert list(map_shards(work, urls, engine="ray")) == expected
        assert len(list(tmp_path.iterdir())) == 2
        with pytest.raises(UserError, match=r"00001\.tar: the process that worked on it was killed, 3 times"):
            list(
                map_shards(partial(check_or_die, folder=str(tmp_path), times=9, victim="00001.tar"), urls, engine="ray")
            )
        with pytest.raises(UserError, match=r"the Ray node \S+ has no /none/0\.tar"):
            list(map_shards(work, ["/none/0.tar"], engine="ray"))
        nodes = list(map_shards(node_of, urls[:1] * 6, engine="ray"))
        assert len(set(nodes)) == 2, "both nodes work"
        found = map_shards(partial(node_of, seconds=1), urls[:1] * 6, engine="ray")
        nodes = [next(found)]
        cluster.remove_node(cluster.second, allow_graceful=False)
        nodes += found
        assert len(nodes) == 6
        assert nodes[-1] == nodes[-2], "the node that is left"
        assert ray.is_initialized()
    finally:
        ray.shutdown()
