"""Configuration: precedence, and one clear line for each wrong field."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.config import DaemonConfig, ModelSource, default_data_dir, describe, load_config
from node.errors import ConfigProblem


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('api = "127.0.0.1:1000"\nthreads = 2\nname = "from file"\n')
    return path


def test_flags_win_over_environment_over_file(toml):
    config = load_config(
        {"api": "127.0.0.1:3000"}, {"SHOAL_API": "127.0.0.1:2000", "SHOAL_THREADS": "3"}, toml
    )
    assert (config.api_host, config.api_port) == ("127.0.0.1", 3000)
    assert config.threads == 3
    assert config.name == "from file"


def test_flags_not_given_change_nothing(toml):
    assert load_config({"api": None, "models": []}, {}, toml).api_port == 1000


def test_without_anything_the_defaults_hold(tmp_path):
    config = load_config({}, {"XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")})
    assert config == DaemonConfig(data_dir=tmp_path / "data" / "shoal", name=config.name)


def test_data_dir_follows_xdg_and_else_the_home():
    assert default_data_dir({"XDG_DATA_HOME": "/x"}) == Path("/x/shoal")
    assert default_data_dir({}).parts[-3:] == (".local", "share", "shoal")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("memory", "6MiB", 6 * 2**20),
        ("memory", "1.5GiB", 3 * 2**29),
        ("memory", "800M", 800 * 10**6),
        ("memory", 4096, 4096),
        ("disk", "1T", 10**12),
    ],
)
def test_sizes(tmp_path, field, value, expected):
    config = load_config({"data_dir": str(tmp_path), field: value}, {"XDG_CONFIG_HOME": str(tmp_path)})
    assert getattr(config, f"{field}_bytes") == expected


def test_models_layers_and_api_are_parsed(tmp_path):
    flags = {"models": ["embedded", "/models/a=b/c"], "layers": "2:5", "api": "[::1]:0"}
    config = load_config(flags, {"XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)})
    assert config.models == (ModelSource("embedded", "embedded"), ModelSource("/models/a", "b/c"))
    assert config.layers == (2, 5)
    assert (config.api_host, config.api_port) == ("::1", 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("api", "8080"),
        ("api", "host:99999"),
        ("layers", "5:2"),
        ("layers", "a:b"),
        ("memory", "lots"),
        ("memory", "0"),
        ("device", "tpu"),
        ("dtype", "float64"),
        ("quant", "int3"),
        ("kv_quant", "int4"),
        ("copies", "0"),
        ("copies", "many"),
        ("threads", -1),
        ("serve", "perhaps"),
        ("log_level", "loud"),
        ("models", ["a=b c"]),
        ("name", "bad\nname"),
        ("listen", 7),
        ("colour", "blue"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(tmp_path, field, value):
    with pytest.raises(ConfigProblem) as caught:
        load_config({"data_dir": str(tmp_path), field: value}, {"XDG_CONFIG_HOME": str(tmp_path)})
    assert field.rstrip("s") in str(caught.value)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_models_of_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigProblem, match="different names"):
        load_config(
            {"data_dir": str(tmp_path), "models": ["/a=m", "/b=m"]}, {"XDG_CONFIG_HOME": str(tmp_path)}
        )


@pytest.mark.parametrize(("text", "match"), [("api = ", "valid TOML"), ("speed = 1", "known fields")])
def test_a_wrong_file_is_named(tmp_path, text, match):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigProblem, match=match):
        load_config({}, {}, path)


def test_a_named_file_must_exist(tmp_path):
    with pytest.raises(ConfigProblem, match="existing TOML file"):
        load_config({}, {}, tmp_path / "none.toml")


def test_secrets_stay_out_of_the_description(tmp_path):
    config = DaemonConfig(tmp_path, api_keys=("hush",), join="shoal1-abcxyz")
    assert "hush" not in str(describe(config))
    assert "abcxyz" not in str(describe(config))


def test_tags_region_devices_and_how_often_plans_are_weighed(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('tags = ["metered", "trusted", "metered"]\nregion = "home"\nrebalance = 2.5\n')
    config = load_config({"device": "cuda:0,cuda:1", "require": ["trusted"]}, {}, file)
    assert (config.tags, config.region, config.rebalance_s) == (("metered", "trusted"), "home", 2.5)
    assert (config.device, config.require, config.ends_require) == ("cuda:0,cuda:1", ("trusted",), ())
    assert load_config({}, {"SHOAL_TAGS": "a,b"}, file).tags == ("a", "b")
    assert load_config({"device": "all"}, {}, file).device == "all"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tags", ["Trusted"]),
        ("tags", ["a b"]),
        ("tags", [""]),
        ("tags", [f"t{k}" for k in range(33)]),
        ("require", ["\x1b[2J"]),
        ("device", "cuda:0,"),
        ("device", "cuda:0,tpu"),
        ("device", "all,cpu"),
        ("rebalance", 0),
        ("rebalance", "soon"),
        ("rebalance", True),
        ("region", "a\nb"),
    ],
)
def test_what_a_node_says_of_itself_is_checked(tmp_path, field, value):
    with pytest.raises(ConfigProblem, match=field):
        load_config({"data_dir": str(tmp_path), field: value}, {"XDG_CONFIG_HOME": str(tmp_path)})


def test_limits_of_serving_come_under_short_names(tmp_path):
    env = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "SHOAL_QUEUE": "9"}
    flags = {"queue_wait": 5, "deadline": "120", "first_token": 2.5, "avoid": 1}
    config = load_config(flags, env)
    assert (config.queue_max, config.queue_wait_s, config.deadline_s) == (9, 5.0, 120.0)
    assert (config.first_token_s, config.avoid_s) == (2.5, 1.0)


@pytest.mark.parametrize(("field", "value"), [("queue", 0), ("deadline", "soon"), ("avoid", 0)])
def test_limits_of_serving_that_are_none_name_themselves(tmp_path, field, value):
    with pytest.raises(ConfigProblem, match=field):
        load_config({field: value}, {"XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)})


def test_how_much_separate_chains_must_gain_is_a_share(tmp_path):
    env = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    assert load_config({}, env).split_gain == 0.15
    assert load_config({"split_gain": "0.4"}, env).split_gain == 0.4
    assert load_config({}, env | {"SHOAL_SPLIT_GAIN": "1"}).split_gain == 1.0
    for wrong in (1.5, -0.1, "much", True, "nan"):
        with pytest.raises(ConfigProblem, match="split_gain"):
            load_config({"split_gain": wrong}, env)


def test_what_is_relayed_with_is_a_rate(tmp_path):
    env = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    assert load_config({}, env).relay_mbps == 20.0
    assert load_config({"relay_mbps": "0"}, env).relay_mbps == 0.0
    assert load_config({}, env | {"SHOAL_RELAY_MBPS": "2.5"}).relay_mbps == 2.5
    for wrong in ("fast", "-1", "nan", "1e9"):
        with pytest.raises(ConfigProblem, match="relay_mbps"):
            load_config({"relay_mbps": wrong}, env)
