"""Settings: what is read, what is refused and in which words, and that the shipped files and the docs agree with it."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from vlcl.config import (
    Config,
    DataConfig,
    EMConfig,
    ModelConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from vlcl.config.docs import key_table
from vlcl.config.errors import describe, keys_of
from vlcl.config.losses import InfoNCEConfig
from vlcl.errors import UserError

ROOT = Path(__file__).parents[1]
TRAIN = "data.train=shards"


def mistakes(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "example.yaml"
    path.write_text(text)
    return path


# ---- what is read


def test_defaults_need_only_the_shards() -> None:
    config = load_config(None, [TRAIN])
    assert (config.data.train, config.model.name, config.loss.name) == ("shards", "ViT-B-32", "em")
    assert (config.train.steps, config.train.epochs, config.resume) == (None, 32, None)


def test_later_values_win(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: a}\noptim:\n  lr: 1e-3\n")
    assert load_config(path).optim.lr == 1e-3
    assert load_config(path, ["optim.lr=1E-2", "optim.lr=2"]).optim.lr == 2.0


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("5E4", 5e4), ("+.5e1", 5.0), ("1.5e3", 1500.0), ("3", 3.0)]
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert load_config(None, [TRAIN, f"optim.lr={text}"]).optim.lr == value


def test_values_of_overrides() -> None:
    config = load_config(
        None,
        [
            "data.train={0000..0331}.tar",
            "data.val=*.tar",
            'eval.templates=["a {}.", "the {}"]',
            "optim.clip_norm=null",
            "log.trackers=[]",
            "train.output=2024-01-01",
        ],
    )
    assert (config.data.train, config.data.val) == ("{0000..0331}.tar", "*.tar")
    assert config.eval.templates == ["a {}.", "the {}"]
    assert config.optim.clip_norm is None
    assert config.log.trackers == []
    assert config.train.output == "2024-01-01"


def test_steps_and_epochs_take_each_other_back(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: a}\ntrain: {epochs: 3}\n")

    def length(*overrides: str) -> tuple[int | None, float | None]:
        config = load_config(path, overrides)
        return config.train.steps, config.train.epochs

    assert length() == (None, 3)
    assert length("train.steps=100") == (100, None)
    assert length("train.steps=100", "train.epochs=0.5") == (None, 0.5)
    assert length("train.epochs=2", "train.steps=7") == (7, None)
    assert length("train.steps=null") == (None, 3)


def test_another_loss_drops_the_files_settings_of_the_first(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: a}\nloss: {name: em, gamma: 0.5}\n")
    assert load_config(path, ["loss.name=infonce"]).loss == InfoNCEConfig()
    assert load_config(path, ["loss.name=em"]).loss == EMConfig(gamma=0.5)
    assert load_config(path, ["loss.mode=sample"]).loss == EMConfig(gamma=0.5, mode="sample")
    path = write(tmp_path, "data: {train: a}\nloss: {name: infonce}\n")
    assert load_config(path, ["loss.gamma=0.3", "loss.name=em"]).loss == EMConfig(gamma=0.3)


def test_output_is_named_after_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: a}\noptim:\n")
    assert load_config(path).train.output == "runs/example"
    assert load_config(path, ["train.output=null"]).train.output == "runs/example"
    assert load_config(path, ["train.output=elsewhere"]).train.output == "elsewhere"


def test_dump_reads_back(tmp_path: Path) -> None:
    overrides = [TRAIN, "train.steps=5", "optim.eps=1e-9", "loss.max_log_weight=-1", "data.val='1e-3'", "resume=latest"]
    config = load_config(None, [*overrides, "model.pretrained='true'", "data.text_key='2024-01-01'"])
    text = dump_config(config)
    assert load_config(write(tmp_path, text)) == config
    assert yaml.safe_load(text)["checkpoint"]["every"] == 1000


def test_notebook_use() -> None:
    config = Config(data=DataConfig(train="a"), loss=EMConfig(gamma=1), train=TrainConfig(steps=3))
    assert config.loss == EMConfig(gamma=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match=r"train\.batch_size=10 must be a multiple of train\.accumulate=3"):
        Config(data=DataConfig(train="a"), train=TrainConfig(batch_size=10, accumulate=3))


# ---- what is refused


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, 'data: {trian: a, workers: "8"}\ntrain: {batch_size: 10, accumulate: 3}\noptm: {lr: 1}\n')
    text = mistakes("optim.schedule=cosin", "train.seed", path=path)
    assert text.startswith(f"7 mistakes in the settings of {path}:")
    for part in (
        "'train.seed': an override looks like key=value",
        "data.train: required",
        "data.trian: there is no such key; did you mean 'data.train'?",
        'data.workers: got "8"; allowed: a whole number >= 0, or null',
        "optim.schedule: got \"cosin\"; allowed: cosine, constant, wsd; did you mean 'cosine'?",
        "optm: there is no such key; did you mean 'optim'?",
        "train.batch_size=10 must be a multiple of train.accumulate=3",
        "docs/config.md",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("lr=1", "optim.lr"),
        ("train.lr=1", "optim.lr"),
        ("optim.steps=1", "train.steps"),
        ("wd=0", "optim.weight_decay"),
        ("accum-freq=2", "train.accumulate"),
        ("train.accum_freq=2", "train.accumulate"),
        ("optim.weight_deacy=0", "optim.weight_decay"),
        ("batch_size=2", "train.batch_size' or 'eval.batch_size"),
        ("loss.gama=2", "loss.gamma"),
        ("chekpoint=2", "checkpoint"),
    ],
)
def test_unknown_keys_have_suggestions(override: str, suggestion: str) -> None:
    key = override.partition("=")[0]
    assert f"  {key}: there is no such key; did you mean '{suggestion}'?\n" in mistakes(TRAIN, override)


def test_far_off_keys_have_none() -> None:
    assert "  data.zzzz: there is no such key\n" in mistakes(TRAIN, "data.zzzz=1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=1.5", "train.steps: got 1.5; allowed: a whole number >= 1, or null"),
        ("train.steps=true", "train.steps: got true; allowed: a whole number"),
        ("train.steps=0", "train.steps: got 0; allowed: a whole number >= 1"),
        ("train.compile='true'", 'train.compile: got "true"; allowed: true or false'),
        ("train.compile=1", "train.compile: got 1; allowed: true or false"),
        ("optim.lr=fast", 'optim.lr: got "fast"; allowed: a number > 0'),
        ("optim.lr=.inf", "optim.lr: got Infinity; allowed: a number > 0"),
        ("optim.lr=", "optim.lr: got null; allowed: a number > 0"),
        ("optim.name=lamb", 'optim.name: got "lamb"; allowed: adamw, or timm/NAME'),
        ("loss.gamma=0", "loss.gamma: got 0; allowed: a number > 0 and <= 1"),
        ("data.max_bad_share=2", "data.max_bad_share: got 2; allowed: a number >= 0 and <= 1"),
        ("data.train=[]", "data.train: got []; allowed: text (not empty), or a list of texts"),
        ("data.train=[a, 3]", 'data.train: got ["a", 3]; allowed: text (not empty), or a list of texts'),
        ("eval.templates=[photo]", 'eval.templates: got ["photo"]; allowed: a list of texts with "{}" in each'),
        ("log.trackers=[wandbb]", "allowed: a list of: tensorboard, wandb, trackio; did you mean 'wandb'?"),
        ("train.precision=amp_bf16", "allowed: fp32, bf16, fp16, or null; did you mean 'bf16'?"),
        ("model=ViT-B-32", "did you mean model.name=ViT-B-32?"),
        ("loss=infonce", "did you mean loss.name=infonce?"),
        ("train=3", "train: got 3; allowed: a section with output, steps"),
        ("eval.templates=[a", "eval.templates: '[a' is not YAML"),
    ],
)
def test_wrong_values_say_what_is_allowed(override: str, words: str) -> None:
    text = mistakes(TRAIN, override)
    assert text.startswith("a mistake in the settings:")
    assert words in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.weights=[1]"], "data.weights needs data.resample=true"),
        (["data.weights=[1, 2, 3]", "data.resample=true"], "data.weights has 3 numbers for 2 sources"),
        (["data.manifest=m.json"], "data.manifest names 1 files for 2 sources"),
        (["data.val_manifest=m.json"], "data.val_manifest names 1 files for 0 sources"),
        (["data.test=a::b", "data.test_manifest=m.json"], "names 1 files for 2 sources in data.test"),
        (["data.workers=3"], "data.streams=8 must be a multiple of data.workers=3"),
        (["model.lock_image_unlocked_groups=1"], "needs model.lock_image=true"),
        (["model.lock_text_unlocked_layers=1"], "needs model.lock_text=true"),
        (
            ["data.train=[a, b]", "data.weights=[1, 2]", "data.resample=true"],
            "data.weights has 2 numbers for 1 sources",
        ),
        (["model.logit_scale_init=200"], "model.logit_scale_init=200.0 is above model.logit_scale_max=100.0"),
        (["optim.lr_min=1"], "optim.lr_min=1.0 is above optim.lr=0.0005"),
        (["train={steps: 2, epochs: 3}"], "train.steps=2 and train.epochs=3.0 are both given"),
        (["train.accumulate=3"], "train.batch_size=1024 must be a multiple of train.accumulate=3"),
        (["checkpoint.keep_best=val/text_to_image_R@1", "eval.every=9"], "has none: set data.val=SHARDS"),
        (["checkpoint.keep_best=test/text_to_image_R@1", "data.val=v", "eval.every=9"], "has val/image_to_text_R@1, "),
        (["checkpoint.keep_best=val/text_to_image_R@1", "data.val=v"], "keep_best needs eval.every=STEPS"),
        (["checkpoint.keep_every=1500"], "must be a multiple of checkpoint.every=1000"),
    ],
)
def test_settings_that_disagree(overrides: list[str], words: str) -> None:
    sources = [] if overrides[0] == "data.weights=[1]" else ["data.train=a::b"]
    text = mistakes(TRAIN, *sources, *overrides)
    assert text.startswith("a mistake in the settings:")
    assert words in text


def test_settings_that_agree() -> None:
    load_config(None, ["data.train=a::b", "data.weights=[1, 2.5]", "data.resample=true", "data.manifest=[m, n]"])
    load_config(None, ["data.train=[a, b]", "data.weights=[1]", "data.resample=true", "data.manifest=m"])
    load_config(None, [TRAIN, "data.workers=0", "data.streams=3", "checkpoint.keep_every=5000"])


def test_a_wrong_value_is_not_reported_as_a_disagreement_as_well() -> None:
    assert "multiple" not in mistakes(TRAIN, "train.accumulate=3", "train.batch_size=big")


def test_loss_settings_belong_to_one_loss(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: a}\nloss: {name: infonce, gamma: 0.5}\n")
    text = mistakes(path=path)
    assert 'loss "infonce" has no such setting (it is of sogclr, isogclr, em); leave it out or set loss.name=em' in text
    text = mistakes(TRAIN, "loss.name=infonc")
    assert 'loss.name: got "infonc"; allowed: infonce, dcl, siglip, ' in text
    assert "did you mean 'infonce'?" in text


# ---- files


def test_yaml_mistakes_have_a_line(tmp_path: Path) -> None:
    text = mistakes(path=write(tmp_path, "data:\n  train: {00..03}.tar\n"))
    assert "example.yaml, line 2, column 18:" in text
    assert text.endswith("put the text after the colon in quotes: train: {00..03}.tar")
    assert mistakes(path=write(tmp_path, "data:\n\ttrain: a\n")).endswith("cannot start any token")
    text = mistakes(path=write(tmp_path, "data:\n  train: a\ndata:\n  val: b\n"))
    assert "example.yaml, line 3, column 1: key 'data' is given twice" in text
    assert "holds no sections" in mistakes(path=write(tmp_path, "- a\n"))


def test_yaml_anchors_work(tmp_path: Path) -> None:
    path = write(
        tmp_path, "data: {train: &shards a, val: *shards}\neval: &e {every: 5}\ncheckpoint:\n  <<: *e\n  keep: 3\n"
    )
    config = load_config(path)
    assert (config.data.val, config.checkpoint.every, config.checkpoint.keep) == ("a", 5, 3)


def test_missing_file(tmp_path: Path) -> None:
    write(tmp_path, "")
    assert "did you mean" in mistakes(path=tmp_path / "exampel.yaml")
    assert "the first argument is the config file" in mistakes(path=Path("optim.lr=1"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs(path: Path) -> None:
    config = load_config(path)
    command, result = path.read_text().splitlines()[:2]
    assert command.startswith("# ")
    assert f"configs/{path.name}" in command
    assert result.startswith("# result: ")
    assert config.train.output == f"runs/{path.stem}"


# ---- docs


def test_every_key_is_described() -> None:
    docs = (ROOT / "docs" / "config.md").read_text()
    for key in keys_of(Config):
        assert key.field.description, key.path
        assert key.path in docs
        assert describe(key.field.annotation, key.field.metadata)
    assert docs == key_table(Config), "run: python -m vlcl.config > docs/config.md"


def test_names_that_scripts_rely_on() -> None:
    contract = """data.train data.val data.workers model.name model.pretrained loss.name train.output train.steps
        train.epochs train.batch_size train.accumulate train.precision train.seed optim.lr checkpoint.every resume"""
    assert set(contract.split()) <= {key.path for key in keys_of(Config)}
    assert ModelConfig().logit_scale_max == 100


def test_a_shipped_experiment_is_found_by_its_name_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("openmoji")
    assert config.data.train == "data/openmoji/train"
    assert config.train.output == "runs/openmoji"
    with pytest.raises(UserError, match="did you mean 'openmoji'"):
        load_config("openmojy")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ("train.negatives=chunk", "train.negatives=chunk needs a loss whose gradients add up over chunks"),
        ("train.negatives=chunk loss.order=before loss.mode=sample", "goes with neither loss.mode=sample"),
        (
            "loss.name=fastclip-v3 loss.warm=1",
            "loss.warm=1 would change nothing: loss.name=fastclip-v3 takes only the batch",
        ),
        ("loss.name=neuclip loss.warm=1", "loss.name=neuclip remembers no rows"),
        ("loss.name=isogclr loss.tau=0.07", "loss.tau=0.07 is not between loss.tau_min=0.005 and loss.tau_max=0.05"),
        ("loss.name=fastclip-v2 loss.tau_max=2", "loss.tau_max: got 2; allowed: a number > 0 and <= 1"),
        ("loss.bank_negatives=true", "loss.bank_negatives=true needs a bank"),
    ],
)
def test_settings_of_a_loss_that_do_not_go_together(overrides: str, text: str) -> None:
    assert text in mistakes(TRAIN, *overrides.split())
