"""Where settings come from, and what is said of wrong ones."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from guard.errors import ConfigError
from guard.settings import Settings


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    """Each source overrides the next; a flag that is None was not given."""
    file = tmp_path / "guard.toml"
    file.write_text('listen = "127.0.0.1:1"\nthreads = 1\nmax_turns = 1\n')
    environ = {"GUARD_LISTEN": "127.0.0.1:2", "GUARD_THREADS": "2", "PATH": "/bin"}
    settings = Settings.load({"listen": "127.0.0.1:3", "threads": None}, environ, file)
    assert (settings.listen, settings.threads, settings.max_turns) == ("127.0.0.1:3", 2, 1)
    assert settings.max_in_flight == Settings().max_in_flight


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    """GUARD_CONFIG is used where no file is given by flag."""
    file = tmp_path / "guard.toml"
    file.write_text("threads = 3\n")
    assert Settings.load({}, {"GUARD_CONFIG": str(file)}).threads == 3


def test_every_problem_is_told_at_once_with_its_source(tmp_path: Path) -> None:
    """Unknown names and wrong values of all sources come in one error, a line each."""
    file = tmp_path / "guard.toml"
    file.write_text('max_turn = 1\nlog_level = "loud"\n')
    with pytest.raises(ConfigError) as raised:
        Settings.load({"listen": "here"}, {"GUARD_THREADS": "many", "GUARD_ZZZ": "1"}, file)
    assert sorted(str(raised.value).splitlines()) == sorted(
        [
            f"{file}: max_turn: unknown setting, did you mean max_turns?",
            "GUARD_ZZZ: unknown setting",
            "--listen: should be HOST:PORT, found 'here'",
            "GUARD_THREADS: Input should be a valid integer, unable to parse string as an integer, found 'many'",
            f"{file}: log_level: Input should be 'debug', 'info', 'warning' or 'error', found 'loud'",
        ]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file or directory"), ("threads =", "Invalid value (at end of document)")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    """A missing file, or one that is not TOML, is a ConfigError that begins with its path."""
    file = tmp_path / "guard.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        Settings.load({}, {}, file)
    assert str(raised.value) == f"{file}: {message}"


def test_variables_that_kubernetes_sets_for_a_service_called_guard_are_not_ours() -> None:
    """A Service beside the pod does not keep it from starting."""
    links = {
        "GUARD_SERVICE_HOST": "10.0.0.1",
        "GUARD_SERVICE_PORT_GRPC": "50051",
        "GUARD_PORT": "tcp://10.0.0.1:50051",
        "GUARD_PORT_50051_TCP_ADDR": "10.0.0.1",
        "GUARD_EU_SERVICE_HOST": "10.0.0.2",
    }
    assert Settings.load({}, links) == Settings()


def test_tls_comes_whole(tmp_path: Path) -> None:
    """A certificate without its key is refused."""
    cert = tmp_path / "cert.pem"
    cert.touch()
    with pytest.raises(ConfigError, match=r"^tls_cert and tls_key go together$"):
        Settings.load({"tls_cert": cert}, {})
    with pytest.raises(ConfigError, match=r"^tls_client_ca needs tls_cert and tls_key$"):
        Settings.load({"tls_client_ca": cert}, {})


def test_settings_cannot_be_changed() -> None:
    """The object that was handed down stays what it was."""
    with pytest.raises(ValidationError, match="frozen"):
        Settings().threads = 4  # type: ignore[misc]


def test_a_model_that_is_computed_elsewhere(tmp_path: Path) -> None:
    """A URL in place of a directory names both, and what the model is called there."""
    url = f"openai+http://localhost:8000/v1?tokenizer={tmp_path}&model=lg"
    settings = Settings.load({"model": url}, {})
    assert (settings.model, settings.endpoint, settings.endpoint_model) == (tmp_path, "http://localhost:8000/v1", "lg")
    settings = Settings.load({}, {"GUARD_MODEL": f"openai+https://host/v1?tokenizer={tmp_path}"})
    assert (settings.endpoint, settings.endpoint_model) == ("https://host/v1", None)
    assert Settings.load({"model": str(tmp_path), "endpoint": "http://host/v1"}, {}).endpoint == "http://host/v1"


@pytest.mark.parametrize(
    "url", ["openai+http://host/v1", "openai+ftp://host?tokenizer=.", "openai+http://h?tokenizer=.&key=x"]
)
def test_a_url_that_says_too_little_or_too_much(url: str) -> None:
    with pytest.raises(ConfigError, match="openai\\+http://HOST:PORT/v1\\?tokenizer=DIR"):
        Settings.load({"model": url}, {})
