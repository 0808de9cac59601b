"""What a recipe says of its options, and of those that it does not know."""

from dataclasses import dataclass, field

import pytest
from trl import ModelConfig

from hf_thinktok import ThinkTokConfig
from hf_thinktok.recipe_options import read_options, recipe_parser


@dataclass
class OwnArguments:
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run for each."})


DOC = """What it does.

    python recipe.py --seeds 0 1
"""


def read(*words):
    return read_options(recipe_parser(DOC, OwnArguments, ThinkTokConfig, ModelConfig), [str(word) for word in words])


def test_the_help_has_the_docstring_and_thinking_apart():
    words = recipe_parser(DOC, OwnArguments, ThinkTokConfig, ModelConfig).format_help()
    assert "\n    python recipe.py --seeds 0 1\n" in words
    order = [words.index(f"\n{title}:\n") for title in ("this recipe", "thinking", "model", "training, of TRL", "training, of transformers")]
    assert order == sorted(order)
    places = [words.index(f"\n  --{name} ") for name in ("seeds", "num_forks", "model_name_or_path", "max_length", "learning_rate")]
    assert all(title < place for title, place in zip(order, places, strict=True))
    assert all(place < title for place, title in zip(places, order[1:], strict=False))
    assert "Sets disable_dropout to false." in " ".join(words.split())


def test_the_command_line_comes_before_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("seeds: [3]\nnum_forks: 5\nuse_peft: true\n")
    own, args, model = read("--num_forks", 7, "--config", tmp_path / "run.yaml")
    assert (own.seeds, args.num_forks, model.use_peft) == ([3], 7, True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num_fork", "4"], r"The command line has the option num_fork, which is not known; did you mean num_forks\?$"),
        (["--num_fork=4"], r"option num_fork, which is not known; did you mean num_forks\?$"),
        (["--xylophone"], "option xylophone, which is not known.$"),
        (["xylophone"], "The command line has 'xylophone', which is the value of no option"),
        (["--num_forks", "x"], "--num_forks.*invalid int value: 'x'"),
        (["--config"], "--config needs a YAML file"),
        (["--config", "{folder}/nowhere.yaml"], "nowhere.yaml cannot be read: No such file"),
        (["--config", "{folder}/numbers.yaml"], "^output_dir=7 is no text: put it in quotes.$"),
        (["--config", "{folder}/latin.yaml"], "latin.yaml is not in UTF-8: save it so.$"),
        (["--config", "{folder}/run.yaml"], r"run.yaml has the option max_lenght, which is not known; did you mean max_length\?$"),
    ],
)
def test_what_is_not_known_is_named_with_the_nearest(words, sentence, tmp_path):
    (tmp_path / "run.yaml").write_text("max_lenght: 8\n")
    (tmp_path / "numbers.yaml").write_text("output_dir: 7\n")
    (tmp_path / "latin.yaml").write_bytes("output_dir: café".encode("latin-1"))
    with pytest.raises(ValueError, match=sentence):
        read(*(word.format(folder=tmp_path) for word in words))


def test_a_config_may_be_given_with_an_equals_sign(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("num_forks: 5\n")
    monkeypatch.setattr("sys.argv", ["recipe.py", f"--config={tmp_path / 'run.yaml'}"])
    assert read_options(recipe_parser(DOC, OwnArguments, ThinkTokConfig, ModelConfig))[1].num_forks == 5
