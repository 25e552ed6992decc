"""The application of Ray Serve, with a replacement for `ray.serve` that keeps what it is given."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from support.models import early_exit

from earlyexit_kernels.data import toy
from earlyexit_kernels.serving.server import Options
from earlyexit_kernels.serving.source import Source


def deployment(**settings):
    return lambda cls: SimpleNamespace(bind=lambda options: (settings, options))


@pytest.fixture
def app(monkeypatch):
    serve = SimpleNamespace(deployment=deployment, ingress=lambda: lambda cls: cls)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.delitem(sys.modules, "earlyexit_kernels.serving.ray_app", raising=False)
    yield importlib.import_module("earlyexit_kernels.serving.ray_app").app
    sys.modules.pop("earlyexit_kernels.serving.ray_app")


def test_arguments_of_the_command_line_are_options(app, tmp_path):
    """Ray Serve passes those of ``serve run`` as a dictionary of texts."""
    early_exit(num_hidden_layers=2).save_pretrained(tmp_path)
    toy.toy_tokenizer().save_pretrained(tmp_path)
    expected = Options(source=Source.of(str(tmp_path), None), max_tokens=128, max_queue=300)
    settings, options = app({"model": str(tmp_path), "max_tokens": "128", "max_queue": "300"})
    assert options == expected and settings == {"name": "earlyexit", "max_ongoing_requests": 300}
    for wrong in ({}, {"model": str(tmp_path), "port": "1"}, {"model": str(tmp_path), "max_tokens": "many"}):
        with pytest.raises(ValueError, match=r"model|port|max_tokens"):
            app(wrong)
