"""Recipes: what they hold, what overrides them, and one clear line for each mistake."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from andromeda.config import preset
from andromeda.errors import AndromedaError
from andromeda.training.recipe import DataRecipe, Recipe, check_vocabulary, read_recipe

RECIPE = """
model:
  preset: nano
  dim: 64
data:
  train: [a.txt, b.jsonl]
steps: 50
learning_rate: 4e-3
betas: [0.9, 0.99]
"""
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "poems.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_with_its_defaults(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.model == {"preset": "nano", "dim": 64}
    assert recipe.data.train_paths == ["a.txt", "b.jsonl"]
    assert recipe.data.validation_paths == []
    assert recipe.data.packed_documents
    assert (recipe.steps, recipe.learning_rate, recipe.betas) == (50, 0.004, (0.9, 0.99))
    assert recipe.output == "runs/poems"
    assert recipe.schedule == "cosine" and recipe.clip_norm == 1.0 and recipe.tokenizer.vocab_size is None


def test_dashboards(path: Path) -> None:
    assert read_recipe(path).track == []
    assert read_recipe(path, ["track=[tensorboard]"]).track == ["tensorboard"]
    with pytest.raises(AndromedaError, match=r"track: must be one of tensorboard, trackio; got 'wandb'"):
        read_recipe(path, ["track=[wandb]"])


def test_overrides(path: Path) -> None:
    recipe = read_recipe(
        path,
        [
            "steps=7", "model.dim=128", "model.tie_embeddings=false", "model.window_epsilon=1e-3", "data.train=c.txt",
            "data.validation=[d.txt, e.txt]", "tokenizer.vocab_size=300", "clip_norm=null", "--seed=3", "output=out",
        ],
    )  # fmt: skip
    assert recipe.steps == 7
    assert recipe.model == {"preset": "nano", "dim": 128, "tie_embeddings": False, "window_epsilon": 1e-3}
    assert recipe.data.train_paths == ["c.txt"]
    assert recipe.data.validation_paths == ["d.txt", "e.txt"]
    assert recipe.tokenizer.vocab_size == 300
    assert recipe.clip_norm is None and recipe.seed == 3 and recipe.output == "out"


def test_what_is_stored_reads_as_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path, ["model.tie_embeddings=false", "learning_rate=1e-5", "clip_norm=null"])
    (tmp_path / "stored.yaml").write_text(recipe.to_yaml())
    assert read_recipe(tmp_path / "stored.yaml") == recipe
    assert list(yaml.safe_load(recipe.to_yaml())) == [item.name for item in fields(Recipe)]


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_repository_s_recipes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    read = read_recipe(recipe)
    read.config()
    for text in (*read.data.train_paths, *read.data.validation_paths):
        assert Path(text).is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning_rate=1", r"'lerning_rate=1': no key 'lerning_rate' in a recipe; did you mean 'learning_rate'"),
        ("data.trian=a", r"no key 'data\.trian' in a recipe; did you mean 'data\.train'"),
        ("config=/etc/passwd", r"no key 'config' in a recipe"),
        ("help=1", r"no key 'help' in a recipe"),
        ("steps", r"'steps': an override is key=value"),
        ("steps=many", r"poems\.yaml: steps: must be a whole number or null; got 'many'"),
        ("steps=1.5", r"poems\.yaml: steps: must be a whole number or null; got '1\.5'"),
        ("learning_rate=x", r"learning_rate: must be a number; got 'x'"),
        ("clip_norm=x", r"clip_norm: must be a number or null; got 'x'"),
        ("tokenizer.vocab_size=x", r"tokenizer\.vocab_size: must be a whole number or null; got 'x'"),
        ("data.packed_documents=3", r"data\.packed_documents: must be true or false; got '3'"),
        ("betas=[1]", r"betas: must be a list of two numbers; got '\[1\]'"),
        ("schedule=linear", r"poems\.yaml: schedule: must be one of cosine, wsd, constant; got 'linear'"),
        ("engine=zero4", r"engine: must be one of ddp, fsdp, zero3; got 'zero4'"),
        ("offload=disk", r"offload: must be one of none, cpu, nvme; got 'disk'"),
        ("offload=cpu", r"offload='cpu' is for engine='zero3', not 'ddp'; change one of them"),
        ("nvme_path=/nvme", r"nvme_path='/nvme' goes with offload='nvme', and names a directory; give both or none"),
        ("failed_save=no", r"failed_save: must be one of stop, go_on; got 'no'"),
        ("spike=1", r"spike=1\.0 must be more than 1; null for none"),
        ("optimizer=sgd", r"optimizer: must be one of adamw, adamw8bit, muon; got 'sgd'"),
        ("precision=float64", r"precision: must be one of float32, bfloat16, float16, fp8; got 'float64'"),
        ("checkpointing=yes", r"checkpointing: must be one of none, selective, full; got 'yes'"),
        ("data=3", r"poems\.yaml: .*data"),
        ("model=3", r"poems\.yaml: model: must be keys with values; got '3'"),
        ("model.dpeth=2", r"'model\.dpeth=2': no key 'model\.dpeth' in a recipe; did you mean 'model\.depth'"),
        ("model.dimension=3", r"no key 'model\.dimension' in a recipe; keys: preset, from, num_tokens, "),
        ("steps=0", r"poems\.yaml: recipe: steps=0 must be at least 1"),
        ("seq_len=1", r"seq_len=1 must be at least 2"),
        ("learning_rate=0", r"learning_rate=0\.0 must be positive"),
        ("learning_rate=.nan", r"learning_rate=nan must be finite"),
        ("learning_rate=.inf", r"learning_rate=inf must be finite"),
        ("weight_decay=.inf", r"weight_decay=inf must be finite"),
        ("seed=9223372036854775808", r"poems\.yaml: .*seed=9223372036854775808 must lie between 0 and 2\^63 - 1"),
        ("seed=-1", r"seed=-1 must lie between 0 and 2\^63 - 1"),
        ("betas=[0.9,1.0]", r"betas=\[0\.9, 1\.0\] must lie in \[0, 1\)"),
        ("clip_norm=0", r"clip_norm=0\.0 must be positive; null for none"),
        ("final_ratio=2", r"final_ratio=2\.0 must lie in \[0, 1\]"),
        ("decay_fraction=0", r"decay_fraction=0\.0 must lie in \(0, 1\]"),
        ("warmup_steps=-1", r"warmup_steps=-1 must not be negative"),
        ("data.train=[]", r"data\.train=\[\] must name at least one file, or data\.build a build"),
        ("data.train=", r"data\.train='' is empty; name text files"),
        ("data.validation=", r"data\.validation='' is empty; name text files, or \[\] for no validation"),
        ("model.from=runs/a", r"model\.preset='nano' cannot change the model of model\.from"),
        ("model.preset=3", r"model\.preset=3 must be a name"),
        ("model={dpeth: 2}", r"'model=.*': no key 'model\.dpeth' in a recipe; did you mean 'model\.depth'"),
        ("diloco=3", r"diloco: must be keys with values or null; got '3'"),
        ("diloco={every: 3}", r"diloco: the following arguments are required: lighthouse"),
        ("diloco={lighthouse: a, every: 0}", r"poems\.yaml: recipe: diloco\.every=0 must be at least 1"),
        ("diloco={lighthouse: a, method: sgd}", r"diloco\.method: must be one of diloco, local_sgd; got 'sgd'"),
        ("diloco={lighthouse: a, metod: sgd}", r"no key 'diloco\.metod' in a recipe; did you mean 'diloco\.method'"),
        ("lora.rank=many", r"lora\.rank: must be a whole number; got 'many'"),
    ],
)
def test_mistakes_in_one_line(path: Path, override: str, message: str) -> None:
    with pytest.raises(AndromedaError, match=message) as raised:
        read_recipe(path, [override])
    assert "\n" not in str(raised.value)


def test_moments_in_eight_bits_do_not_go_with_shared_weights(path: Path) -> None:
    assert read_recipe(path, ["optimizer=adamw8bit"]).engine == "ddp"
    with pytest.raises(AndromedaError, match=r"optimizer='adamw8bit' cannot be gathered from engine='fsdp' yet"):
        read_recipe(path, ["optimizer=adamw8bit", "engine=fsdp"])


def test_eight_bits_are_not_for_adapters(path: Path) -> None:
    with pytest.raises(AndromedaError, match=r"precision='fp8' is for whole weights"):
        read_recipe(path, ["precision=fp8", "model={from: runs/base}", "lora={}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer=muon",
            r"optimizer='muon' is not exact with engine='zero3', which holds parts of matrices; take adamw",
        ),
        ("optimizer=adamw8bit", r"optimizer='adamw8bit' is not exact with engine='zero3'"),
        ("precision=fp8", r"precision='fp8' does not go with engine='zero3'; take bfloat16"),
        ("precision=float16", r"precision='float16' does not go with engine='zero3'; take bfloat16"),
        (
            "tasks={text: {}}",
            r"tasks=\['text'\] does not go with engine='zero3', where a weight that a batch leaves out",
        ),
        ("context_parallel=2", r"context_parallel=2 does not go with engine='zero3' yet; take another"),
        ("compile=true", r"compile=True does not go with engine='zero3'; take another, or false"),
        ("offload=nvme", r"nvme_path=None goes with offload='nvme', and names a directory; give both or none"),
    ],
)
def test_what_zero3_does_not_go_with(path: Path, override: str, message: str) -> None:
    with pytest.raises(AndromedaError, match=message) as raised:
        read_recipe(path, ["engine=zero3", override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=zero3"], r"engine='zero3' does not go with diloco yet; leave one out"),
        (["context_parallel=2"], r"context_parallel=2 does not go with diloco yet"),
        (["tasks={text: {}}"], r"tasks=\['text'\] does not go with diloco yet"),
        (["model={from: runs/a}", "lora={rank: 3}"], r"lora\.rank=3 does not go with diloco yet"),
        (["data={build: build/a}"], r"data\.build='build/a' is the same for all groups of diloco; name texts"),
    ],
)
def test_what_diloco_does_not_go_with(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(AndromedaError, match=message) as raised:
        read_recipe(path, ["diloco={lighthouse: a}", *overrides])
    assert "\n" not in str(raised.value)


BUILD = "model: {preset: nano, dim: 64}\ndata: {build: build/small, validation: c.txt}\n"


def test_a_recipe_on_a_build(path: Path) -> None:
    path.write_text(BUILD)
    recipe = read_recipe(path)
    assert recipe.data.build == "build/small" and recipe.data.train_paths == []
    assert recipe.steps is None and recipe.within(77).num_steps == 77
    assert read_recipe(path, ["steps=77"]).within(77).num_steps == 77
    with pytest.raises(AndromedaError, match=r"steps=78 is more than the 77 that build/small has for this batch_size"):
        read_recipe(path, ["steps=78"]).within(77)
    assert recipe.config(longest=1024) == preset("nano", dim=64, max_seq_len=1024)
    named = read_recipe(path, ["model.max_seq_len=512"])
    assert named.config(longest=256).max_seq_len == 512 and named.sequence_length(named.config(), 256) == 256
    with pytest.raises(AndromedaError, match=r"'build/small' has sequences of 1,024 tokens, more than .*=512; raise"):
        named.sequence_length(named.config(longest=1024), 1024)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=a.txt", r"data\.train='a\.txt' cannot be read beside data\.build; leave one out"),
        ("data.packed_documents=false", r"data\.packed_documents=False is for data\.train"),
        ("data.build=", r"data\.build='' is empty; name the directory of a build"),
        ("data.bulid=a", r"no key 'data\.bulid' in a recipe; did you mean 'data\.build'"),
        ("seq_len=128", r"seq_len=128 is for data\.train; a build has lengths of its own"),
        ("tokenizer.vocab_size=300", r"tokenizer\.vocab_size=300 is for data\.train; a build has its tokenizer"),
        ("tokenizer.path=a", r"tokenizer\.path='a' is for data\.train"),
    ],
)
def test_what_a_build_brings_itself(path: Path, override: str, message: str) -> None:
    path.write_text(BUILD)
    with pytest.raises(AndromedaError, match=message) as raised:
        read_recipe(path, [override])
    assert "\n" not in str(raised.value)


def test_a_tokenizer_is_either_there_or_trained(path: Path) -> None:
    with pytest.raises(AndromedaError, match=r"tokenizer\.vocab_size=300 is for a new tokenizer"):
        read_recipe(path, ["tokenizer.path=a", "tokenizer.vocab_size=300"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: 3\nwarmup: 2\n", r"r\.yaml: no key 'warmup' in a recipe; did you mean 'warmup_steps'"),
        ("data: {training: a}", r"r\.yaml: no key 'data\.training' in a recipe; did you mean 'data\.train'"),
        ("model: {dpeth: 2}", r"r\.yaml: no key 'model\.dpeth' in a recipe; did you mean 'model\.depth'"),
        ("zzz: 2\n", r"r\.yaml: no key 'zzz' in a recipe; keys: data, model, "),
        ("steps: [\n", r"r\.yaml: is not YAML: .*line 2"),
        ("", r"r\.yaml: holds no keys"),
        ("- a\n", r"r\.yaml: holds no keys"),
        ("steps: 3\n", r"r\.yaml: .*required: model"),
        ("model: {}\n", r"r\.yaml: .*data\.train"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(AndromedaError, match=message) as raised:
        read_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(raised.value)


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match=r"none\.yaml: no such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(AndromedaError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(AndromedaError, match=r"latin\.yaml: is not YAML"):
        read_recipe(tmp_path / "latin.yaml")


def test_the_vocabulary_follows_the_tokenizer_unless_it_is_named(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.config() == preset("nano", dim=64)
    assert recipe.config(vocab_size=300) == preset("nano", dim=64, num_tokens=320)
    assert recipe.config(vocab_size=320).num_tokens == 320
    named = read_recipe(path, ["model.num_tokens=300"])
    assert named.config(vocab_size=290).num_tokens == 300
    with pytest.raises(AndromedaError, match=r"the tokenizer has 2,049 tokens, more than the model's num_tokens=2,048"):
        check_vocabulary(preset("nano"), 2049)


def test_the_config_checks_the_model_s_keys(path: Path) -> None:
    with pytest.raises(AndromedaError, match="unknown key 'dimension'"):
        Recipe(DataRecipe("a.txt"), {"dimension": 3}).config()
    with pytest.raises(AndromedaError, match="no preset 'huge'"):
        read_recipe(path, ["model.preset=huge"]).config()
    with pytest.raises(AndromedaError, match=r"dim=6\.5 must be of type int"):
        read_recipe(path, ["model.dim=6.5"]).config()


def test_sequences_are_no_longer_than_the_model_s(path: Path) -> None:
    config = preset("nano")
    assert read_recipe(path).sequence_length(config) == 256
    assert read_recipe(path, ["seq_len=100"]).sequence_length(config) == 100
    with pytest.raises(AndromedaError, match=r"seq_len=257 is more than the model's max_seq_len=256"):
        read_recipe(path, ["seq_len=257"]).sequence_length(config)
